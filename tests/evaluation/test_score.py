# SPDX-License-Identifier: Apache-2.0
"""Scores are what generation would do, and peers hold exactly what they may."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from paths import EMBEDDED
from scripts import load
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from modelopt_dms.evaluation import peers, score
from modelopt_dms.evaluation.measure import measure
from modelopt_dms.evaluation.report import results_table
from modelopt_dms.evaluation.tasks import Episode, Question, make_episodes
from modelopt_dms.gates.gate import gates
from modelopt_dms.kvcache.hf_cache import kv_stats
from modelopt_dms.modeling.mode import apply_dms

MODEL = EMBEDDED
WINDOW = 16


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL)


def random_model(vocabulary: int) -> Any:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        # Large enough for attention to prefer some tokens: forgetting them must show.
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def plain(tokenizer: PreTrainedTokenizerBase) -> Any:
    return random_model(len(tokenizer))


@pytest.fixture(scope="module")
def forgetful(plain: Any) -> Any:
    """Gates that evict about half of the tokens, by what the tokens are."""
    model = apply_dms(copy.deepcopy(plain), {"window": WINDOW, "scale": 1.0, "offset": 0.0})
    generator = torch.Generator().manual_seed(1)
    for gate in gates(model):
        gate.weight.data = torch.randn(gate.weight.shape, generator=generator)
    return model


def asked(context: list[int], turns: list[tuple[list[int], list[int]]]) -> Episode:
    return Episode("recall", context, [Question(*turn) for turn in turns])


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    tensor = torch.tensor([ids])
    out = model.generate(tensor, attention_mask=torch.ones_like(tensor), max_new_tokens=count,
                         min_new_tokens=count, do_sample=False, pad_token_id=0)  # fmt: skip
    return out[0, len(ids) :].tolist()


def test_a_question_counts_exactly_if_greedy_generation_gives_its_answer(forgetful: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    episodes, expected = [], 0
    for index in range(6):
        context = torch.randint(3, 1000, (80 + index % 2,), generator=generator).tolist()
        conversation, turns = list(context), []
        for turn in range(4):
            prompt = torch.randint(3, 1000, (2 + index % 3,), generator=generator).tolist()
            answer = greedy(forgetful, conversation + prompt, 3)
            if turn % 2:
                # Wrong in its last token only.
                answer[-1] = (answer[-1] + 1) % 1000
            expected += 1 - turn % 2
            turns.append((prompt, answer))
            conversation += prompt + answer
        episodes.append(asked(context, turns))
    for batch_size, chunk in ((1, 512), (4, 512), (4, 33)):
        found = score.score_task(forgetful, episodes, batch_size, chunk)
        assert found.count == 24
        assert found.value == expected / 24


def test_an_answer_without_a_prompt_is_judged_by_what_the_context_predicts(forgetful: Any) -> None:
    context = list(range(5, 105))
    answer = greedy(forgetful, context, 2)
    assert score.score_task(forgetful, [asked(context, [([], answer)])]).value == 1.0
    wrong = [answer[0] + 1, answer[1]]
    assert score.score_task(forgetful, [asked(context, [([], wrong)])]).value == 0.0


def test_perplexity_through_the_cache_is_that_of_a_full_forward(forgetful: Any, plain: Any) -> None:
    ids = torch.randint(1000, (3, 150), generator=torch.Generator().manual_seed(3))
    for model in (forgetful, plain):
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        for batch_size, chunk in ((3, 64), (2, 1), (1, 500)):
            found = score.perplexity(model, ids.tolist(), batch_size, chunk)
            assert found.value == pytest.approx(math.exp(loss), rel=1e-4)
            assert found.count == 3 * 149


def test_a_plain_model_is_scored_with_its_dense_cache(
    plain: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [measure(plain, tokenizer, task, 128, 2, 0).row() for task in ("recall", "text")]
    assert [row["metric"] for row in rows] == ["accuracy", "perplexity"]
    row_bytes = 2 * 2 * 2 * 8 * 4  # layers, heads, key and value, head dim, float32
    for row in rows:
        assert row["compression_ratio"] == 1.0
        assert row["resident_tokens"] == row["context_tokens"]
        assert row["kv_bytes"] == row_bytes * row["context_tokens"]


def test_the_converted_model_with_eviction_off_scores_as_the_plain_one(
    plain: Any, forgetful: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    full = measure(peers.full_cache(forgetful), tokenizer, "text", 128, 2, 0)
    before = measure(plain, tokenizer, "text", 128, 2, 0)
    assert full.value == pytest.approx(before.value, rel=1e-5)
    assert full.end.compression_ratio == 1.0


def test_unknown_tasks_and_empty_requests_are_refused(
    plain: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match="recal.*must be among"):
        measure(plain, tokenizer, "recal", 128, 1, 0)
    with pytest.raises(ValueError, match="no samples"):
        measure(plain, tokenizer, "recall", 128, 0, 0)
    with pytest.raises(ValueError, match="one length"):
        score.perplexity(plain, [[1, 2, 3], [1, 2]])
    with pytest.raises(ValueError, match="no samples"):
        score.score_task(plain, [])


@pytest.mark.parametrize("budget", [24, 60.4])
def test_a_sliding_window_holds_its_budget_and_the_sinks(forgetful: Any, budget: float) -> None:
    peer = peers.sliding_window(forgetful, budget, sinks=4)
    ids = torch.randint(1000, (2, 100), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        cache = peer(input_ids=ids, use_cache=True).past_key_values
        for _ in range(3):
            cache = peer(
                input_ids=ids[:, :1], past_key_values=cache, use_cache=True
            ).past_key_values
    assert all((layer.resident == round(budget)).all() for layer in kv_stats(cache).layers)
    # The first layer's keys depend on their own token only.
    dense = random_like(peer, ids)
    for sequence in range(2):
        held = cache.layers[0].rows(2 * sequence)[0]
        assert all(torch.isclose(held, key, atol=1e-5).all(-1).any() for key in dense[sequence, :4])
        assert not torch.isclose(held, dense[sequence, 5], atol=1e-5).all(-1).any()


def random_like(peer: Any, ids: torch.Tensor) -> torch.Tensor:
    """Keys [B, T, D] of head 0 of the first layer in a cache that keeps everything."""
    with torch.no_grad():
        cache = peers.full_cache(peer)(input_ids=ids, use_cache=True).past_key_values
    return torch.stack([cache.layers[0].rows(2 * b)[0] for b in range(len(ids))])


def test_random_decisions_do_not_depend_on_how_the_text_is_cut(forgetful: Any) -> None:
    gate = gates(peers.random_eviction(forgetful, 0.6, seed=5))[1]
    hidden = torch.zeros(2, 300, 32)
    positions = torch.arange(300)[None]
    whole = gate.decide(hidden, positions)
    parts = [gate.decide(hidden[:, a:b], positions[:, a:b]) for a, b in ((0, 7), (7, 8), (8, 300))]
    assert torch.equal(whole, torch.cat(parts, dim=-1))
    assert whole.shape == (2, 2, 300)


def test_random_decisions_differ_by_layer_head_and_seed_and_have_the_asked_rate(
    forgetful: Any,
) -> None:
    hidden, positions = torch.zeros(1, 20_000, 32), torch.arange(20_000)[None]
    draws = [
        gate.decide(hidden, positions)[0]
        for seed in (0, 1)
        for gate in gates(peers.random_eviction(forgetful, 0.7, seed))
    ]
    heads = torch.cat(draws).double()  # [2 seeds * 2 layers * 2 heads, T]
    assert ((heads.mean(-1) - 0.7).abs() < 0.015).all()
    correlation = torch.corrcoef(heads) - torch.eye(len(heads))
    assert correlation.abs().max() < 0.04
    neighbours = torch.corrcoef(torch.stack([heads[0, 1:], heads[0, :-1]]))[0, 1]
    assert abs(neighbours) < 0.03


def test_the_fraction_for_a_budget_gives_that_budget(forgetful: Any) -> None:
    ids = torch.randint(1000, (1, 1000), generator=torch.Generator().manual_seed(6))
    peer = peers.random_eviction(forgetful, peers.fraction_for_budget(250, 1000, WINDOW))
    with torch.no_grad():
        cache = peer(input_ids=ids, use_cache=True).past_key_values
    assert kv_stats(cache).resident_tokens == pytest.approx(250, rel=0.08)
    assert peers.fraction_for_budget(1000, 1000, WINDOW) == 0.0
    assert peers.fraction_for_budget(10, 1000, WINDOW) == 1.0
    assert peers.fraction_for_budget(10, 10, WINDOW) == 0.0


def test_peers_leave_the_model_alone(forgetful: Any) -> None:
    before = {name: x.clone() for name, x in forgetful.state_dict().items()}
    ids = torch.tensor([list(range(60))])
    with torch.no_grad():
        wanted = forgetful(input_ids=ids).logits
        for peer in (
            peers.full_cache(forgetful),
            peers.sliding_window(forgetful, 30),
            peers.random_eviction(forgetful, 0.5),
        ):
            assert not torch.allclose(peer(input_ids=ids).logits, wanted)
        assert torch.equal(forgetful(input_ids=ids).logits, wanted)
    assert all(torch.equal(x, before[name]) for name, x in forgetful.state_dict().items())


def test_impossible_peers_are_refused(forgetful: Any) -> None:
    with pytest.raises(ValueError, match="resident_budget=5 must be at least"):
        peers.sliding_window(forgetful, 5)
    with pytest.raises(ValueError, match="evicted_fraction=1.5"):
        peers.random_eviction(forgetful, 1.5)


def test_a_trace_ends_with_what_the_cache_holds(forgetful: Any) -> None:
    ids = list(range(3, 93))
    trace = load("examples/live_length.py").trace_resident_length(
        forgetful, ids, context=80, chunk=16
    )
    assert trace.seen == [0, 16, 32, 48, 64, 80, *range(81, 91)]
    assert trace.live.shape == (16, 2, 2)
    with torch.no_grad():
        cache = forgetful(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    held = torch.stack([layer.resident[0] for layer in kv_stats(cache).layers])
    assert torch.equal(trace.live[-1], held)


def test_a_table_shows_rows_with_and_without_a_method(
    plain: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    row = measure(plain, tokenizer, "recall", 128, 1, 0).row()
    rows = [{"task": "recall", "length": 128, **row}]
    assert len(results_table(rows).columns) == 7
    assert len(results_table([{"method": "full", **row} for row in rows]).columns) == 8


def test_batches_hold_conversations_of_equal_lengths_only(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    episodes = [
        episode
        for length in (128, 256)
        for episode in make_episodes("tracking", tokenizer, length, 6, seed=0)
    ]
    batches = list(score.batches_of(episodes, 3))
    assert sum(map(len, batches)) == 12
    for batch in batches:
        assert len(batch) <= 3
        assert len({len(x.context_ids) for x in batch}) == 1
        assert len({len(score._conversation(x)) for x in batch}) == 1
