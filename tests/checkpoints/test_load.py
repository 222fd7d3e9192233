# SPDX-License-Identifier: Apache-2.0
"""A directory is loaded with its gates by every usual way, or refused; so is what cannot become a DMS model."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import modelopt.torch.quantization as mtq
import pytest
import torch
import transformers as tf
from families import build, build_dms, distance, open_gates, tokens
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

import modelopt_dms as dms
from modelopt_dms.checkpoints.base import check_model_place, load_tokenizer, slow_dtype
from modelopt_dms.checkpoints.written import check_written
from modelopt_dms.config.bundled import embedded_model_dir
from modelopt_dms.config.output_dir import OutputError
from modelopt_dms.gates.gate import eviction_off
from modelopt_dms.modeling.convert import UnsupportedModelError, dms_modules
from modelopt_dms.modeling.mode import CheckpointError, apply_dms

SIZES = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
EYES = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}


def run(code: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def test_without_the_package_every_way_of_transformers_refuses_and_says_what_to_import(
    tmp_path: Path,
) -> None:
    build_dms("llama").save_pretrained(tmp_path)
    code = """
import json, pathlib, sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel
for load, options in (
    (AutoModelForCausalLM, {}), (LlamaModel, {}),
    (LlamaForCausalLM, {"attn_implementation": "sdpa", "dtype": torch.bfloat16}),
):
    try:
        load.from_pretrained(sys.argv[1], **options)
    except ValueError as error:
        print(error)
try:
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))
except ValueError as error:
    print(error)
path = pathlib.Path(sys.argv[1], "config.json")
config = json.loads(path.read_text())
del config["quantization_config"], config["fusion_config"]
path.write_text(json.dumps(config))
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
assert "modelopt_dms" not in sys.modules
"""
    found = run(code, tmp_path)
    assert found.stdout.count("import modelopt_dms before loading it") == 3, found
    assert found.stdout.count("its gates are loaded by modelopt_dms.load(DIR)") == 2, found


@pytest.mark.parametrize(
    "imports",
    [
        "import modelopt_dms",
        pytest.param("import transformers.modeling_utils, modelopt_dms", marks=pytest.mark.slow),
    ],
)
def test_once_the_package_is_imported_transformers_and_load_give_the_same_model(
    imports: str, tmp_path: Path
) -> None:
    """Saved by save_pretrained, and quantized with its KV cache; in a fresh process, imports in either order."""
    ids = tokens(2, 30)
    expected = {}
    for name in ("plain", "quantized"):
        model = build_dms("llama")
        if name == "quantized":
            fp8 = dms.load_recipe("fp8_default-kv_fp8-dms_cr8").quantize
            dms.quantize(model, fp8, [tokens(4, 32)])
        model.save_pretrained(tmp_path / name)
        expected[name] = logits(model, ids)
    save_file(expected | {"ids": ids}, tmp_path / "expected")
    code = """
import sys, torch
exec(sys.argv[2])
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
known = load_file(Path(sys.argv[1]) / "expected")
for name in ("plain", "quantized"):
    for load in (AutoModelForCausalLM.from_pretrained, modelopt_dms.load):
        model = load(Path(sys.argv[1]) / name)
        with torch.no_grad():
            print(torch.equal(model(known["ids"], use_cache=False).logits, known[name]))
        model.generate(known["ids"], max_new_tokens=2)
        print(modelopt_dms.kv_stats(model).compression_ratio > 1)
"""
    found = run(code, tmp_path, imports)
    assert found.stdout.count("True") == 8, found


def test_a_model_loaded_by_transformers_is_an_ordinary_one(tmp_path: Path) -> None:
    model, ids = build_dms("qwen3"), tokens(2, 30)
    model.save_pretrained(tmp_path / "a")
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    again = dms.load(tmp_path / "b")
    assert torch.equal(logits(again, ids), logits(model, ids))
    assert not loaded.is_quantized
    with pytest.raises(ValueError, match="Qwen3Model has no language-model head"):
        tf.AutoModel.from_pretrained(tmp_path / "a")
    half = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    for name, module in dms_modules(half).items():
        assert torch.equal(module.dms_gate.weight, model.get_submodule(name).dms_gate.weight)
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "a", attn_implementation="sdpa")


@pytest.mark.parametrize(
    "imports",
    [
        "import modelopt_dms",
        pytest.param("import modelopt.torch.opt, modelopt_dms", marks=pytest.mark.slow),
    ],
)
def test_importing_the_package_registers_modelopts_mode(imports: str, tmp_path: Path) -> None:
    """apply_mode, save and restore of ModelOpt, in a fresh process that calls nothing of ours."""
    code = """
