# SPDX-License-Identifier: Apache-2.0
"""DMS and quantization together: the cache holds what ModelOpt computes, and nothing changes on the way to disk."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from accelerate import cpu_offload
from families import (
    FAMILIES,
    LATENT,
    WINDOW,
    build,
    build_dms,
    distance,
    feed,
    greedy_without_cache,
    open_gates,
    results_in_a_fresh_process,
    tokens,
)
from modelopt.torch.quantization.nn import TensorQuantizer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import modelopt_dms as dms
from modelopt_dms.exporters import ExportError
from modelopt_dms.gates.gate import record_alpha
from modelopt_dms.kvcache.hf_cache import DMSLayer, kv_stats
from modelopt_dms.kvcache.kv_format import KVFormatError
from modelopt_dms.modeling.convert import dms_modules
from modelopt_dms.modeling.mode import CheckpointError
from modelopt_dms.quantization.apply import QuantizationError, is_quantized

LENGTH = 24
FP8 = "fp8_default-kv_fp8-dms_cr8"
NVFP4 = "nvfp4_default-kv_nvfp4-dms_cr8"
# ModelOpt's activation ranges make tiny differences between ways of summing cross a rounding boundary now and then: in
# about one text of thirty.
FLIPS = 1e-3
UNFLIPPED = 1e-4

LOAD_IN_A_FRESH_PROCESS = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
import modelopt_dms as dms

for path in map(Path, sys.argv[1:]):
    expected = load_file(path / "expected" / "outputs.safetensors")
    for name in ("saved", "exported"):
        model = dms.load(path / name)
        ids = expected["ids"]
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits
            generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8)
        same = torch.equal(logits, expected["logits"]) and torch.equal(generated, expected["generated"])
        print("RESULT", json.dumps([path.name + " " + name, same]))
"""


def config(recipe: str) -> Any:
    return dms.load_recipe(recipe).quantize


def quantized(family: str, recipe: str, **facts: Any) -> PreTrainedModel:
    with unwarned():
        return dms.quantize(build_dms(family, **facts), config(recipe), [tokens(4, 32, seed=5)])


