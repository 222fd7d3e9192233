# SPDX-License-Identifier: Apache-2.0
"""HeadCaches as what paged lists must agree with: one for every sequence, holding stored rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from modelopt_dms.kernels.layout import NO_PAGE, PAGE, PagePool, PageTables
from modelopt_dms.kernels.number_formats import Fp8, Int8, Nvfp4, RowFormat
from modelopt_dms.kvcache import head_caches
from modelopt_dms.kvcache.head_caches import HeadCaches

Formats = tuple[RowFormat | None, RowFormat | None]

FORMATS: dict[str, Formats] = {
    "plain": (None, None),
    "fp8": (Fp8(torch.tensor([1.5, 3.0])), Fp8(torch.tensor([2.0]))),
    "fp8 rows": (Fp8(None), Fp8(None)),
    "int8": (Int8(torch.tensor([2.5])), Int8(torch.tensor([1.5, 3.0]))),
    "int8 rows": (Int8(None), Int8(None)),
    "nvfp4": (Nvfp4(torch.tensor([1.5, 3.0])), Nvfp4(torch.tensor([2.0]))),
    "mixed": (Fp8(torch.tensor([2.0])), Nvfp4(torch.tensor([2.0, 1.0]))),
}


@contextmanager
def in_bulk() -> Iterator[None]:
    """Inside, HeadCaches takes in chunks as a whole, so that its slots are those of `pack`."""
    with mock.patch.object(head_caches, "LONGEST_DRAFT", 0):
        yield


def stored(form: RowFormat | None, x: Tensor) -> Tensor:
    """Rows [B, K, T, D] as the CPU's cache holds them."""
    return x if form is None else form.encode(x)


class Sequences:
    """A HeadCaches for every sequence, so that some can be left out."""

    def __init__(self, batch: int, window: int, shift: int, formats: Formats) -> None:
        self.formats = formats
        self.window, self.shift = window, shift
        self.each = [self.fresh() for _ in range(batch)]

    def fresh(self) -> HeadCaches:
        slots = HeadCaches(self.window, self.shift)
        slots.rollback = 0
        return slots

    def append(
        self, k: Tensor, v: Tensor, decisions: Tensor, valid: Tensor | None, active: Tensor
    ) -> None:
        k, v = (stored(form, x) for form, x in zip(self.formats, (k, v), strict=True))
        with in_bulk():
            for b, slots in enumerate(self.each):
                some = slice(b, b + 1)
                if active[b]:
                    valid_b = None if valid is None else valid[some]
                    slots.append(k[some], v[some], decisions[some], valid_b)


def assert_same(sequences: Sequences, pool: PagePool, lists: PageTables) -> None:
    """Slot by slot, what is stored, and what is remembered about the window."""
    for b, slots in enumerate(sequences.each):
        assert lists.seen[b].tolist() == [slots.seen] * lists.heads
        for h in range(lists.heads):
            if not slots.keys:
                assert lists.live[b, h] == 0
                continue
            live = int(slots.live[0, h])
            assert lists.live[b, h] == live
            expected = slots.rows(h, live)
            for got, want in zip(held(pool, lists, b, h), expected, strict=True):
                assert torch.equal(got, want)
            positions, at = slots.pending(h)
            assert pending(lists, b, h) == sorted(zip(positions.tolist(), at.tolist(), strict=True))


def pending(lists: PageTables, b: int, h: int) -> list[tuple[int, int]]:
    """Positions and slots of a list's marked tokens."""
    marked = lists.ring_evict[b, h] & (lists.ring_slot[b, h] >= 0)
    positions = lists.ring_positions()[b, h][marked].tolist()
    return sorted(zip(positions, lists.ring_slot[b, h][marked].tolist(), strict=True))


def held(pool: PagePool, lists: PageTables, b: int, h: int) -> tuple[Tensor, Tensor]:
    """A list's stored key and value rows, in slot order, scales behind codes."""
    slots = torch.arange(int(lists.live[b, h]))
    page = lists.table[b, h, slots // PAGE].long()
    assert bool((page != NO_PAGE).all())
    found = []
    for codes, scales in ((pool.keys, pool.key_scales), (pool.values, pool.value_scales)):
        rows = codes[page, slots % PAGE]
        if scales is not None:
            rows = torch.cat([rows, scales[page, slots % PAGE].view(torch.uint8)], dim=-1)
        found.append(rows)
    return found[0], found[1]


def assert_every_page_has_one_owner(pool: PagePool, *layers: PageTables) -> None:
    free = pool.free[: int(pool.counters[0])].tolist()
    owned = torch.cat([x.table.flatten() for x in layers]).tolist()
    assert sorted(free + [x for x in owned if x != NO_PAGE]) == list(range(1, pool.pages + 1))
