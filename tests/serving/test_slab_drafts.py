# SPDX-License-Identifier: Apache-2.0
"""Drafts in slabs: what is rejected leaves no trace, not even in what was evicted meanwhile."""

import random

import pytest
import torch
from slab_bench import BLOCKS, HEADS, LAYERS, Bench

from modelopt_dms.serving.vllm.drafts import Step
from modelopt_dms.serving.vllm.slab_tables import Rules


def begun(rules: Rules, evicted: float, limit: int) -> Bench:
    """Three ragged requests."""
    bench = Bench(rules, evicted, limit)
    for i, name in enumerate("abc"):
        bench.arrive(name, 700, i)
    for sizes in ({"a": 200}, {"b": 90, "a": 1}, {"c": 1}):
        bench.step(sizes)
    return bench


def decode_with_drafts(bench: Bench, seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(70):
        drafts = {}
        for name in chance.sample("abc", chance.randint(1, 3)):
            tokens = chance.randint(0, 7)
            drafts[name] = (tokens, chance.randint(0, tokens))
        bench.step(dict.fromkeys(drafts, 1), drafts)


@pytest.mark.parametrize("shift", [0, 1])
def test_rejected_drafts_leave_the_attention_of_the_whole_sequence(shift: int) -> None:
    rules = Rules(window=20, shift=shift, protect_first=2)
    with_drafts, without = (begun(rules, 0.8, BLOCKS) for _ in range(2))
    decode_with_drafts(with_drafts, seed=shift)
    for name in "abc":
        while without.seen[name] < with_drafts.seen[name]:
            without.step({name: 1})
    assert min(with_drafts.seen.values()) > 100
    assert max(with_drafts.error(x) for x in "abc") < 1e-5
    with_drafts.step(dict.fromkeys("abc", 1))
    without.step(dict.fromkeys("abc", 1))
    for name in "abc":
        ours, theirs = (x.slabs.held[name].row for x in (with_drafts, without))
        lengths = [
            x.slabs.tables.live[:, row] for x, row in ((with_drafts, ours), (without, theirs))
        ]
        assert torch.equal(*lengths)
        assert with_drafts.positions(name) == without.positions(name)


@pytest.mark.parametrize("limit", [3, 4])
def test_capped_requests_take_in_drafts_and_keep_what_must_stay(limit: int) -> None:
    rules = Rules(window=20, shift=0, protect_first=3)
    bench = begun(rules, 0.1, limit)
    decode_with_drafts(bench, seed=limit)
    assert max(len(x) for x in bench.blocks.values()) <= limit
    assert bench.slabs.usage(["a"])["a"][2].forced > 0
    bench.step(dict.fromkeys("abc", 1))
    bench.slabs.check_integrity()
    for name in "abc":
        seen = bench.seen[name]
        for held in bench.positions(name):
            assert {0, 1, 2, *range(seen - rules.window, seen)} <= set(held)
            assert len(set(held)) == len(held) and max(held) == seen - 1


@pytest.mark.parametrize("shift", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_kernels_take_in_drafts_and_leave_no_trace_of_what_is_rejected(shift: int) -> None:
    bench = Bench(Rules(window=4, shift=shift, protect_first=2), evicted=0.7, impl="triton")
    for i, name in enumerate("ab"):
        bench.arrive(name, 200, i)
    bench.step({"a": 61, "b": 8})
    for drafts in ({"a": (3, 1), "b": (0, 0)}, {"b": (2, 2)}):
        bench.step(dict.fromkeys(drafts, 1), drafts)
    bench.step({"a": 1, "b": 1})
    assert max(bench.error(x) for x in "ab") < 1e-5
    for name in "ab":
        newest = range(bench.seen[name] - 5, bench.seen[name])
        assert all({0, 1, *newest} <= set(held) for held in bench.positions(name))


def test_a_draft_outlives_steps_that_its_request_gets_no_token_in() -> None:
    bench = Bench(Rules(window=4, shift=1, protect_first=0), evicted=0.7)
    for i, name in enumerate("abc"):
        bench.arrive(name, 200, i)
    bench.step({"a": 30})
    bench.step({"a": 1, "b": 61}, {"a": (6, 2)})
    bench.step({"b": 1}, {"b": (4, 1)})  # logs of more rows than before
    bench.step({"c": 9, "b": 1})
    bench.step({"c": 1}, {"c": (7, 0)})
    bench.step(dict.fromkeys("abc", 1), {"a": (3, 3)})
    bench.step(dict.fromkeys("abc", 1))
    assert max(bench.error(x) for x in "abc") < 1e-5


def test_what_a_draft_may_take_is_reported_as_it_was_before_it() -> None:
    bench = Bench(Rules(window=5, shift=0, protect_first=0), evicted=0.0)
    bench.arrive("a", 300, seed=0)
    bench.step({"a": 62})
    bench.step({"a": 1}, {"a": (6, 0)})
    _, seen, usage = bench.slabs.usage(["a"])["a"]
    assert (seen, usage.pages) == (63, LAYERS * HEADS)
    assert (
        int(bench.slabs.tables.live.max()) == 69
    )  # the draft lies in pages of its own, which it gives back
    assert len(bench.blocks["a"]) == 2
    bench.step({"a": 1})
    assert int(bench.slabs.tables.live.max()) == 64
    bench.slabs.check_integrity()


def test_a_scheduler_that_takes_back_more_than_a_draft_is_an_error() -> None:
    bench = Bench(Rules(window=5, shift=0, protect_first=0), evicted=0.0)
    bench.arrive("a", 300, seed=0)
    bench.step({"a": 62})
    bench.step({"a": 1}, {"a": (2, 0)})
    with pytest.raises(
        RuntimeError, match="counts 62 tokens of a request whose lists have seen 65, 2"
    ):
        bench.slabs.update({}, [], {"a": Step(62)})
