# SPDX-License-Identifier: Apache-2.0
"""PagedHeadCaches beside HeadCaches: the same rows, lengths, pending tokens; chunks, padding, beams, rollbacks."""

import weakref
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from paged_oracle import FORMATS, Formats, held, pending, stored
from torch import Tensor

from modelopt_dms.kernels import dispatch
from modelopt_dms.kernels.gating import Decided
from modelopt_dms.kernels.layout import PAGE, OutOfPagesError
from modelopt_dms.kernels.prefill_reference import NEVER
from modelopt_dms.kvcache import page_pool
from modelopt_dms.kvcache.head_caches import HeadCaches
from modelopt_dms.kvcache.page_pool import SharedPool
from modelopt_dms.kvcache.paged_head_caches import PagedHeadCaches

CPU = torch.device("cpu")
K, D = 2, 16
LAYERS = 2


def tokens(batch: int, T: int, rate: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random key rows, value rows and decisions."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch, K, T, D, generator=generator).bfloat16() for _ in range(2))
    return k, v, torch.rand(batch, K, T, generator=generator) < rate


def sorted_rows(x: Tensor) -> list[list[int]]:
    """Stored rows [L, N] as a multiset of bytes."""
    return sorted(x.contiguous().view(torch.uint8).tolist())


def assert_same(paged: PagedHeadCaches, plain: HeadCaches) -> None:
    """Rows as multisets, since tokens that came together may lie in another order; and what is pending."""
    assert paged.seen == plain.seen
    assert torch.equal(paged.live, plain.live.int())
    for i in range(plain.lists):
        b, h = divmod(i, K)
        got = held(paged.pool, paged.state, b, h)
        for x, y in zip(got, plain.rows(i, int(plain.live[b, h])), strict=True):
            assert sorted_rows(x) == sorted_rows(y)
        positions, _ = plain.pending(i)
        assert [p for p, _ in pending(paged.state, b, h)] == sorted(positions.tolist())
    assert torch.equal(paged.usage.synchronized().live, plain.usage.live)
    assert torch.equal(paged.usage.synchronized().tokens, plain.usage.tokens)


class Layers(RuleBasedStateMachine):
    """Two layers that share pages, driven as a model drives them."""

    impl = "reference"

    @initialize(
        window=st.integers(1, 6),
        shift=st.integers(0, 1),
        name=st.sampled_from(sorted(FORMATS)),
        batch=st.integers(1, 3),
        T=st.integers(1, 90),
        recording=st.booleans(),
        seed=st.integers(0, 999),
    )
    def start(
        self, window: int, shift: int, name: str, batch: int, T: int, recording: bool, seed: int
    ) -> None:
        self.formats: Formats = FORMATS[name]
        self.shared = SharedPool(CPU, self.impl, layers=LAYERS)
        self.paged = [
            PagedHeadCaches(window, shift, self.shared, self.formats) for _ in range(LAYERS)
        ]
        self.plain = [HeadCaches(window, shift) for _ in range(LAYERS)]
        self.batch = batch
        self.recoverable = 0
        self.append(T=T, rate=0.6, padding=0.0, seed=seed)
        self.recoverable = 0
        if recording:
            for paged in self.paged:
                paged.rollback = max(paged.rollback, window)

    @rule(
        T=st.one_of(st.just(1), st.integers(2, 12)),
        rate=st.sampled_from([0.0, 0.5, 1.0]),
        padding=st.sampled_from([0.0, 0.0, 0.6, 1.0]),
        seed=st.integers(0, 999),
    )
    def append(self, T: int, rate: float, padding: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        valid = torch.rand(self.batch, T, generator=generator) >= padding
        for i, (paged, plain) in enumerate(zip(self.paged, self.plain, strict=True)):
            k, v, evict = tokens(self.batch, T, rate, seed + 7 * i)
            paged.append(k, v, evict, valid if padding else None)
            k, v = (stored(form, x) for form, x in zip(self.formats, (k, v), strict=True))
            plain.append(k, v, evict, valid)
            plain.usage.row_values = 2 * D
        recorded = self.paged[0].rollback > 0 and (not padding or bool(valid.all()))
        self.recoverable = min(self.recoverable + T, 24) if recorded else 0

    @rule(steps=st.integers(1, 30), rate=st.sampled_from([0.2, 1.0]), seed=st.integers(0, 999))
    def decode(self, steps: int, rate: float, seed: int) -> None:
        for step in range(steps):
            self.append(T=1, rate=rate, padding=0.0, seed=seed + step)

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        names = st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=4)
        sequences = torch.tensor(data.draw(names, label="sequences"))
        for slots in (*self.paged, *self.plain):
            slots.select(sequences)
        self.batch = len(sequences)
        self.recoverable = 0

    @precondition(lambda self: self.recoverable)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(1, self.recoverable), label="tokens")
        for slots in (*self.paged, *self.plain):
            slots.crop(count)
        self.recoverable -= count

    @rule(excess=st.integers(1, 9))
    def crop_too_much(self, excess: int) -> None:
        paged = self.paged[0]
        count = paged._recoverable + excess
        with pytest.raises(ValueError, match=f"cannot take back {count} tokens.*activate_past"):
            paged.crop(count)

    @invariant()
    def holds_what_slot_lists_hold(self) -> None:
        if hasattr(self, "paged"):
            for paged, plain in zip(self.paged, self.plain, strict=True):
                paged.check_integrity()
                assert_same(paged, plain)
            self.shared.check()


Layers.TestCase.settings = settings(
    max_examples=20, stateful_step_count=8, deadline=None, derandomize=True
)
test_paged_slots_hold_what_slot_lists_hold = Layers.TestCase


class Kernels(Layers):
    impl = "triton"


Kernels.TestCase.settings = settings(
    max_examples=2, stateful_step_count=4, deadline=None, derandomize=True
)
test_with_kernels_too = Kernels.TestCase


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
            for position, slot in pending(slots.state, b, h):
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