@contextmanager
def unwarned() -> Iterator[None]:
    """Latents keep their dtype, and say so; other tests look at that."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return tokens(2, LENGTH)


@torch.no_grad()
def is_fed_right(model: PreTrainedModel, *splits: list[int]) -> bool:
    """Whether texts of at least two of three draws give the logits of a full forward, however they are cut."""
    right = 0
    for seed in range(3):
        ids = tokens(2, LENGTH, seed)
        full = model(ids, use_cache=False).logits
        right += all(distance(feed(model, ids, x)[0], full) < UNFLIPPED for x in splits)
    return right >= 2


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> PreTrainedModel:
    """Shared by the tests of one family; a test leaves it as it was."""
    return quantized(family, FP8)


@torch.no_grad()
def test_every_way_of_feeding_the_quantized_cache_equals_the_full_forward(
    model: PreTrainedModel,
) -> None:
    assert is_fed_right(model, [LENGTH], [1] * LENGTH, [10, 1, 1, 8, 4])


@torch.no_grad()
def test_generate_equals_recomputing_every_step_from_scratch(
    model: PreTrainedModel, ids: Tensor
) -> None:
    prompt = ids[:, :12]
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8)
    assert torch.equal(generated, greedy_without_cache(model, prompt, 8))


@torch.no_grad()
def test_the_cache_holds_what_modelopts_quantizers_compute(
    family: str, model: PreTrainedModel, ids: Tensor
) -> None:
    """Rows as the model hands them to the cache, through the quantizers, against what is stored; and one byte each."""
    given: dict[int, tuple[Tensor, Tensor]] = {}
    update = DMSLayer.update

    def spy(layer: DMSLayer, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        given[id(layer)] = (k, v)
        return update(layer, k, v, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, record_alpha(model) as record:
        patch.setattr(DMSLayer, "update", spy)
        _, cache = feed(model, ids, [LENGTH])
    for module in dms_modules(model).values():
        layer = cache.layers[module.layer_idx]
        k, v = given[id(layer)]
        if family not in LATENT:
            k, v = module.k_bmm_quantizer(k), module.v_bmm_quantizer(v)
            assert layer.slots.rows(0)[0].dtype == torch.uint8
            assert layer.slots.rows(0)[0].shape[-1] == k.shape[-1]
        evict = record.hard[module.layer_idx]
        old = torch.arange(LENGTH) < LENGTH - WINDOW - 1
        for b in range(2):
            for head in range(k.shape[1]):
                live = ~(evict[b, head] & old)
                # Slots are in no order; sort rows to compare them.
                for held, expected in zip(
                    layer.rows(b * k.shape[1] + head),
                    (k[b, head, live], v[b, head, live]),
                    strict=True,
                ):
                    assert torch.equal(_sorted(held), _sorted(expected))


def _sorted(rows: Tensor) -> Tensor:
    return torch.tensor(sorted(rows.tolist()))


SOME = ("llama", "qwen3_moe", "gpt_oss", "deepseek_v3")
OTHERS = tuple(x for x in FAMILIES if x not in SOME)


@pytest.mark.parametrize("families", [SOME, pytest.param(OTHERS, marks=pytest.mark.slow)])
@torch.no_grad()
def test_families_save_and_export_and_load_bit_exactly_in_a_fresh_process(
    families: tuple[str, ...], tmp_path: Path, ids: Tensor
) -> None:
    for family in families:
        model = quantized(family, FP8)
        place = tmp_path / family
        model.save_pretrained(place / "saved")
        outputs = {
            "ids": ids,
            "logits": model(ids, use_cache=False).logits,
            "generated": model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8),
        }
        dms.export(model, place / "exported")
        # Exporting packs a copy.
        assert torch.equal(model(ids, use_cache=False).logits, outputs["logits"])
        (place / "expected").mkdir()
        save_file(outputs, place / "expected" / "outputs.safetensors")
    found = results_in_a_fresh_process(LOAD_IN_A_FRESH_PROCESS, [tmp_path / x for x in families])
    wanted = [f"{family} {kind}" for family in families for kind in ("saved", "exported")]
    assert found == dict.fromkeys(wanted, True)


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "gemma3",
        "qwen3_moe",
        pytest.param("mixtral", marks=pytest.mark.slow),
        pytest.param("gpt_oss", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("recipe", [NVFP4, "nvfp4_weight_only-kv_fp8-dms_cr8"])
@torch.no_grad()
def test_nvfp4_runs_on_a_cpu_and_loads_bit_exactly(
    family: str, recipe: str, ids: Tensor, tmp_path: Path
) -> None:
    model = quantized(family, recipe)
    assert is_fed_right(model, [1] * LENGTH)
    full = model(ids, use_cache=False).logits
    model.save_pretrained(tmp_path / "saved")
    dms.export(model, tmp_path / "exported")
    for name in ("saved", "exported"):
        assert torch.equal(dms.load(tmp_path / name)(ids, use_cache=False).logits, full), name
    facts = json.loads((tmp_path / "exported" / "hf_quant_config.json").read_text())
    assert facts["dms"]["window"] == WINDOW
    assert facts["quantization"]["kv_cache_quant_algo"] == ("NVFP4" if recipe == NVFP4 else "FP8")


@pytest.mark.parametrize(
    "recipe",
    ["int8_smoothquant-dms_cr4", "kv_int8-dms_cr8", "kv_fp8_dynamic-dms_cr8", "kv_nvfp4-dms_cr8"],
)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
@torch.no_grad()
def test_other_formats_save_and_load_bit_exactly(
    recipe: str, family: str, ids: Tensor, tmp_path: Path
) -> None:
    model = quantized(family, recipe)
    assert is_fed_right(model, [11] + [1] * 13)
    full = model(ids, use_cache=False).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(dms.load(tmp_path)(ids, use_cache=False).logits, full)


@pytest.mark.parametrize(
    ("recipe", "row"),
    [
        (FP8, 128),
        ("kv_int8-dms_cr8", 128),
        ("kv_fp8_dynamic-dms_cr8", 132),
        (NVFP4, 64 + 8),
    ],
)
@torch.no_grad()
def test_bytes_are_those_of_the_format_scales_included(recipe: str, row: int) -> None:
    """2 layers of 2 KV heads of 128: bytes allocated are rows times bytes a row, and less than a page over."""
    facts: dict[str, Any] = {"base": {"head_dim": 128, "hidden_size": 64}}
    model = quantized("llama", recipe, **facts)
    _, cache = feed(model, tokens(1, 200), [200])
    stats = kv_stats(cache)
    for layer in stats.layers:
        rows = int(layer.resident.sum())
        assert rows * 2 * row <= layer.kv_bytes <= (rows + 2 * (16 + 200 // 16 + 1)) * 2 * row
        assert layer.bf16_bytes == 200 * 2 * 2 * 128 * 2
    assert stats.memory_reduction == pytest.approx(
        sum(x.bf16_bytes for x in stats.layers) / sum(x.kv_bytes for x in stats.layers)
    )


@torch.no_grad()
def test_beams_padding_turns_and_drafts_work_on_the_quantized_cache() -> None:
    model = quantized("llama", "kv_nvfp4-dms_cr8")
    ids = tokens(2, 16)
    ones = torch.ones_like(ids)
    greedy = model.generate(ids, attention_mask=ones, max_new_tokens=8)
    beams = {"attention_mask": ones, "num_beams": 3, "max_new_tokens": 6}
    assert torch.equal(model.generate(ids, **beams), model.generate(ids, use_cache=False, **beams))
    padded = torch.cat([torch.zeros(2, 5, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 5, dtype=torch.long), ones], dim=1)
    after = model.generate(padded, attention_mask=mask, max_new_tokens=8)
    assert torch.equal(after[:, 5:], greedy)
    assistant = quantized("llama", "kv_nvfp4-dms_cr8", seed=3)
    one = {"attention_mask": ones[:1], "max_new_tokens": 8}
    drafted = model.generate(ids[:1], assistant_model=assistant, **one)
    assert torch.equal(drafted, model.generate(ids[:1], **one))
    first = model.generate(ids, attention_mask=ones, max_new_tokens=4, return_dict_in_generate=True)
    second = model.generate(
        first.sequences,
        attention_mask=torch.ones_like(first.sequences),
        past_key_values=first.past_key_values,
        max_new_tokens=4,
    )
    assert torch.equal(second, greedy)


@torch.no_grad()
def test_gates_are_left_in_high_precision() -> None:
    model = quantized("llama", NVFP4)
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            assert "dms_gate" not in name or not module.is_enabled
    before = [x.dms_gate.weight.clone() for x in dms_modules(build_dms("llama")).values()]
    after = [x.dms_gate.weight for x in dms_modules(model).values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@torch.no_grad()
def test_a_borrowed_neuron_is_read_from_the_quantized_projection(tmp_path: Path) -> None:
    """What decides is what an engine with packed weights would compute."""
    model = quantized("llama", NVFP4, gate="neuron")
    ids = tokens(2, LENGTH)
    full = model(ids, use_cache=False).logits
    dms.export(model, tmp_path)
    assert torch.equal(dms.load(tmp_path)(ids, use_cache=False).logits, full)


@torch.no_grad()
def test_modelopt_saves_and_restores_both_modes(ids: Tensor, tmp_path: Path) -> None:
    model = quantized("qwen3", NVFP4)
    full = model(ids, use_cache=False).logits
    mto.save(model, tmp_path / "model.pt")
    restored = mto.restore(build("qwen3", seed=7), tmp_path / "model.pt")
    assert torch.equal(restored.eval()(ids, use_cache=False).logits, full)


@torch.no_grad()
def test_a_model_without_gates_can_be_quantized_saved_and_exported_too(
    ids: Tensor, tmp_path: Path
) -> None:
    model = dms.quantize(build("llama"), config("general/ptq/fp8_default-kv_fp8"), [tokens(4, 32)])
    full = model(ids, use_cache=False).logits
    model.save_pretrained(tmp_path / "saved")
    dms.export(model, tmp_path / "exported")
    for name in ("saved", "exported"):
        assert torch.equal(dms.load(tmp_path / name)(ids, use_cache=False).logits, full)


@torch.no_grad()
def test_batches_may_be_what_a_dataloader_gives() -> None:
    batch = {"input_ids": tokens(4, 32, seed=5), "attention_mask": torch.ones(4, 32)}
    one = dms.quantize(build_dms("llama"), config(FP8), [batch])
    other = quantized("llama", FP8)
    for name, module in other.named_modules():
        if isinstance(module, TensorQuantizer) and module.is_enabled:
            assert torch.equal(one.get_submodule(name).amax, module.amax), name


def test_latents_stay_in_the_models_dtype_and_that_is_said() -> None:
    with pytest.warns(UserWarning, match="cache a latent .MLA. and keep it in torch.float32"):
        dms.quantize(build_dms("deepseek_v3"), config(FP8), [tokens(4, 32)])


def test_what_modelopt_cannot_pack_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    model = quantized("llama", "kv_int8-dms_cr8")
    with pytest.raises(ExportError, match="cannot hold this quantization"):
        dms.export(model, tmp_path / "new")
    with pytest.raises(ExportError, match="format='gguf' is not known; accepted: hf"):
        dms.export(model, tmp_path / "new", "gguf")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("recipe", "family"),
    [
        (FP8, "llama"),
        (FP8, "qwen3_moe"),
        (FP8, "gpt_oss"),
        ("nvfp4_default-kv_fp8-dms_cr8", "llama"),
        ("nvfp4_weight_only-kv_fp8-dms_cr8", "llama"),
    ],
)
def test_a_bfloat16_model_is_the_same_saved_and_exported(
    recipe: str, family: str, tmp_path: Path
) -> None:
    build(family, head_dim=16).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    open_gates(dms.apply_dms(model, {"window": 5, "scale": 10.0}))
    dms.quantize(model, config(recipe), [tokens(4, 32)])
    model.save_pretrained(tmp_path / "saved")
    dms.export(model, tmp_path / "exported")
    ids = tokens(2, 30)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        for name in ("saved", "exported"):
            again = dms.load(tmp_path / name)
            assert again.dtype == torch.bfloat16
            assert torch.equal(again(ids, use_cache=False).logits, expected), name


def test_fp8_codes_of_a_bfloat16_model_are_those_of_its_quantizers(tmp_path: Path) -> None:
    """Rounded once, from float32; by way of bfloat16, some 3 % of the codes would be a step off."""
    model = build_dms("llama").to(torch.bfloat16)
    dms.quantize(model, config(FP8), [tokens(4, 32)])
    before = copy.deepcopy(model.state_dict())
    dms.export(model, tmp_path / "exported")
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    stored = load_file(tmp_path / "exported" / "model.safetensors")
    packed = [name for name, x in stored.items() if x.dtype == torch.float8_e4m3fn]
    assert len(packed) == 14
    for name in packed:
        scale = stored[name.replace(".weight", ".weight_scale")].double()
        expected = (before[name].double() / scale).to(torch.float8_e4m3fn)
        assert torch.equal(stored[name].float(), expected.float()), name


def test_offloaded_weights_are_not_packed(tmp_path: Path) -> None:
    model = quantized("llama", FP8)
    cpu_offload(model, execution_device="cpu")
    with pytest.raises(ExportError, match=r"model.embed_tokens.weight is offloaded"):
        dms.export(model, tmp_path / "exported")
    assert not (tmp_path / "exported").exists()


def test_a_model_that_is_not_quantized_is_exported_as_it_is(tmp_path: Path) -> None:
    model, ids = build_dms("llama"), tokens(2, 30)
    dms.export(model, tmp_path / "new")
    with torch.no_grad():
        again = dms.load(tmp_path / "new")(ids, use_cache=False).logits
        assert torch.equal(again, model(ids, use_cache=False).logits)


def test_a_quantized_model_is_not_quantized_again_nor_given_gates() -> None:
    model = quantized("llama", FP8)
    with pytest.raises(QuantizationError, match="quantized already"):
        dms.quantize(model, config(FP8), [tokens(1, 8)])


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"num_bits": 4}, "num_bits 4"),
        ({"num_bits": (4, 3), "bias": {-1: None}}, "bias"),
    ],
)
def test_kv_quantizers_that_cannot_be_stored_are_refused_before_anything_is_done(
    cfg: dict[str, Any], message: str
) -> None:
    model = build_dms("llama")
    wanted = {"quant_cfg": [{"quantizer_name": "*[kv]_bmm_quantizer", "cfg": cfg}]}
    with pytest.raises(KVFormatError, match=message):
        dms.quantize(model, wanted, [tokens(1, 8)])
    assert not is_quantized(model)
    assert not hasattr(model.config, "dms_quantization")


def test_gates_opened_after_quantization_evict_from_the_quantized_cache(ids: Tensor) -> None:
    """Quantize first, gates learn under it: the order of a quantization-aware retrofit."""
    with torch.no_grad():
        model = dms.apply_dms(build("llama"), {"window": WINDOW, "scale": 10.0})
        model = open_gates(dms.quantize(model, config(FP8), [tokens(4, 32)]))
        full = model(ids, use_cache=False).logits
        logits, cache = feed(model, ids, [1] * LENGTH)
    assert distance(logits, full) < FLIPS
    assert kv_stats(cache).resident_tokens < LENGTH


@torch.no_grad()
def test_modelopts_own_presets_and_forward_loops_work(ids: Tensor) -> None:
    """What a ModelOpt user would type; and mtq.quantize itself on a model with gates."""
    calibration = tokens(4, 32, seed=5)

    def forward_loop(model: Any) -> None:
        model(calibration)

    preset = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    preset["quant_cfg"] += copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
    ours = dms.quantize(build_dms("llama"), preset, forward_loop)
    theirs = mtq.quantize(build_dms("llama"), preset, forward_loop)
    for model in (ours, theirs):
        logits, cache = feed(model, ids, [1] * LENGTH)
        assert distance(logits, model(ids, use_cache=False).logits) < FLIPS
        assert cache.layers[0].slots.rows(0)[0].dtype == torch.uint8
    # Settling moves ranges by rounding errors; a value on the border between two codes may then flip.
    difference = theirs(ids, use_cache=False).logits - ours(ids, use_cache=False).logits
    assert difference.abs().mean() < 1e-3


def test_what_mtq_quantized_alone_is_not_loaded_as_if_it_were_plain(tmp_path: Path) -> None:
    model = build_dms("llama")
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda network: network(tokens(1, 8)))
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="quantized by mtq.quantize"):
        dms.load(tmp_path)


def test_latents_with_kv_quantizers_of_modelopt_are_refused() -> None:
    model = build_dms("deepseek_v3")
    cfg = {"quant_cfg": mtq.FP8_KV_CFG["quant_cfg"], "algorithm": "max"}
    mtq.quantize(model, cfg, lambda network: network(tokens(1, 8), use_cache=False))
    with pytest.raises(KVFormatError, match="caches a latent"):
        model(tokens(1, 8), use_cache=True)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    "recipe",
    [
        "fp8_default-kv_fp8-dms_cr8",
        "kv_fp8_dynamic-dms_cr8",
        "kv_int8-dms_cr8",
        "kv_nvfp4-dms_cr8",
    ],
)
@torch.no_grad()
def test_pages_give_the_logits_of_lists(recipe: str, impl: str) -> None:
    model = build_dms("llama", base={"head_dim": 16, "num_hidden_layers": 1})
    quant = dms.load_recipe(recipe).quantize
    model = dms.quantize(model, quant, [{"input_ids": tokens(2, 60)}])
    ids, sizes = tokens(2, 24), [15, 6, 1, 1, 1]
    expected, _ = feed(model, ids, sizes)
    cache = dms.DMSCache(model, batch_size=2, max_length=64, impl=impl)
    assert distance(feed(model, ids, sizes, cache)[0], expected) < 1e-5


@pytest.mark.parametrize("preset", ["FP8_KV_CFG", "NVFP4_KV_CFG"])
@pytest.mark.parametrize("batches", [(), []], ids=str)
def test_kv_presets_without_data_are_refused_when_quantizing(preset: str, batches: Any) -> None:
    model = build_dms("llama")
    with pytest.raises(KVFormatError, match="need batches to calibrate with"):
        dms.quantize(model, copy.deepcopy(getattr(mtq, preset)), batches)
    assert not is_quantized(model)
    with pytest.raises(KVFormatError, match="the KV quantizers have no amax"):
        dms.quantize(model, copy.deepcopy(getattr(mtq, preset)), iter(()))
    ours = dms.quantize(build_dms("llama"), copy.deepcopy(getattr(mtq, preset)), [tokens(4, 32)])
    assert ours.generate(tokens(1, 20), max_new_tokens=2).shape == (1, 22)


def test_activations_without_batches_to_calibrate_with_are_refused_before_work() -> None:
    model = build_dms("llama")
    with pytest.raises(QuantizationError, match="input_quantizer.* need batches"):
        dms.quantize(model, mtq.FP8_DEFAULT_CFG)
    assert not is_quantized(model)


def test_a_model_that_modelopt_alone_has_quantized_is_not_exported_as_another(
    ids: Tensor, tmp_path: Path
) -> None:
    model = build_dms("llama")
    mtq.quantize(model, copy.deepcopy(mtq.FP8_DEFAULT_CFG), lambda network: network(ids))
    with pytest.raises(ExportError, match="by mtq.quantize alone"):
        dms.export(model, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
