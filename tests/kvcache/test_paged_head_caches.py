# SPDX-License-Identifier: Apache-2.0
"""The pages of PagedHeadCaches: growth, limits, addresses, bytes. Which rows it holds: test_conformance.py."""

import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from paged_oracle import FORMATS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modelopt_dms.kernels import dispatch
from modelopt_dms.kernels.gating import Decided
from modelopt_dms.kernels.layout import PAGE, OutOfPagesError
from modelopt_dms.kernels.prefill_reference import NEVER
from modelopt_dms.kvcache import page_pool
from modelopt_dms.kvcache.page_pool import SharedPool
from modelopt_dms.kvcache.paged_head_caches import PagedHeadCaches

CPU = torch.device("cpu")
K, D = 2, 16


def tokens(batch: int, T: int, rate: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random key rows, value rows and decisions."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch, K, T, D, generator=generator).bfloat16() for _ in range(2))
    return k, v, torch.rand(batch, K, T, generator=generator) < rate


def fixed(pages: int, batch: int = 2, width: int = 3, window: int = 2) -> PagedHeadCaches:
    return PagedHeadCaches(window, 0, limited(pages, batch, width))


def limited(pages: int, batch: int, width: int) -> SharedPool:
    """A pool of so many pages of bfloat16 rows."""
    return SharedPool(CPU, batch=batch, width=width, max_bytes=pages * PAGE * 2 * D * 2)


def append(slots: PagedHeadCaches, T: int, rate: float, seed: int = 0, batch: int = 2) -> None:
    slots.append(*tokens(batch, T, rate, seed), None)


def test_a_pool_that_grows_asks_the_device_once_in_a_page_of_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = SharedPool(CPU, layers=3)
    layers = [PagedHeadCaches(2, 0, shared) for _ in range(3)]
    asked = 0
    tolist = Tensor.tolist

    def counted(self: Tensor) -> object:
        nonlocal asked
        asked += 1
        return tolist(self)

    monkeypatch.setattr(Tensor, "tolist", counted)
    for slots in layers:
        append(slots, 100, 0.5)
    asked = 0
    for step in range(4 * PAGE):
        for slots in layers:
            append(slots, 1, 0.0, step)
    assert 1 <= asked <= 5
    monkeypatch.undo()
    layers[0].check_integrity()
    assert shared.check() <= shared.pool.pages


def test_a_growing_pool_has_no_second_copy_of_itself() -> None:
    """Each old tensor is gone before the next new one is made; what was stored is there; free pages stay free."""
    names = ("key_scales", "value_scales", "values", "keys")
    shared = SharedPool(CPU)
    slots = PagedHeadCaches(2, 0, shared, FORMATS["nvfp4"])
    append(slots, 70, 0.5)
    before = slots.read(70, torch.float32)
    pages, free = shared.pool.pages, int(shared.pool.counters[0])
    old = {name: weakref.ref(getattr(shared.pool, name)) for name in names}
    alive: list[list[str]] = []

    def longer(x: Tensor, length: int) -> Tensor:
        alive.append([name for name in names if old[name]() is not None])
        return real(x, length)

    real = page_pool._longer
    with mock.patch.object(page_pool, "_longer", longer):
        shared._grow(free, 7)
    assert alive == [list(names[i:]) for i in range(len(names))]
    after = slots.read(70, torch.float32)
    assert all(torch.equal(x, y) for x, y in zip(after, before, strict=True))
    assert (shared.pool.pages, int(shared.pool.counters[0])) == (pages + 7, free + 7)
    slots.check_integrity()


@pytest.mark.parametrize("failing", range(4))
def test_a_growth_that_fails_leaves_the_pool_as_it_was(failing: int) -> None:
    shared = SharedPool(CPU)
    slots = PagedHeadCaches(2, 0, shared, FORMATS["nvfp4"])
    append(slots, 70, 0.5)
    pages, free, calls = shared.pool.pages, int(shared.pool.counters[0]), 0

    def longer(x: Tensor, length: int) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > failing:
            raise torch.OutOfMemoryError
        return real(x, length)

    real = page_pool._longer
    with mock.patch.object(page_pool, "_longer", longer), pytest.raises(torch.OutOfMemoryError):
        shared._grow(free, 7)
    assert (shared.pool.pages, int(shared.pool.counters[0])) == (pages, free)
    slots.check_integrity()
    shared._grow(free, 3)
    append(slots, 300, 0.0)
    slots.check_integrity()


def test_a_fixed_pool_never_changes_an_address() -> None:
    slots = fixed(pages=12)
    append(slots, 5, 0.5)

    def addresses() -> list[int]:
        tensors = [*vars(slots.pool).values(), *vars(slots.state).values()]
        return [x.data_ptr() for x in tensors if isinstance(x, Tensor)]

    before = addresses()
    for step in range(70):
        append(slots, 1, 0.5, step)
    append(slots, 9, 0.5)
    slots.select(torch.tensor([1, 1]))
    slots.release(torch.tensor([True, False]))
    slots.clear()
    append(slots, 5, 0.5)
    assert addresses() == before


def test_a_fixed_pool_that_runs_out_names_its_size_and_what_to_change() -> None:
    slots = fixed(pages=5)
    append(slots, PAGE, 0.0)
    assert slots.shared.check() == 4
    append(slots, 1, 0.0)
    with pytest.raises(OutOfPagesError, match="5 of 64 slots.*at least 3 more.*max_cache_bytes"):
        slots.shared.check()


def test_a_fixed_pool_that_ran_out_is_as_new_after_a_reset_of_all_layers() -> None:
    shared = limited(12, 2, 3)
    layers = [PagedHeadCaches(2, 0, shared) for _ in range(2)]
    for slots in layers:
        append(slots, 70, 0.0)
    layers[0].clear()
    with pytest.raises(OutOfPagesError):  # the other layer still lacks rows
        shared.check()
    layers[1].clear()
    assert shared.pool.counters.tolist() == [12, 0]
    shared.check_integrity()
    append(layers[0], 5, 0.0)
    assert int(shared.pool.counters[0]) == 12 - layers[0].lists
    shared.check()


class Made(TorchDispatchMode):
    """The largest tensor that is new and not a part of an old one, in numbers."""

    largest = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not op.is_view:
            given = [x.data_ptr() for x in args if isinstance(x, Tensor)]
            self.largest = max(self.largest, 0 if out.data_ptr() in given else out.numel())
        return out


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_expiries_of_a_chunk_cost_what_the_ring_holds(impl: str) -> None:
    shared = SharedPool(CPU, impl, layers=2)
    layers = [PagedHeadCaches(2, 0, shared) for _ in range(2)]
    for seed, slots in enumerate(layers):
        append(slots, 300, 0.5, seed)
    for turn in range(2):
        for slots in layers:
            expected = slots.expiry(slots.seen)
            with Made() as made, slots.expiries() as found:
                assert found is not None
                assert torch.equal(found[..., : slots.seen], expected)
            if turn:
                assert made.largest <= 2 * slots.K * 3 + 3
    assert shared._expiries is not None
    assert bool((shared._expiries == NEVER).all())


def test_finished_sequences_give_their_pages_back_and_take_in_nothing() -> None:
    shared = limited(20, 2, 3)
    layers = [PagedHeadCaches(2, 0, shared) for _ in range(2)]
    for slots in layers:
        append(slots, 70, 0.0)
    assert int(shared.pool.counters[0]) == 20 - 2 * 2 * K * 2
    shared.release(torch.tensor([True, False]))
    assert int(shared.pool.counters[0]) == 20 - 2 * 1 * K * 2
    for slots in layers:
        append(slots, 1, 0.0)
        append(slots, 3, 0.0)
        slots.check_integrity()
        assert slots.live.tolist() == [[0, 0], [74, 74]]
        assert slots.usage.synchronized().tokens.tolist() == [0, 74]
    shared.release(torch.tensor([True, True]))
    assert int(shared.pool.counters[0]) == 20


def test_released_sequences_cannot_be_selected() -> None:
    slots = PagedHeadCaches(2, 0, SharedPool(CPU))
    append(slots, 3, 0.0)
    slots.release(torch.tensor([False, True]))
    with pytest.raises(ValueError, match=r"released sequences cannot be selected: got \[0, 1\]"):
        slots.select(torch.tensor([0, 1]))
    slots.select(torch.tensor([0, 0]))
    append(slots, 1, 0.0)
    assert slots.live.tolist() == [[4, 4], [4, 4]]


def test_a_cleared_cache_starts_anew_and_its_numbers_stay() -> None:
    shared = SharedPool(CPU)
    slots = PagedHeadCaches(2, 0, shared)
    append(slots, 70, 0.0)
    usage = slots.usage
    slots.clear()
    assert slots.seen == 0
    assert int(shared.pool.counters[0]) == shared.pool.pages
    append(slots, 5, 0.0, batch=3)
    slots.check_integrity()
    assert slots.live.tolist() == [[5, 5]] * 3
    assert usage.synchronized().live.tolist() == [[70, 70]] * 2


def test_usage_counts_pages_in_use_and_what_a_dense_cache_would_take() -> None:
    slots = PagedHeadCaches(2, 0, SharedPool(CPU, layers=4), FORMATS["fp8"])
    append(slots, 100, 0.9)
    row = 2 * D
    pages = sum(-(-x // PAGE) for x in slots.live.flatten().tolist())
    usage = slots.usage.synchronized()
    assert usage.kv_bytes == pages * PAGE * row
    assert usage.row_bytes == row
    assert usage.dense_bytes == 2 * K * 100 * row
    assert usage.bf16_bytes == 2 * usage.dense_bytes
    assert usage.resident_bytes == int(slots.live.sum()) * row
    assert usage.pool is not None and usage.pool.bytes == slots.shared.kv_bytes
    slots.rollback = 2
    append(slots, 1, 0.0)
    assert slots.usage.synchronized().kv_bytes > pages * PAGE * row


@pytest.mark.parametrize("shift", [0, 1])
def test_expiry_tells_until_when_marked_slots_are_read(shift: int) -> None:
    window = 5
    slots = PagedHeadCaches(window, shift, SharedPool(CPU))
    append(slots, 30, 0.6)
    slots.decide_previous(torch.tensor([[True, False], [False, True]]))
    expiry = slots.expiry(40)
    assert expiry.shape == (2, K, 40)
    for b in range(2):
        for h in range(K):
            expected = [NEVER] * 40
            for position, slot in torch.stack(slots.pending(b * K + h), dim=1).tolist():
                expected[slot] = position + window
            assert expiry[b, h].tolist() == expected
            assert any(x != NEVER for x in expected)


def test_layers_must_store_alike_and_hold_as_many_sequences() -> None:
    shared = SharedPool(CPU)
    append(PagedHeadCaches(2, 0, shared), 3, 0.0)
    with pytest.raises(ValueError, match="must store rows alike"):
        append(PagedHeadCaches(2, 0, shared, FORMATS["fp8"]), 3, 0.0)
    with pytest.raises(ValueError, match="holds 2 sequences, got 3"):
        append(PagedHeadCaches(2, 0, shared), 3, 0.0, batch=3)
    with pytest.raises(ValueError, match="holds 2 sequences, got 3"):
        append(fixed(pages=9), 3, 0.0, batch=3)
    with pytest.raises(ValueError, match="impl='cuda' must be 'auto', 'triton' or 'reference'"):
        SharedPool(CPU, "cuda")
    with pytest.raises(
        ValueError, match="max_cache_bytes=.* is 3 pages of .* 4 lists .* need one each"
    ):
        append(fixed(pages=3), 3, 0.0)


def test_a_captured_graphs_tokens_are_counted() -> None:
    slots = fixed(pages=9)
    append(slots, 3, 0.0)
    k, v, evict = tokens(2, 1, 0.0, 1)
    gate = Decided(evict[..., 0])
    dispatch.append_token(k[:, :, 0], v[:, :, 0], gate, slots.pool, slots.state)
    slots.advance(1)
    assert slots.seen == 4
    assert slots.usage.synchronized().tokens.tolist() == [4, 4]
