# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's DMS checkpoints: loaded by a map of keys, and equal to their formulae written out once more in float64."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import build, distance, feed, tokens
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from modelopt_dms.checkpoints.load import load
from modelopt_dms.checkpoints.tensor_names import StoredNames
from modelopt_dms.gates.curve import CompressionError
from modelopt_dms.gates.thresholds import set_compression
from modelopt_dms.kvcache.hf_cache import kv_stats
from modelopt_dms.modeling.mode import CheckpointError

WINDOW, SCALE, OFFSET = 5, 100.0, 5.0
LENGTH = 40


def write_checkpoint(place: Path, bias: bool = False, **changes: Any) -> dict[str, Tensor]:
    """A tiny Qwen3 as NVIDIA's extract.py leaves it: remote code named, `dms_*` facts, `dms_proj_alpha*` tensors."""
    torch.manual_seed(0)
    model = build("qwen3")
    model.save_pretrained(place)
    weights = load_file(place / "model.safetensors")
    C, K = model.config.hidden_size, model.config.num_key_value_heads
    for i in range(model.config.num_hidden_layers):
        at = f"model.layers.{i}.self_attn"
        weights[f"{at}.dms_proj_alpha.weight"] = torch.randn(K, C) * 0.05
        weights[f"{at}.dms_proj_alpha_norm.weight"] = 1 + 0.1 * torch.randn(C)
        if bias:
            weights[f"{at}.dms_proj_alpha.bias"] = torch.randn(K) * 0.1
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((place / "config.json").read_text())
    config.pop("architectures")
    config |= {
        "auto_map": {
            "AutoConfig": "configuration_qwen3_dms.Qwen3ConfigDMS",
            "AutoModelForCausalLM": "modeling_qwen3_dms.Qwen3ForCausalLMDMS",
        },
        "dms_alpha_per": "head",
        "dms_alpha_scale": SCALE,
        "dms_chunked_prefill": None,
        "dms_cr": 8,
        "dms_disable_eviction": False,
        "dms_initial_alpha_offset": OFFSET,
        "dms_manual_inference_mode": False,
        "dms_paged_attention_block_size": 4,
        "dms_preallocate_for_tokens": 4096,
        "dms_separate_alpha": True,
        "dms_tau": 0.1,
        "dms_window_size": WINDOW,
    }
    config |= changes
    (place / "config.json").write_text(json.dumps(config))
    # If any of their code ran, this would.
    for name in ("configuration_qwen3_dms.py", "modeling_qwen3_dms.py"):
        (place / name).write_text("raise SystemExit('remote code was run')\n")
    return weights


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary positions [.., T, D], halves convention."""
    T, D = x.shape[-2:]
    angles = torch.arange(T).double()[:, None] * theta ** (
        -torch.arange(0, D, 2).double()[None] / D
    )
    cos, sin = (f(torch.cat([angles, angles], dim=-1)) for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def oracle(weights: dict[str, Tensor], config: Any, ids: Tensor, per: str = "head") -> Tensor:
    """Qwen3 with NVIDIA's DMS, whole sequence, float64, from the tensors of the file alone.

    decision_logits = dms_proj_alpha(dms_proj_alpha_norm(residual)) * scale - offset; the decision made at token j + 1
    is about token j, which is hidden from queries more than the window away.
    """
    w = {key: x.double() for key, x in weights.items()}
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    eps, theta = config.rms_norm_eps, config.rope_parameters["rope_theta"]
    x = w["model.embed_tokens.weight"][ids]
    B, T, _ = x.shape
    i, j = torch.arange(T)[:, None], torch.arange(T)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        alpha = rms(x, w[f"{at}.self_attn.dms_proj_alpha_norm.weight"], eps)
        bias = w.get(f"{at}.self_attn.dms_proj_alpha.bias")
        logits = F.linear(alpha, w[f"{at}.self_attn.dms_proj_alpha.weight"], bias) * SCALE - OFFSET
        made = (logits > 0).transpose(1, 2)  # [B, K, T], at the token that makes it
        if per == "layer":
            made = made[:, :1].expand(-1, K, -1)
        about = torch.cat([made[..., 1:], torch.zeros_like(made[..., :1])], dim=-1)
        h = rms(x, w[f"{at}.input_layernorm.weight"], eps)
        q, k, v = (
            F.linear(h, w[f"{at}.self_attn.{n}_proj.weight"]).view(B, T, -1, D).transpose(1, 2)
            for n in "qkv"
        )
        q, k = (rms(y, w[f"{at}.self_attn.{n}_norm.weight"], eps) for y, n in ((q, "q"), (k, "k")))
        q, k = rotate(q, theta), rotate(k, theta)
        k, v, hidden = (y.repeat_interleave(H // K, dim=1) for y in (k, v, about))
        mask = (j > i) | (hidden[:, :, None] & (i - j > WINDOW))
        scores = (q @ k.transpose(-1, -2) / D**0.5).masked_fill(mask, float("-inf"))
        out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, -1)
        x = x + F.linear(out, w[f"{at}.self_attn.o_proj.weight"])
        h = rms(x, w[f"{at}.post_attention_layernorm.weight"], eps)
        up = F.linear(h, w[f"{at}.mlp.up_proj.weight"])
        gated = F.silu(F.linear(h, w[f"{at}.mlp.gate_proj.weight"])) * up
        x = x + F.linear(gated, w[f"{at}.mlp.down_proj.weight"])
    x = rms(x, w["model.norm.weight"], eps)
    return F.linear(x, w.get("lm_head.weight", w["model.embed_tokens.weight"]))


@pytest.mark.parametrize(("bias", "per"), [(False, "head"), (True, "head"), (False, "layer")])
@torch.no_grad()
def test_a_checkpoint_of_nvidia_computes_what_their_formulae_say(
    tmp_path: Path, bias: bool, per: str
) -> None:
    weights = write_checkpoint(tmp_path, bias=bias, dms_alpha_per=per)
    model = load(tmp_path)
    ids = tokens(2, LENGTH)
    expected = oracle(weights, model.config, ids, per).float()
    assert distance(model(ids, use_cache=False).logits, expected) < 1e-5
    for split in ([LENGTH], [17] + [1] * (LENGTH - 17)):
        logits, cache = feed(model, ids, split)
        assert distance(logits, expected) < 1e-5
    # The check is worth something only if much is evicted.
    assert kv_stats(cache).resident_tokens < 0.8 * LENGTH


@torch.no_grad()
def test_it_is_then_a_model_like_any_other(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "theirs")
    model = load(tmp_path / "theirs")
    assert model.config.dms_config["decision_shift"] == 1
    assert not hasattr(model.config, "dms_window_size")
    model.save_pretrained(tmp_path / "ours")
    ids = tokens(1, LENGTH)
    expected = model(ids, use_cache=False).logits
    assert torch.equal(load(tmp_path / "ours")(ids, use_cache=False).logits, expected)


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "neurons", dms_separate_alpha=False)
    with pytest.raises(CheckpointError, match="dms_separate_alpha"):
        load(tmp_path / "neurons")
    weights = write_checkpoint(tmp_path / "lost")
    kept = {key: x for key, x in weights.items() if "layers.1.self_attn.dms" not in key}
    save_file(kept, tmp_path / "lost" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="layers.1.self_attn"):
        load(tmp_path / "lost")


@torch.no_grad()
def test_a_checkpoint_that_disables_eviction_evicts_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "theirs", dms_disable_eviction=True)
    ids = tokens(2, LENGTH)
    expected = build("qwen3")(ids, use_cache=False).logits
    model = load(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    for loaded in (model, load(tmp_path / "ours")):
        logits, cache = feed(loaded, ids, [17] + [1] * (LENGTH - 17))
        assert distance(logits, expected) < 1e-5
        assert kv_stats(cache).resident_tokens == LENGTH
        with pytest.raises(CompressionError, match="dms_config.evict=false"):
            set_compression(loaded, 2.0)


def test_transformers_does_not_load_it_without_its_gates(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="dms_proj_alpha.* use modelopt_dms.load"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    names = StoredNames(load(tmp_path))
    assert names.of("model.norm.weight") == "model.norm.weight"


def test_their_own_code_keeps_loading_its_gates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers_modules.theirs", ModuleType("theirs"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path) is not None
