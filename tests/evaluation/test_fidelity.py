# SPDX-License-Identifier: Apache-2.0
"""A model's distance from itself with eviction off is measured as its physical cache would have it."""

import copy
import math
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from modelopt_dms.evaluation import fidelity as measured
from modelopt_dms.evaluation.fidelity import compare, fidelity, full_hidden, summarize
from modelopt_dms.gates.gate import eviction_off, gates
from modelopt_dms.kvcache.hf_cache import kv_stats
from modelopt_dms.modeling.mode import apply_dms

WINDOW = 16
VOCABULARY = 500


def model_of(shift: int, trained: bool) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=8, initializer_range=0.2,
                         tie_word_embeddings=True)  # fmt: skip
    facts = {"window": WINDOW, "decision_shift": shift, "protect_first": 3}
    settings = facts | ({"scale": 1.0, "offset": 0.0} if trained else {})
    model = apply_dms(Qwen3ForCausalLM(config).eval(), settings)
    if trained:
        generator = torch.Generator().manual_seed(1)
        for gate in gates(model):
            gate.weight.data = torch.randn(gate.weight.shape, generator=generator)
    return model


def texts(count: int = 2, length: int = 150) -> list[list[int]]:
    return torch.randint(
        VOCABULARY, (count, length), generator=torch.Generator().manual_seed(3)
    ).tolist()


def test_a_gate_that_evicts_nothing_is_a_rounding_away() -> None:
    found = fidelity(model_of(0, trained=False), {"random": texts()})["random"]
    # Not exactly 0: with eviction off attention is another kernel, which sums in another order.
    assert 0.0 <= found.kl <= found.kl_p95 <= found.kl_p99 <= found.kl_max < 1e-6
    assert found.top1 == found.compression_ratio == 1.0
    assert found.perplexity == pytest.approx(found.perplexity_full, rel=1e-6)


@pytest.mark.parametrize("shift", [0, 1])
def test_it_is_what_token_by_token_decoding_on_the_physical_cache_gives(shift: bool) -> None:
    model = model_of(shift, trained=True)
    (ids,) = texts(1, 90)
    logits: dict[bool, torch.Tensor] = {}
    for off in (True, False):
        cache: Any = None
        rows = []
        with torch.no_grad(), eviction_off(model) if off else torch.no_grad():
            for token in ids:
                out = model(
                    input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True
                )
                cache = out.past_key_values
                rows.append(out.logits[0, -1])
        logits[off] = torch.stack(rows).double().log_softmax(-1)
    p, q = logits[True], logits[False]
    kl = (p.exp() * (p - q)).sum(-1)
    found = compare(model, ids, full_hidden(model, ids))
    torch.testing.assert_close(found.kl.double(), kl, atol=1e-5, rtol=1e-4)
    assert found.kl.max() > 1e-3  # eviction shows
    assert found.same.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    targets = torch.tensor(ids[1:])[:, None]
    torch.testing.assert_close(
        found.nll.double(), -q[:-1].gather(1, targets)[:, 0], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        found.nll_full.double(), -p[:-1].gather(1, targets)[:, 0], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("shift", [0, 1])
def test_the_compression_ratio_is_that_of_the_cache_at_any_length(shift: bool) -> None:
    model = model_of(shift, trained=True)
    (ids,) = texts(1)
    found = compare(model, ids, full_hidden(model, ids))
    for length in (10, WINDOW + 1, 70, len(ids)):
        with torch.no_grad():
            cache = model(input_ids=torch.tensor([ids[:length]]), use_cache=True).past_key_values
        stats = kv_stats(cache)
        assert found.resident_tokens(length) == pytest.approx(stats.resident_tokens, rel=1e-12)
        assert length / found.resident_tokens(length) == pytest.approx(
            stats.compression_ratio, rel=1e-6
        )
    assert summarize([found]).compression_ratio > 1.1


def test_chunks_and_categories_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(0, trained=True)
    whole = fidelity(model, {"a": texts()})["a"]
    monkeypatch.setattr(measured, "CHUNK", 37)
    parts = fidelity(model, {"a": texts()[:1], "b": texts()[1:]})
    assert whole.tokens == sum(x.tokens for x in parts.values()) == 300
    assert whole.kl == pytest.approx(sum(x.kl for x in parts.values()) / 2, rel=1e-5)
    assert whole.kl_max == pytest.approx(max(x.kl_max for x in parts.values()), rel=1e-5)
    assert whole.top1 == pytest.approx(sum(x.top1 for x in parts.values()) / 2)
    assert math.log(whole.perplexity) == pytest.approx(
        sum(math.log(x.perplexity) for x in parts.values()) / 2, rel=1e-6
    )
    assert whole.compression_ratios == tuple(x.compression_ratio for x in parts.values())


def test_the_model_is_left_as_it_was() -> None:
    model = model_of(0, trained=True)
    before = copy.deepcopy(model.state_dict())
    fidelity(model, {"a": texts(1)})
    assert all(gate.enabled and gate.record is None for gate in gates(model))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="no samples"):
        summarize([])
