# SPDX-License-Identifier: Apache-2.0
"""KV rows in slabs: the attention of ragged requests equals the mask over whole sequences, whatever the blocks are."""

from typing import Any

import pytest
import torch
from slab_bench import BLOCKS, HEADS, LAYERS, Bench
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from modelopt_dms.kernels import dispatch
from modelopt_dms.kernels.layout import PAGE, OutOfPagesError, PageTables
from modelopt_dms.kernels.number_formats import Fp8
from modelopt_dms.serving.vllm.drafts import Step
from modelopt_dms.serving.vllm.slab_pages import SlabPages
from modelopt_dms.serving.vllm.slab_tables import Rules
from modelopt_dms.serving.vllm.slabs import Grant


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


@pytest.mark.parametrize("shift", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_kernels_attend_as_under_the_mask_of_the_whole_sequence(shift: int) -> None:
    bench = Bench(Rules(window=4, shift=shift, protect_first=2), evicted=0.7, impl="triton")
    for seed, name in enumerate("abc"):
        bench.arrive(name, 200, seed)
    for sizes in (
        {"c": 3},
        {"a": 66},
        {"b": 7, "a": 1},
        {"b": 1, "c": 1},
        {"a": 5},
        {"a": 1, "c": 1},
    ):
        bench.step(sizes)
    assert max(bench.error(x) for x in "abc") < 1e-5


@pytest.mark.slow
def test_kernels_attend_to_rows_in_fp8_as_they_are_stored() -> None:
    rules, form = Rules(window=4, shift=0, protect_first=2), Fp8(torch.tensor([448.0]))
    bench = Bench(rules, evicted=0.7, form=form, impl="triton")
    bench.arrive("a", 200, seed=1)
    for size in (70, 1, 10, 1, 1):
        bench.step({"a": size})
    assert bench.error("a") > 1e-3
    for layer in bench.tokens["a"]:
        for x in (layer.k, layer.v):
            x.copy_(x.to(torch.float8_e4m3fn))
    assert bench.error("a") < 1e-5


@pytest.mark.slow
def test_kernels_read_what_is_left_of_a_capped_request() -> None:
    found = []
    for impl in ("reference", "triton"):
        rules = Rules(window=4, shift=0, protect_first=3)
        bench = Bench(rules, evicted=0.1, limit=2, impl=impl)
        bench.arrive("a", 300, seed=5)
        for size in (150, *[1] * 20):
            bench.step({"a": size})
        assert bench.slabs.usage(["a"])["a"][2].forced > 0
        found.append((torch.cat(bench.outs["a"][1]), bench.positions("a")))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    assert found[0][1] == found[1][1]


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
    _, seen, usage = bench.slabs.usage(["a"])["a"]
    assert usage.pages <= limit * LAYERS * HEADS
    assert usage.forced > 0
    for held in bench.positions("a"):
        newest = len(held) - rules.protect_first
        assert held == [0, 1, 2, *range(seen - newest, seen)]
        assert newest > rules.window


def test_a_slab_that_is_too_small_is_an_error_where_lists_must_not_be_cut() -> None:
    bench = Bench(Rules(window=20, shift=0, protect_first=0), evicted=0.0)
    bench.arrive("a", 700, seed=6)
    bench.slabs.update({"a": Grant(epoch=1, blocks=(1,))}, [], {})
    bench.slabs.chunk(0, "a", bench.tokens["a"][0][slice(300)], bench.scoring)
    with pytest.raises(OutOfPagesError, match="the 1 blocks of a request are used up"):
        bench.slabs.usage(["a"])


def test_steps_may_run_in_inference_mode() -> None:
    """As vLLM runs them on CUDA, and on CPUs not; tables grow meanwhile."""
    bench = Bench(Rules(window=20, shift=1, protect_first=2), evicted=0.3)
    for seed, name in enumerate("ab"):
        bench.arrive(name, 1_000, seed)
    with torch.inference_mode():
        for sizes in ({"a": 30}, {"a": 1, "b": 900}, {"a": 1, "b": 1}):
            bench.step(sizes)
        bench.step({"a": 1}, {"a": (3, 1)})
        bench.step({"a": 1, "b": 1})
    assert bench.slabs.tables.table.shape[-1] > 8
    assert max(bench.error(x) for x in "ab") < 1e-5


def test_values_may_be_wider_than_keys() -> None:
    rules = Rules(window=20, shift=1, protect_first=2)
    bench = Bench(rules, evicted=0.8, dim=8, value_dim=24)
    bench.arrive("a", 200, seed=0)
    for size in (90, 1, 20, 1):
        bench.step({"a": size})
    assert bench.error("a") < 1e-5


def test_pages_are_taken_from_the_start_of_a_slab() -> None:
    bench = Bench(Rules(window=20, shift=0, protect_first=2), evicted=0.0)
    bench.arrive("a", 300, seed=0)
    for size in (200, 1):
        for _ in range(bench.ledger.grow("a", bench.seen["a"] + size + 200)):  # more than it needs
            bench.blocks["a"].append(bench.free.pop())
        grant = Grant(bench.ledger["a"].epoch, tuple(bench.blocks["a"]))
        bench.slabs.update({"a": grant}, [], {"a": Step(bench.seen["a"])})
        for layer in range(LAYERS):
            bench.read(layer, {"a": size}, {})
        bench.seen["a"] += size
        bench.slabs.usage(["a"])
        table = bench.slabs.tables.table[:, 0]
        owned = table[table > 0].tolist()
        slab = [b * LAYERS * HEADS + i for b in grant.blocks for i in range(LAYERS * HEADS)]
        assert sorted(owned) == sorted(slab[: len(owned)])


def test_what_lies_in_blocks_that_leave_moves_into_the_first_ones() -> None:
    pages = SlabPages(lists=2, requests=2, device=torch.device("cpu"))
    pages.assign({1: [3, 5, 2]})
    assert pages.ids[1, :6].tolist() == [6, 7, 10, 11, 4, 5]
    table = torch.tensor([[[[0, 0], [0, 0]], [[6, 0], [11, 4]]]], dtype=torch.int32)  # [L, S, K, P]
    pages.restack([1], table, pages=12)
    assert pages.free[1, :3].tolist() == [5, 10, 7]  # the last one is given out first
    assert pages.counters.tolist() == [[0, 0], [3, 3]]
    rows = torch.arange(12)
    with pytest.raises(OutOfPagesError, match="keep 1 of its 3 blocks"):
        pages.compact(1, 3, 1, table[:, 1], [rows])
    pages.compact(1, 3, 2, table[:, 1], [rows])
    assert table[0, 1].tolist() == [[6, 0], [11, 7]]
    assert rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 4, 8, 9, 10, 11]


