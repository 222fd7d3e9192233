# SPDX-License-Identifier: Apache-2.0
"""The ModelOpt mode and the checkpoint on disk: what is refused, and that nothing is lost."""

import json
from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import pytest
import torch
from families import build, build_dms, tokens
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from modelopt_dms.checkpoints.load import load
from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.modeling.convert import UnsupportedModelError, dms_modules, plan_conversion
from modelopt_dms.modeling.mode import CheckpointError, apply_dms


def same_logits(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    with torch.no_grad():
        ids = tokens(2, 30)
        return torch.equal(a(ids, use_cache=False).logits, b(ids, use_cache=False).logits)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    build_dms("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_converted_model_is_not_converted_again() -> None:
    with pytest.raises(UnsupportedModelError, match="already has DMS gates"):
        apply_dms(build_dms("llama"), {})


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=16, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        apply_dms(T5ForConditionalGeneration(config), {})


def test_a_model_without_full_attention_is_refused_layer_by_layer() -> None:
    model = build("mistral", sliding_window=8)
    with pytest.raises(UnsupportedModelError) as error:
        apply_dms(model, {})
    assert "model.layers.0.self_attn: sliding_attention (8 tokens)" in str(error.value)
    assert "model.layers.1.self_attn" in str(error.value)


def test_wildcards_choose_the_layers() -> None:
    plan, left = plan_conversion(build("llama"), DMSConfig(layers=["*.1.self_attn"]))
    assert list(plan) == ["model.layers.1.self_attn"]
    assert "not matched by dms.layers" in left["model.layers.0.self_attn"]
    model = build_dms("llama", layers=["*.1.self_attn"])
    assert list(dms_modules(model)) == ["model.layers.1.self_attn"]
    assert model.generate(tokens(1, 9), max_new_tokens=3).shape == (1, 12)


def test_a_sharded_checkpoint_loads_bit_exactly(tmp_path: Path) -> None:
    model = build_dms("llama")
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert same_logits(load(tmp_path), model)


def test_gates_stay_in_float32_beside_a_bfloat16_model(tmp_path: Path) -> None:
    model = build("llama").to(torch.bfloat16)
    apply_dms(model, {"window": 5})
    for module in dms_modules(model).values():
        module.dms_gate.weight.data.normal_()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.dtype == torch.bfloat16
    for name, module in dms_modules(loaded).items():
        assert module.dms_gate.weight.dtype == torch.float32
        assert torch.equal(module.dms_gate.weight, model.get_submodule(name).dms_gate.weight)


def test_a_checkpoint_that_modelopt_restores_by_itself_loads_too(tmp_path: Path) -> None:
    model = build_dms("llama")
    model.save_pretrained(tmp_path)
    fresh = build("llama", seed=5)
    mto.restore_from_modelopt_state(fresh, mto.modelopt_state(model))
    fresh.load_state_dict(model.state_dict())
    assert same_logits(fresh, model)


def _drop_gates(path: Path) -> None:
    kept = {k: v for k, v in load_file(path / "model.safetensors").items() if "dms_gate" not in k}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})


def _drop_one_gate(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors.pop(next(x for x in tensors if "dms_gate.weight" in x))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def _reshape_a_gate(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    name = next(x for x in tensors if "dms_gate.weight" in x)
    save_file(
        {**tensors, name: torch.zeros(3, 3)}, path / "model.safetensors", metadata={"format": "pt"}
    )


def _drop_marker(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    del config["dms_config"]
    (path / "config.json").write_text(json.dumps(config))


def _truncate(path: Path) -> None:
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_gates, r"safetensors hold no \*\.dms_gate\.\* tensors"),
        (_drop_one_gate, "gates in the file and in the model differ"),
        (_reshape_a_gate, r"has shape \(3, 3\), expected \(2, 32\)"),
        (_drop_marker, "but config.json has lost its dms_config"),
        (_truncate, "cannot be read"),
        (lambda path: (path / "config.json").unlink(), "has no config.json"),
        (lambda path: (path / "model.safetensors").unlink(), "has no safetensors file"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_error(damage: Any, message: str, saved: Path) -> None:
    damage(saved)
    with pytest.raises(CheckpointError, match=message):
        load(saved)


def test_a_model_made_of_a_compressed_ones_config_is_not_converted_anew(saved: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    with pytest.raises(ValueError, match=r"its gates are loaded by modelopt_dms.load\(DIR\)"):
        AutoModelForCausalLM.from_config(config)
    plain = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    with pytest.raises(CheckpointError, match="loaded without its gates"):
        apply_dms(plain, {})


def test_quantizing_afterwards_still_reaches_the_kv_cache() -> None:
    model = build_dms("llama")
    config: dict[str, Any] = {
        "quant_cfg": [
            *mtq.FP8_DEFAULT_CFG["quant_cfg"],
            *mtq.FP8_KV_CFG["quant_cfg"],
            {"quantizer_name": "*dms_*", "enable": False},
        ],
        "algorithm": "max",
    }
    ids = tokens(2, 30)
    with pytest.warns(UserWarning, match="save_pretrained does not keep its quantizers"):
        mtq.quantize(model, config, forward_loop=lambda m: m(ids))
    for module in dms_modules(model).values():
        assert module.k_bmm_quantizer.is_enabled and module.v_bmm_quantizer.is_enabled
    assert model.generate(ids, max_new_tokens=5).shape == (2, 35)


def test_a_preset_of_modelopt_alone_warns_at_once_and_its_directory_is_refused(
    tmp_path: Path,
) -> None:
    model = build_dms("llama")
    with pytest.warns(UserWarning, match="presets such as mtq.FP8_KV_CFG alone do not name"):
        mtq.quantize(model, mtq.FP8_KV_CFG)
    model.save_pretrained(tmp_path)
    for read in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(
            CheckpointError, match="was quantized by mtq.quantize, but nothing says"
        ):
            read(tmp_path)
