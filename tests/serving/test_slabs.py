# SPDX-License-Identifier: Apache-2.0
"""KV rows in slabs: the attention of ragged requests equals the mask over whole sequences, whatever the blocks are."""

import pytest
import torch
from slab_bench import BLOCKS, HEADS, LAYERS, SCORING, Bench

from modelopt_dms.kernels.layout import PAGE, OutOfPagesError
from modelopt_dms.kernels.number_formats import Fp8
from modelopt_dms.serving.vllm.slabs import Grant, Rules


@pytest.mark.parametrize("shift", [0, 1])
def test_ragged_requests_attend_as_under_the_mask_of_the_whole_sequence(shift: int) -> None:
    bench = Bench(Rules(window=20, shift=shift, protect_first=2), evicted=0.8)
    for seed, name in enumerate("abc"):
        bench.arrive(name, 700, seed)
    for sizes in ({"a": 200}, {"b": 333, "a": 1}, {"a": 150, "b": 1, "c": 1}, {"c": 90}):
        bench.step(sizes)
    for _ in range(150):
        bench.step(dict.fromkeys("abc", 1))
    assert max(bench.error(x) for x in "abc") < 1e-5
    dense = sum(-(-x // PAGE) for x in bench.seen.values())
    held = sum(map(len, bench.blocks.values()))
    assert held <= 0.5 * dense
    assert held + len(bench.free) == BLOCKS


def test_rows_in_fp8_are_attended_to_as_they_are_stored() -> None:
    rules, form = Rules(window=20, shift=0, protect_first=2), Fp8(torch.tensor([448.0]))
    bench = Bench(rules, evicted=0.8, form=form)
    bench.arrive("a", 300, seed=1)
    for size in (150, 1, 40, *[1] * 30):
        bench.step({"a": size})
    bench.step({"a": 1}, {"a": (5, 2)})
    bench.step({"a": 1})
    assert bench.error("a") > 1e-3
    for layer in bench.tokens["a"]:
        for x in (layer.k, layer.v):  # what attention under the mask reads from now on
            x.copy_(x.to(torch.float8_e4m3fn))
    assert bench.error("a") < 1e-5


def test_a_capped_request_loses_its_oldest_unprotected_tokens() -> None:
    rules, limit = Rules(window=20, shift=0, protect_first=3), 3
    bench = Bench(rules, evicted=0.0, limit=limit)
    bench.arrive("a", 700, seed=5)
    for size in (150, 260, *[1] * 100):
        bench.step({"a": size})
        assert len(bench.blocks["a"]) <= limit
    _, seen, usage = bench.slabs.usage("a")
    assert usage.pages <= limit * LAYERS * HEADS
    assert usage.forced > 0
    live = bench.slabs.live[0]
    for layer in range(LAYERS):
        for head in range(HEADS):
            tokens = torch.arange(int(live[layer, head]))
            pages = bench.slabs.table[0, layer, head, tokens // PAGE].long()
            held = bench.slabs.positions[pages, tokens % PAGE].sort().values.tolist()
            newest = len(held) - rules.protect_first
            assert held == [0, 1, 2, *range(seen - newest, seen)]
            assert newest > rules.window


def test_a_slab_that_is_too_small_is_an_error_where_lists_must_not_be_cut() -> None:
    bench = Bench(Rules(window=20, shift=0, protect_first=0), evicted=0.0)
    bench.arrive("a", 700, seed=6)
    bench.slabs.update({"a": Grant(epoch=1, blocks=(1,))}, [], {})
    with pytest.raises(OutOfPagesError, match="the 1 blocks of a request are used up"):
        bench.slabs.chunk(0, "a", bench.tokens["a"][0][slice(300)], SCORING)


def test_rows_of_a_request_that_left_are_free_for_the_next() -> None:
    bench = Bench(Rules(window=20, shift=0, protect_first=0), evicted=0.5)
    for life in range(6):
        name = f"r{life}"
        bench.arrive(name, 100, seed=life)
        bench.step({name: 70})
        bench.step({name: 1})
        assert bench.error(name) < 1e-5
        bench.ledger.close(name)
        bench.free += bench.blocks.pop(name)
        del bench.seen[name]
        bench.slabs.update({}, [name], {})
    assert len(bench.free) == BLOCKS and not bench.slabs.held
