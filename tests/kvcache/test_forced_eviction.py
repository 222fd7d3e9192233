# SPDX-License-Identifier: Apache-2.0
"""A full pool that evicts, beside a slow model of it: lists of positions, cut one page at a time."""

import random

import pytest
import torch
from torch import Tensor

from modelopt_dms.kernels.layout import PAGE, OutOfPagesError
from modelopt_dms.kvcache.forced_eviction import LOOKAHEAD
from modelopt_dms.kvcache.page_pool import SharedPool
from modelopt_dms.kvcache.paged_head_caches import PagedHeadCaches

K, D = 2, 4
PAGE_BYTES = PAGE * 2 * D * 4


class Model:
    """Which positions every list [layer, sequence, head] holds, by the docstring of `forced_eviction`."""

    def __init__(self, layers: int, batch: int, window: int, protect: int, pages: int) -> None:
        self.window, self.protect, self.pages = window, protect, pages
        self.lists: list[list[int]] = [[] for _ in range(layers * batch * K)]
        self.marked: list[set[int]] = [set() for _ in self.lists]
        self.each = batch * K
        self.owned = [0] * len(
            self.lists
        )  # pages; those of padding that came and went stay until a cut
        self.first: list[list[int]] = [[] for _ in self.lists]  # protected
        self.seen = [0] * layers
        self.granted = [0] * layers
        self.cuts = 0

    def append(self, layer: int, evict: Tensor, valid: Tensor | None) -> None:
        """Tokens with decisions [B, K, T]."""
        T = evict.shape[-1]
        start, mine = self.seen[layer], range(layer * self.each, (layer + 1) * self.each)

        def after(i: int) -> list[int]:
            b, h = divmod(i - mine[0], K)
            kept = self.lists[i] + [
                start + t for t in range(T) if valid is None or bool(valid[b, t])
            ]
            marks = self.marked[i] | {start + t for t in range(T) if bool(evict[b, h, t])}
            return [p for p in kept if p not in marks or p >= start + T - 1 - self.window]

        if self.granted[layer] >= T:
            self.granted[layer] -= T
        else:
            self.granted = [0] * len(self.granted)
            size = [
                len(self.lists[i]) + 1 if T == 1 else len(after(i)) if i in mine else len(x)
                for i, x in enumerate(self.lists)
            ]
            new = sum(max(0, -(-size[i] // PAGE) - self.owned[i]) for i in mine)
            if sum(self.owned) + new > self.pages:
                growth = [max(0, n - len(x)) for n, x in zip(size, self.lists, strict=True)]
                self.make_room([LOOKAHEAD] * len(self.lists) if T == 1 else growth)
                self.granted = [LOOKAHEAD if T == 1 else 0] * len(self.granted)
                self.granted[layer] -= 1 if T == 1 else 0
        for i in mine:
            b, h = divmod(i - mine[0], K)
            self.lists[i] = after(i)
            self.marked[i] |= {start + t for t in range(T) if bool(evict[b, h, t])}
            self.owned[i] = max(self.owned[i], -(-len(self.lists[i]) // PAGE))
            text = [start + t for t in range(T) if valid is None or bool(valid[b, t])]
            self.first[i] = (self.first[i] + text)[: self.protect]
        self.seen[layer] += T

    def make_room(self, growth: list[int]) -> None:
        def needed(i: int) -> int:
            return -(-(len(self.lists[i]) + growth[i]) // PAGE)

        left_out: set[int] = set()
        while sum(map(needed, range(len(self.lists)))) > self.pages:
            i = max(
                (i for i in range(len(self.lists)) if i not in left_out),
                key=lambda i: (len(self.lists[i]), -i),
            )
            seen = self.seen[i // self.each]
            kept = {p for p in self.lists[i] if p >= seen - 1 - self.window or p in self.first[i]}
            target = PAGE * (needed(i) - 1) - growth[i]
            if target < len(kept):
                left_out.add(i)
                continue
            can_go = [p for p in sorted(self.lists[i]) if p not in kept]
            gone = set(can_go[: len(self.lists[i]) - target])
            self.lists[i] = [p for p in self.lists[i] if p not in gone]
            self.cuts += 1
        self.owned = [-(-len(x) // PAGE) for x in self.lists]


def held(slots: PagedHeadCaches, b: int, h: int) -> tuple[Tensor, Tensor]:
    """A list's rows, in slot order."""
    keys, values = slots.read(int(slots.live[b, h]), torch.float32)
    return keys[b, h], values[b, h]


class Both:
    """Layers of a pool that evicts, and the model, driven alike. Rows hold their positions."""

    def __init__(
        self,
        *,
        pages: int,
        layers: int = 2,
        batch: int = 2,
        window: int = 5,
        protect: int = 0,
        impl: str = "reference",
    ) -> None:
        self.batch = batch
        self.shared = SharedPool(
            torch.device("cpu"),
            impl,
            batch=batch,
            width=40,
            max_bytes=pages * PAGE_BYTES,
            layers=layers,
            on_full="evict",
            protect_first=protect,
        )
        self.layers = [PagedHeadCaches(window, 0, self.shared) for _ in range(layers)]
        self.model = Model(layers, batch, window, protect, pages)
        self.generator = torch.Generator().manual_seed(0)

    def step(self, T: int, rate: float = 0.5, valid: Tensor | None = None) -> None:
        for i, slots in enumerate(self.layers):
            evict = torch.rand(self.batch, K, T, generator=self.generator) < rate
            for b in range(self.batch):
                text = torch.ones(T) if valid is None else valid[b]
                before = slots.seen - int(slots.padding[b]) if slots.seen else 0
                # As gates decide.
                evict[b] &= before + text.cumsum(0) > self.model.protect
            rows = torch.arange(slots.seen, slots.seen + T).float()[:, None]
            rows = rows.expand(self.batch, K, T, D).contiguous()
            slots.append(rows, rows + 0.5, evict, valid)
            self.model.append(i, evict, valid)

    def ages(self, slots: PagedHeadCaches, b: int, h: int) -> Tensor:
        """What the pool takes for the positions of a list's tokens, slot by slot."""
        assert self.shared.positions is not None
        live = int(slots.live[b, h])
        at = slots.state.rows_of(torch.arange(live).expand(self.batch, K, live))[b, h]
        return self.shared.positions.flatten()[at]

    def check(self) -> None:
        self.shared.check()
        for i, expected in enumerate(self.model.lists):
            slots = self.layers[i // self.model.each]
            b, h = divmod(i % self.model.each, K)
            keys, values = held(slots, b, h)
            assert torch.equal(keys + 0.5, values)
            assert sorted(keys[:, 0].int().tolist()) == expected, f"list {i}"
            assert torch.equal(self.ages(slots, b, h), keys[:, 0].int())
        for slots in self.layers:
            slots.check_integrity()


@pytest.mark.parametrize("protect", [0, 3])
def test_a_full_pool_keeps_what_the_slow_model_keeps(protect: int) -> None:
    both = Both(pages=18, protect=protect)
    for T, rate in ((150, 0.6), *[(1, 0.2)] * 60, (40, 0.5), *[(1, 0.0)] * 150, (70, 0.9), (1, 0)):
        both.step(T, rate)
        both.check()
    assert both.model.cuts > 20


@pytest.mark.parametrize("seed", range(6))
def test_whatever_comes_a_full_pool_keeps_what_the_slow_model_keeps(seed: int) -> None:
    choose = random.Random(seed)
    layers, batch, window = choose.choice([1, 2, 3]), choose.choice([1, 2]), choose.choice([1, 9])
    pages = layers * batch * K * 2 + choose.choice([0, 1, 2])
    both = Both(
        pages=pages, layers=layers, batch=batch, window=window, protect=choose.choice([0, 2])
    )
    for _ in range(12):
        rate = choose.choice([0.0, 0.1, 0.5])
        chunks = choose.choice([[1] * 40, [50], [7, 20], [1] * 9])
        for T in chunks:
            valid = torch.rand(batch, T, generator=both.generator) < 0.7
            both.step(T, rate, valid if T > 1 and choose.random() < 0.4 else None)
            both.check()
    assert both.model.cuts


def test_a_prompt_longer_than_the_pool_is_read_in_chunks() -> None:
    both = Both(pages=20)
    for _ in range(6):
        both.step(64, 0.1)
        both.check()
    assert both.model.cuts > 10


def test_padding_is_not_among_the_first_tokens() -> None:
    both = Both(pages=12, protect=4, window=2)
    valid = torch.ones(2, 90, dtype=torch.bool)
    valid[1, :30] = False
    both.step(90, 0.0, valid)
    for _ in range(120):
        both.step(1, 0.0)
    both.check()
    held_first = [sorted(x)[:4] for x in both.model.lists]
    assert held_first == ([[0, 1, 2, 3]] * K + [[30, 31, 32, 33]] * K) * 2


def test_rows_that_move_for_padding_take_their_ages_with_them() -> None:
    both = Both(pages=8, layers=1, window=20)
    padding = torch.zeros(2, 15, dtype=torch.bool)
    padding[0, :4] = True
    for T, valid in ((40, None), (15, padding), (30, None), (15, padding), (120, None)):
        both.step(T, 0.6, valid)
        both.check()
    for _ in range(100):
        both.step(1, 0.1)
        both.check()
    assert both.model.cuts


def test_room_is_made_for_a_captured_graph_at_the_same_addresses() -> None:
    both = Both(pages=12)
    both.step(70, 0.2)

    def addresses() -> list[int]:
        tensors = [*vars(both.shared.pool).values()]
        tensors += [x for slots in both.layers for x in vars(slots.state).values()]
        return [x.data_ptr() for x in tensors if isinstance(x, Tensor)]

    before = addresses()
    for step in range(100):
        if step % LOOKAHEAD == 0:
            assert not both.shared.make_room(LOOKAHEAD)
            both.model.make_room([LOOKAHEAD] * len(both.model.lists))
            both.model.granted = [LOOKAHEAD] * 2
        both.step(1, 0.1)
        both.check()
    assert both.model.cuts and addresses() == before


def test_with_kernels_too() -> None:
    both = Both(pages=9, layers=1, window=3, impl="triton")
    for T in (100, 40, *[1] * 12):
        both.step(T, 0.1)
        both.check()
    assert both.model.cuts


def test_tokens_are_taken_back_until_a_cut_and_again_after_it() -> None:
    both = Both(pages=8, layers=1)
    (slots,) = both.layers
    slots.rollback = 5
    both.step(100, 0.2)
    while not both.model.cuts:
        both.step(1, 0.3)
    with pytest.raises(ValueError, match="evicted rows of only the last 1 are"):
        slots.crop(2)
    for _ in range(5):
        both.step(1, 0.5)
    rows = [sorted(held(slots, b, h)[0][:, 0].tolist()) for b, h in PAIRS]
    for _ in range(4):
        both.step(1, 0.9)
    slots.crop(4)
    assert rows == [sorted(held(slots, b, h)[0][:, 0].tolist()) for b, h in PAIRS]
    for b, h in PAIRS:
        keys, _ = held(slots, b, h)
        assert torch.equal(both.ages(slots, b, h), keys[:, 0].int())


PAIRS = [(b, h) for b in range(2) for h in range(K)]


def test_copied_sequences_know_the_age_of_their_tokens() -> None:
    both = Both(pages=10, layers=1)
    (slots,) = both.layers
    both.step(150, 0.3)
    slots.select(torch.tensor([1, 1]))
    slots.check_integrity()
    both.model.lists[:K] = [list(x) for x in both.model.lists[K:]]
    both.model.marked[:K] = [set(x) for x in both.model.marked[K:]]
    for _ in range(80):
        both.step(1, 0.1)
        both.check()
    assert both.model.cuts


def test_finished_sequences_need_no_room() -> None:
    both = Both(pages=8, layers=1)
    both.step(100, 0.0)
    both.shared.release(torch.tensor([True, False]))
    both.model.cuts = 0
    (slots,) = both.layers
    for _ in range(100):
        rows = torch.zeros(2, K, 1, D)
        slots.append(rows, rows, torch.zeros(2, K, 1, dtype=torch.bool), None)
    assert slots.live.tolist() == [[0, 0], [200, 200]]


def test_what_cannot_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="is 3 pages of .* 4 lists .* need one each"):
        Both(pages=3, layers=1).step(5)
    with pytest.raises(ValueError, match="4 lists .* need 2 each: at least"):
        Both(pages=7, layers=1, window=60).step(5)
    both = Both(pages=8, layers=1)
    with pytest.raises(OutOfPagesError, match="even if all is evicted.*max_cache_bytes"):
        both.layers[0].append(*torch.zeros(2, 2, K, 200, D), torch.zeros(2, K, 200).bool(), None)
    with pytest.raises(ValueError, match="on_full='evict' needs max_cache_bytes"):
        SharedPool(torch.device("cpu"), on_full="evict")
    with pytest.raises(ValueError, match="on_full='drop' must be 'error' or 'evict'"):
        SharedPool(torch.device("cpu"), on_full="drop")  # type: ignore[arg-type]