import sys
exec(sys.argv[2])
import torch
import modelopt.torch.opt as mto
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
model = mto.apply_mode(LlamaForCausalLM(config), [("dms", {"window": 4, "offset": 0.0})])
torch.nn.init.normal_(model.model.layers[0].self_attn.dms_gate.weight)
mto.save(model, sys.argv[1])
again = mto.restore(LlamaForCausalLM(config), sys.argv[1])
ids = torch.arange(30)[None]
print(torch.equal(model(ids, use_cache=False).logits, again(ids, use_cache=False).logits))
"""
    found = run(code, tmp_path / "state.pt", imports)
    assert "True" in found.stdout, found


def _nemotron() -> Any:
    return tf.NemotronHConfig(
        **SIZES,
        num_hidden_layers=4,
        layers_block_type=["mamba", "attention", "mlp", "attention"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        n_groups=1,
        ssm_state_size=8,
        use_mamba_kernels=False,
    )


def _llava() -> Any:
    text = tf.LlamaConfig(**SIZES, num_hidden_layers=2)
    return tf.LlavaConfig(
        text_config=text, vision_config=tf.CLIPVisionConfig(**EYES), image_token_id=70
    )


def _gemma3() -> Any:
    text = tf.Gemma3TextConfig(
        **SIZES,
        num_hidden_layers=2,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    eyes = tf.SiglipVisionConfig(**EYES)
    return tf.Gemma3Config(
        text_config=text, vision_config=eyes, mm_tokens_per_image=4, image_token_id=70
    )


def _qwen2_vl() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    eyes = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    return tf.Qwen2VLConfig(
        text_config={**SIZES, "num_hidden_layers": 2, "rope_parameters": rope},
        vision_config=eyes,
        image_token_id=70,
        video_token_id=71,
        vision_start_token_id=72,
        vision_end_token_id=73,
    )


def _with_an_image(name: str) -> dict[str, Tensor]:
    """Two prompts with an image each: 16 patches, which Qwen2-VL merges to 4 tokens."""
    ids = torch.randint(3, 60, (2, 30))
    if "Llava" in name:
        ids[:, 2:18] = 70
        return {"input_ids": ids, "pixel_values": torch.randn(2, 3, 16, 16)}
    ids[:, 1], ids[:, 2:6], ids[:, 6] = 72, 70, 73
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(32, 96),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (ids == 70).int(),
    }


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("NemotronHForCausalLM", _nemotron),
        ("LlavaForConditionalGeneration", _llava),
        ("Gemma3ForConditionalGeneration", _gemma3),
    ],
)
def test_gates_are_found_where_transformers_renames_what_it_saves(
    name: str, config: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = getattr(tf, name)(config()).eval()
    apply_dms(model, {"window": 5, "offset": 0.0, "scale": 10.0})
    for module in dms_modules(model).values():
        torch.nn.init.normal_(module.dms_gate.weight, std=0.3)
    model.save_pretrained(tmp_path)
    check_written(tmp_path, model)
    ids = torch.randint(3, 60, (2, 40))
    for loaded in (dms.load(tmp_path), getattr(tf, name).from_pretrained(tmp_path)):
        assert type(loaded).__name__ == name
        assert torch.equal(logits(loaded, ids), logits(model, ids))
    loaded.generate(ids, max_new_tokens=2)
    assert dms.kv_stats(loaded).compression_ratio > 1


def test_a_model_with_layers_on_disk_computes_what_it_computes_in_memory(tmp_path: Path) -> None:
    model, ids = build_dms("llama"), tokens(2, 30)
    model.save_pretrained(tmp_path)
    where = dict.fromkeys(
        ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    loaded = dms.load(tmp_path, device_map={**where, "model.layers.1": "disk"})
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_use_cache_off_in_a_config_does_not_switch_the_cache_off(tmp_path: Path) -> None:
    model = build("llama", use_cache=False)
    model.generation_config.use_cache = False
    model.save_pretrained(tmp_path / "plain")
    plain = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    open_gates(apply_dms(plain, {"window": 5, "scale": 10.0})).save_pretrained(tmp_path / "dms")
    for loaded in (plain, dms.load(tmp_path / "dms")):
        loaded.generate(tokens(2, 30), max_new_tokens=2)
        assert dms.kv_stats(loaded).compression_ratio > 1


def _double(place: Path) -> None:
    first = load_file(place / "model.safetensors")
    key = next(iter(first))
    save_file({key: first[key]}, place / "more.safetensors")


def _lose(part: str) -> Any:
    def damage(place: Path) -> None:
        tensors = load_file(place / "model.safetensors")
        tensors.pop(next(x for x in tensors if part in x))
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})

    return damage


def _change_a_bit(part: str) -> Any:
    def damage(place: Path) -> None:
        tensors = load_file(place / "model.safetensors")
        tensors[next(x for x in tensors if part in x)].view(torch.int32).view(-1)[0] ^= 1
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})

    return damage


def _round_gates(place: Path) -> None:
    tensors = load_file(place / "model.safetensors")
    key = next(x for x in tensors if "dms_gate.weight" in x)
    tensors[key] = tensors[key].bfloat16()
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})


def _other_window(place: Path) -> None:
    config = json.loads((place / "config.json").read_text())
    config["dms_config"]["window"] += 1
    (place / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_double, r"is in model\.safetensors and in more\.safetensors"),
        (_lose("dms_gate.weight"), "dms_gate.weight is not in it"),
        (_lose("mlp.up_proj"), "up_proj.weight is not in it"),
        (_change_a_bit("dms_gate.weight"), "dms_gate.weight holds other values"),
        (_change_a_bit("dms_gate.threshold"), "dms_gate.threshold holds other values"),
        (_round_gates, "dms_gate.weight holds other values"),
        (_other_window, "dms_config is another one"),
        (lambda x: (x / "config.json").write_text("{"), "config.json was not written right"),
        (lambda x: (x / "model.safetensors").write_bytes(b"12345678{"), "was not written right"),
    ],
)
def test_what_was_not_written_right_is_noticed(damage: Any, message: str, tmp_path: Path) -> None:
    model = build_dms("llama")
    model.save_pretrained(tmp_path)
    check_written(tmp_path, model)
    damage(tmp_path)
    with pytest.raises(OutputError, match=message):
        check_written(tmp_path, model)


def _quantized_config(method: str) -> Any:
    def change(place: Path) -> None:
        config = json.loads((place / "config.json").read_text())
        config["quantization_config"] = {"quant_method": method}
        (place / "config.json").write_text(json.dumps(config))

    return change


def _stored_as(dtype: torch.dtype, suffix: str = "") -> Any:
    def change(place: Path) -> None:
        tensors = load_file(place / "model.safetensors")
        key = next(x for x in tensors if "up_proj" in x)
        tensors[key.removesuffix("weight") + suffix if suffix else key] = (
            tensors[key].to(dtype).clone()
        )
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            (_quantized_config(x), f"quant_method='{x}'")
            for x in ("gptq", "awq", "fp8", "compressed-tensors", "bitsandbytes", "modelopt")
        ),
        (
            lambda x: (x / "hf_quant_config.json").write_text(
                '{"quantization": {"quant_algo": "NVFP4"}}'
            ),
            "quant_algo='NVFP4'",
        ),
        (
            lambda x: (x / "adapter_config.json").write_text(
                '{"base_model_name_or_path": "some/base"}'
            ),
            "PEFT adapter of 'some/base'",
        ),
        (_stored_as(torch.float8_e4m3fn), "up_proj.weight is stored as F8_E4M3"),
        (_stored_as(torch.int8), "up_proj.weight is stored as I8"),
        (_stored_as(torch.float32, "weight_scale"), "weight_scale belongs to quantized weights"),
        (_stored_as(torch.int32, "qweight"), "qweight belongs to quantized weights"),
        (lambda x: (x / "model.safetensors").write_bytes(b"\xff" * 16), "cannot be read"),
    ],
)
def test_weights_that_are_not_plain_are_one_line_before_anything_is_loaded(
    change: Any, message: str, tmp_path: Path
) -> None:
    build("llama").save_pretrained(tmp_path)
    check_model_place(str(tmp_path))
    change(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        check_model_place(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_directory_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


def test_a_class_that_the_directory_does_not_name_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = apply_dms(tf.Gemma3ForConditionalGeneration(_gemma3()), {"window": 5})
    model.save_pretrained(tmp_path)
    config = tf.AutoConfig.from_pretrained(tmp_path)
    config.architectures, config.model_type = ["Nothing"], "nothing"
    del config.dms_config
    config.save_pretrained(tmp_path)
    with pytest.raises((ValueError, CheckpointError), match="lost its dms_config"):
        dms.load(tmp_path)


def _without(*fields: str) -> Any:
    def change(place: Path) -> None:
        config = json.loads((place / "config.json").read_text())
        kept = {key: x for key, x in config.items() if key not in fields}
        (place / "config.json").write_text(json.dumps(kept))

    return change


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            ["quantization_config"],
            "if it is imported: config.json has lost its quantization_config",
        ),
        (["quantization_config", "fusion_config"], "its gates are loaded by modelopt_dms.load"),
        (
            ["quantization_config", "fusion_config", "attn_implementation"],
            "the model would be loaded without it",
        ),
        (
            ["quantization_config", "fusion_config", "attn_implementation", "dms_config"],
            "the model would be loaded without it",
        ),
    ],
)
def test_a_config_that_lost_its_marks_is_refused_by_transformers(
    fields: list[str], message: str, tmp_path: Path
) -> None:
    model, ids = build_dms("llama"), tokens(1, 30)
    model.save_pretrained(tmp_path)
    _without(*fields)(tmp_path)
    with pytest.raises(ValueError, match=message):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    if "dms_config" in fields:
        with pytest.raises(CheckpointError, match="config.json has lost its dms_config"):
            dms.load(tmp_path)
    else:
        assert torch.equal(logits(dms.load(tmp_path), ids), logits(model, ids))


def test_another_config_or_a_state_dict_does_not_lose_the_gates(tmp_path: Path) -> None:
    model, ids = build_dms("llama"), tokens(1, 30)
    model.save_pretrained(tmp_path)
    plain = build("llama").config
    for load, source in (
        (tf.AutoModelForCausalLM, {"pretrained_model_name_or_path": tmp_path}),
        (tf.LlamaModel, {"pretrained_model_name_or_path": tmp_path}),
        (
            tf.LlamaForCausalLM,
            {"pretrained_model_name_or_path": None, "state_dict": model.state_dict()},
        ),
    ):
        with pytest.raises(ValueError, match="dms_gate.* is a DMS gate's, and the model would be"):
            load.from_pretrained(**source, config=plain)
    for config in (tf.AutoConfig.from_pretrained(tmp_path), model.config):
        loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
        assert torch.equal(logits(loaded, ids), logits(model, ids))
    build("llama").save_pretrained(tmp_path / "plain")
    assert tf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", config=plain) is not None


def test_what_load_does_not_accept_is_named_with_what_it_accepts(tmp_path: Path) -> None:
    build_dms("llama").save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"attn_implementation='sdpa'; accepted: dtype, device_map"
    ):
        dms.load(tmp_path, attn_implementation="sdpa")


def _quantized_by_modelopt() -> Any:
    model = build("llama")
    return mtq.quantize(model, copy.deepcopy(mtq.FP8_DEFAULT_CFG), lambda x: x(tokens(4, 32)))


def _compressed_by_modelopt() -> Any:
    model = _quantized_by_modelopt()
    mtq.compress(model)
    return model


def _quantized_by_transformers() -> Any:
    model = build("llama")
    model.hf_quantizer, model.is_quantized = object(), True
    model.config.quantization_config = tf.BitsAndBytesConfig(load_in_4bit=True)
    return model


def _with_packed_weights() -> Any:
    model = build("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.requires_grad_(False).data = weight.data.to(torch.float8_e4m3fn)
    return model


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (_quantized_by_modelopt, "quantized by ModelOpt already"),
        (_compressed_by_modelopt, "quantized by ModelOpt already"),
        (_quantized_by_transformers, "quant_method='bitsandbytes'"),
        (_with_packed_weights, "up_proj.weight is stored as torch.float8_e4m3fn"),
    ],
)
def test_a_model_that_is_quantized_already_is_one_line_before_any_work(
    made: Any, message: str
) -> None:
    model = made()
    for convert in (
        lambda: apply_dms(model, {"window": 5}),
        lambda: dms.compress(model, "dms_cr4", data=tokens(8, 64).tolist()),
    ):
        with pytest.raises(UnsupportedModelError, match=message) as error:
            convert()
        assert "\n" not in str(error.value)
    assert not dms_modules(model)


@pytest.mark.parametrize(
    ("name", "config"),
    [("LlavaForConditionalGeneration", _llava), ("Qwen2VLForConditionalGeneration", _qwen2_vl)],
)
def test_a_model_that_sees_generates_the_same_about_an_image_before_and_after_saving(
    name: str, config: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = getattr(tf, name)(config()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    inputs = _with_an_image(name)

    def generated(network: Any) -> Any:
        return network.generate(
            **inputs,
            max_new_tokens=8,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )

    plain = generated(model)
    apply_dms(model, {"window": 5, "offset": 0.0, "scale": 10.0})
    for module in dms_modules(model).values():
        torch.nn.init.normal_(module.dms_gate.weight, std=0.3)
    with eviction_off(model):
        found = generated(model)
    assert torch.equal(found.sequences, plain.sequences)
    assert distance(torch.stack(found.logits), torch.stack(plain.logits)) < 1e-5
    expected = generated(model)
    assert dms.kv_stats(model).compression_ratio > 1
    assert distance(torch.stack(expected.logits), torch.stack(plain.logits)) > 1e-3
    model.save_pretrained(tmp_path)
    check_written(tmp_path, model)
    for loaded in (dms.load(tmp_path), getattr(tf, name).from_pretrained(tmp_path)):
        again = generated(loaded)
        assert torch.equal(again.sequences, expected.sequences)
        assert torch.equal(torch.stack(again.logits), torch.stack(expected.logits))


class _Hub:
    """What of the hub's client a push calls; files are copied to a directory."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(self, operations: list[Any], **options: Any) -> None:
        for x in operations:
            target = self.place / x.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(x.path_or_fileobj, target)


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_what_is_pushed_to_the_hub_is_complete_and_loads(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_card(*_: Any, **__: Any) -> None:
        raise EntryNotFoundError("no card yet")

    hub = _Hub(tmp_path / "hub")
    for module in (tf.utils.hub, tf.modeling_utils, tf.tokenization_utils_base):
        if hasattr(module, "hf_api"):
            monkeypatch.setattr(module, "hf_api", lambda: hub)
    monkeypatch.setattr(tf.utils.hub.ModelCard, "load", no_card)
    model, ids = build_dms("llama"), tokens(1, 30)
    tokenizer = tf.AutoTokenizer.from_pretrained(embedded_model_dir())
    for x in (model, tokenizer):
        if way == "push_to_hub":
            x.push_to_hub("me/mine")
        else:
            x.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/mine")
    names = {x.name for x in hub.place.iterdir()}
    assert {"README.md", "config.json", "generation_config.json", "tokenizer.json"} <= names
    check_written(hub.place, model)
    assert torch.equal(logits(dms.load(hub.place), ids), logits(model, ids))
    assert load_tokenizer(hub.place).get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_bfloat16_on_a_cpu_without_instructions_for_it_is_said(
    monkeypatch: pytest.MonkeyPatch, capability: str
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    model = build("llama")
    assert slow_dtype(model) is None
    line = slow_dtype(model.bfloat16())
    assert (line is None) == (capability == "AVX512")
    assert line is None or "--dtype float32" in line
