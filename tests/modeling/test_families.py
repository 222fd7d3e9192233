# SPDX-License-Identifier: Apache-2.0
"""Every supported family: the mask means the same in every path, and nothing is lost on disk."""

from pathlib import Path
from typing import Any

import modelopt.torch.opt as mto
import pytest
import torch
from families import (
    FAMILIES,
    HYBRID,
    LATENT,
    SLIDING_WINDOW,
    WINDOW,
    build,
    build_dms,
    distance,
    eager_copy,
    feed,
    frozen_base,
    greedy_without_cache,
    open_gates,
    results_in_a_fresh_process,
    tokens,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import AttentionInterface

from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.gates.gate import eviction_off, record_alpha, set_relaxation
from modelopt_dms.kvcache.hf_cache import DMSLayer, kv_stats
from modelopt_dms.modeling.convert import dms_modules, plan_conversion
from modelopt_dms.modeling.mode import apply_dms

LENGTH = 24
SPLITS = [[24], [1] * 24, [10, 1, 1, 8, 4], [3, 21], [23, 1]]

LOAD_IN_A_FRESH_PROCESS = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from modelopt_dms.checkpoints.load import load

for path in map(Path, sys.argv[1:]):
    expected = load_file(path / "expected" / "logits.safetensors")
    model = load(path)
    with torch.no_grad():
        logits = model(expected["ids"], use_cache=False).logits
    print("RESULT", json.dumps([path.name, torch.equal(logits, expected["logits"])]))
"""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> PreTrainedModel:
    """Shared by this file's tests of one family; a test leaves it as it was."""
    return build_dms(family)


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return tokens(2, LENGTH)


@pytest.fixture(scope="module")
def full(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits of the whole sequence at once under the hard mask, without a cache."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def formula_attention(decisions: dict[int, Tensor]) -> Any:
    """Eager attention in float64 with ALGORITHM's mask: score += -inf where evicted and older than the window."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        assert attention_mask is None  # no mask function is registered for this attention
        H, T = query.shape[1:3]
        key, value = (x.double().repeat_interleave(H // x.shape[1], dim=1) for x in (key, value))
        scores = query.double() @ key.transpose(-1, -2) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        i, j = torch.arange(T)[:, None], torch.arange(T)
        hidden = j > i
        if module.layer_idx in decisions:
            evicted = decisions[module.layer_idx]  # [B, K, T]
            evicted = evicted.repeat_interleave(H // evicted.shape[1], dim=1)
            hidden = hidden | ((i - j > WINDOW) & evicted[:, :, None, :])
        else:
            assert module.config.layer_types[module.layer_idx] == "sliding_attention"
            hidden = hidden | (i - j >= SLIDING_WINDOW)
        scores = scores.masked_fill(hidden, float("-inf"))
        if s_aux is not None:
            sink = s_aux.double()[None, :, None, None].expand(len(scores), -1, T, 1)
            scores = torch.cat([scores, sink], dim=-1)
        out = scores.softmax(-1)[..., :T] @ value
        return out.transpose(1, 2).to(query.dtype), None

    return attention


@torch.no_grad()
def test_eviction_off_equals_the_untouched_eager_model(family: str, ids: Tensor) -> None:
    untouched = build(family)
    expected = eager_copy(untouched)(ids, use_cache=False).logits
    model = open_gates(apply_dms(untouched, {"window": WINDOW, "scale": 10.0}))
    with eviction_off(model):
        assert distance(model(ids, use_cache=False).logits, expected) < 1e-6
        assert distance(model(ids, use_cache=True).logits, expected) < 1e-6
        chunked, cache = feed(model, ids, [10, 1, 9, 4])
    assert distance(chunked, expected) < 1e-6
    assert kv_stats(cache).resident_tokens == LENGTH


@torch.no_grad()
def test_a_new_gate_evicts_nothing(family: str, ids: Tensor) -> None:
    untouched = build(family)
    expected = eager_copy(untouched)(ids, use_cache=False).logits
    model = apply_dms(untouched, {"window": 1})
    assert distance(model(ids, use_cache=False).logits, expected) < 1e-6


@torch.no_grad()
def test_gates_mark_about_half_and_it_shows(
    model: PreTrainedModel, ids: Tensor, full: Tensor
) -> None:
    with record_alpha(model) as record, eviction_off(model):
        untouched = model(ids, use_cache=False).logits
    assert not record.hard
    with record_alpha(model) as record:
        model(ids, use_cache=False)
    for evict in record.hard.values():
        assert 0.2 < evict.float().mean() < 0.8
    assert distance(full, untouched) > 0.1
    # What is marked stays readable within the window.
    assert distance(full[:, : WINDOW + 1], untouched[:, : WINDOW + 1]) < 1e-6


@torch.no_grad()
def test_full_forward_equals_the_formula_in_float64(
    family: str, model: PreTrainedModel, ids: Tensor, full: Tensor
) -> None:
    with record_alpha(model) as record:
        model(ids, use_cache=False)
    AttentionInterface.register("formula", formula_attention(record.hard))
    untouched = build(family)
    untouched.set_attn_implementation("formula")
    assert distance(full, untouched(ids, use_cache=False).logits) < 1e-6


@pytest.mark.parametrize("split", SPLITS, ids=["whole", "decode", "mixed", "short-first", "last"])
@torch.no_grad()
def test_every_way_of_feeding_the_cache_equals_the_full_forward(
    model: PreTrainedModel, ids: Tensor, full: Tensor, split: list[int]
) -> None:
    logits, cache = feed(model, ids, split)
    assert distance(logits, full) < 1e-5
    layers = [layer for layer in cache.layers if isinstance(layer, DMSLayer)]
    assert len(layers) == len(dms_modules(model))
    for layer in layers:
        layer.slots.check_integrity()


@torch.no_grad()
def test_live_length_is_what_the_decisions_say(
    model: PreTrainedModel, ids: Tensor, family: str
) -> None:
    with record_alpha(model) as record:
        model(ids, use_cache=False)
    _, cache = feed(model, ids, [7] + [1] * (LENGTH - 7))
    for stats in kv_stats(cache).layers:
        outside = ~record.hard[stats.layer_idx][..., : LENGTH - WINDOW - 1]
        expected = outside.sum(-1) + WINDOW + 1
        assert torch.equal(stats.resident, expected.expand_as(stats.resident))
        assert stats.context.tolist() == [LENGTH] * 2
    if family in LATENT:
        assert {x.shape[1] for x in record.hard.values()} == {1}


def test_gradients_reach_only_the_gates(model: PreTrainedModel, ids: Tensor) -> None:
    model.train()
    set_relaxation(model, 3, tau=1.0)
    with frozen_base(model) as gates:
        model(ids, use_cache=False).logits.square().mean().backward()
        assert len(gates) == len(dms_modules(model))
        for weight in gates:
            assert weight.grad is not None
            assert bool(weight.grad.isfinite().all())
            assert bool((weight.grad != 0).any(-1).all()), "a head's gate got no gradient"
        assert all(x.grad is None for x in model.parameters() if not x.requires_grad)
    model.eval()


@torch.no_grad()
def test_generate_equals_recomputing_every_step_from_scratch(
    model: PreTrainedModel, ids: Tensor
) -> None:
    prompt = ids[:, :12]
    attention_mask = torch.ones_like(prompt)
    generated = model.generate(prompt, attention_mask=attention_mask, max_new_tokens=10)
    assert torch.equal(generated, greedy_without_cache(model, prompt, 10))


@torch.no_grad()
def test_modelopt_save_and_restore_is_bit_exact(
    family: str, model: PreTrainedModel, ids: Tensor, full: Tensor, tmp_path: Path
) -> None:
    mto.save(model, tmp_path / "model.pt")
    restored = mto.restore(build(family, seed=7), tmp_path / "model.pt")
    assert torch.equal(restored.eval()(ids, use_cache=False).logits, full)


def test_sliding_layers_are_left_alone_and_listed(family: str) -> None:
    model = build(family)
    before = {name: type(x) for name, x in model.named_modules()}
    plan, left_alone = plan_conversion(model, DMSConfig())
    assert {name: type(x) for name, x in model.named_modules()} == before
    expected = ["model.layers.0.self_attn"] if family in HYBRID else []
    assert list(left_alone) == expected
    assert all("sliding_attention" in reason for reason in left_alone.values())
    apply_dms(model, DMSConfig())
    assert list(dms_modules(model)) == list(plan)
    assert len(plan) == 2 - len(expected)
    assert all(type(model.get_submodule(name)) is before[name] for name in left_alone)


# The quantized ones of tests/quantization/test_quantization.py cover all families.
@pytest.mark.parametrize(
    "families",
    [["llama", "gpt_oss", "deepseek_v3"], pytest.param([*FAMILIES], marks=pytest.mark.slow)],
    ids=["some", "all"],
)
@torch.no_grad()
def test_families_load_bit_exactly_in_a_fresh_process(families: list[str], tmp_path: Path) -> None:
    ids = tokens(2, LENGTH)
    for family in families:
        model = build_dms(family)
        model.save_pretrained(tmp_path / family)
        logits = model(ids, use_cache=False).logits
        (tmp_path / family / "expected").mkdir()
        save_file(
            {"ids": ids, "logits": logits}, tmp_path / family / "expected" / "logits.safetensors"
        )
    found = results_in_a_fresh_process(LOAD_IN_A_FRESH_PROCESS, [tmp_path / x for x in families])
    assert found == dict.fromkeys(families, True)