def test_requests_without_a_token_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    attend, read = dispatch.decode_attention, []

    def noting(q: Tensor, pool: Any, lists: PageTables, *args: Any, **given: Any) -> Tensor:
        read.append(lists.live.sum(1).tolist())
        return attend(q, pool, lists, *args, **given)

    bench = Bench(Rules(window=20, shift=0, protect_first=2), evicted=0.0)
    for seed, name in enumerate("abc"):
        bench.arrive(name, 100, seed)
        bench.step({name: 10 * (seed + 1)})
    monkeypatch.setattr(dispatch, "decode_attention", noting)
    bench.step({"b": 1})
    assert read == [[0, 21 * HEADS]] * LAYERS
    bench.step({"a": 1, "c": 1})
    assert read[LAYERS:] == [[11 * HEADS, 0, 31 * HEADS]] * LAYERS


def test_a_list_that_outgrows_its_table_makes_it_wider() -> None:
    bench = Bench(Rules(window=20, shift=0, protect_first=0), evicted=0.0)
    bench.arrive("a", 1_300, seed=3)
    bench.step({"a": 510})
    for _ in range(4):
        bench.step({"a": 1})
    assert bench.slabs.tables.table.shape[-1] == 16
    bench.step({"a": 600})
    bench.step({"a": 1})
    assert bench.error("a") < 1e-5


class NoQuestions(TorchDispatchMode):
    """Refuses ops that wait for a device, or whose shapes depend on numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "item"), name
        if name in ("index", "index_put_"):
            assert all(x is None or x.dtype != torch.bool for x in args[1]), "index by a mask"
        return func(*args, **(kwargs or {}))


def test_no_layer_asks_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    attend = dispatch.attend_chunk

    def with_questions(*args: Any, **given: Any) -> Tensor:
        """The reference asks, kernels do not."""
        with _disable_current_modes():
            return attend(*args, **given)

    monkeypatch.setattr(dispatch, "attend_chunk", with_questions)
    bench = Bench(Rules(window=4, shift=1, protect_first=2), evicted=0.7)
    for seed, name in enumerate("abc"):
        bench.arrive(name, 200, seed)
    bench.step({"a": 70, "b": 63, "c": 2})
    read = bench.read

    def without_questions(*args: Any) -> None:
        with NoQuestions():
            read(*args)

    bench.read = without_questions  # type: ignore[method-assign]
    bench.step({"a": 1, "b": 1})
    bench.step({"a": 1, "c": 9})
    bench.step({"a": 1, "b": 1}, {"a": (3, 1)})
    bench.step({"a": 1})
    assert max(bench.error(x) for x in "abc") < 1e-5


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
