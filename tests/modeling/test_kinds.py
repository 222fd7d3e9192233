# SPDX-License-Identifier: Apache-2.0
"""Which layers get a gate: those whose cache grows without bound and is their own; the reason of others is true."""

from typing import Any

import pytest
import torch
from families import _decoder, distance, eager_copy, feed, open_gates, tokens
from transformers import AutoModelForCausalLM

from modelopt_dms.checkpoints.load import load
from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.gates.gate import eviction_off
from modelopt_dms.kvcache.hf_cache import kv_stats
from modelopt_dms.modeling.convert import UnsupportedModelError, dms_modules, plan_conversion
from modelopt_dms.modeling.mode import apply_dms

LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8}


def model_of(config: str, **fields: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(_decoder(config, **fields)()).eval()


@pytest.mark.parametrize("config", ["Phi3Config", "MistralConfig", "Starcoder2Config"])
@torch.no_grad()
def test_a_window_that_holds_the_longest_sequence_is_full_attention(config: str, tmp_path) -> None:
    plain = model_of(config, sliding_window=512)  # max_position_embeddings is 256
    ids = tokens(2, 24)
    expected = eager_copy(plain)(ids).logits
    model = open_gates(apply_dms(plain, {"window": 5, "scale": 10.0}))
    assert len(dms_modules(model)) == 2
    with eviction_off(model):
        assert distance(model(ids, use_cache=False).logits, expected) < 1e-6
        assert distance(feed(model, ids, [10, 1, 13])[0], expected) < 1e-6
    full = model(ids, use_cache=False).logits
    assert distance(full, expected) > 0.01
    logits, cache = feed(model, ids, [10] + [1] * 14)
    assert distance(logits, full) < 1e-5
    assert kv_stats(cache).resident_tokens < 24
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(ids, use_cache=False).logits, full)


def test_a_window_that_slides_is_bounded() -> None:
    with pytest.raises(UnsupportedModelError, match=r"sliding_attention \(64 tokens\) is bounded"):
        plan_conversion(model_of("Phi3Config", sliding_window=64), DMSConfig())


@pytest.mark.parametrize(
    ("config", "fields", "kind"),
    [
        ("FalconH1Config", {"mamba_d_ssm": 64, **MAMBA}, "hybrid"),
        ("ZayaConfig", {}, "hybrid"),
        (
            "DeepseekV32Config",
            {
                **LATENT,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 16,
                "n_group": 1,
                "topk_group": 1,
                "index_n_heads": 2,
                "index_head_dim": 8,
                "index_topk": 8,
            },
            "indexed_attention",
        ),
    ],
)
def test_a_kind_that_is_not_known_is_not_called_bounded(
    config: str, fields: dict[str, Any], kind: str
) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        plan_conversion(model_of(config, **fields), DMSConfig())
    assert f"layers of kind '{kind}' are not supported" in str(error.value)
    assert "bounded" not in str(error.value)


@torch.no_grad()
def test_only_layers_that_share_keys_and_values_are_left_alone() -> None:
    kinds = ["full_attention", "sliding_attention"] * 2 + ["sliding_attention", "full_attention"]
    plain = model_of(
        "Gemma4TextConfig",
        num_hidden_layers=6,
        layer_types=kinds,
        num_kv_shared_layers=2,
        sliding_window=6,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64,
    )
    ids = tokens(2, 24)
    expected = eager_copy(plain)(ids, use_cache=False).logits
    plan, left_alone = plan_conversion(plain, DMSConfig())
    assert [x.split(".")[2] for x in plan] == ["0"]
    assert "read by other layers" in left_alone["model.layers.2.self_attn"]
    assert "bounded" in left_alone["model.layers.4.self_attn"]
    assert "another layer's" in left_alone["model.layers.5.self_attn"]
    model = open_gates(apply_dms(plain, {"window": 5, "scale": 10.0}))
    # Random per-layer embeddings amplify rounding: eager attention with and without a cache differ by 4e-5.
    with eviction_off(model):
        assert distance(feed(model, ids, [10] + [1] * 14)[0], expected) < 1e-4
    full = model(ids, use_cache=False).logits
    assert distance(full, expected) > 0.01
    assert distance(feed(model, ids, [10] + [1] * 14)[0], full) < 1e-4
