# SPDX-License-Identifier: Apache-2.0
"""Which list owns which page, decided on the host before a graph runs. Knows neither graphs nor devices.

A list is (layer, sequence, KV head); its slot s lies in page table[layer, sequence, head, s // PAGE]. How many slots
live is known on the device; the host keeps an upper bound and learns the truth when it reads them back.

Shapes: L layers, B batch slots, K KV heads, P pages a list can own, n batch slots named.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from modelopt_dms.ops.paged import NO_PAGE, PAGE, OutOfPagesError


class PageTables:
    """Pages of all lists. Ids are unique over the layers, so that layers may share one buffer.

    Attributes:
        table: page ids [L, B, K, P] int32; NO_PAGE where a list owns none.
        bound: upper bounds [L, B, K] int64 of the lists' live slots.
        owned: pages [L, B, K] int64 that each list owns; the first ones of its row of the table.
        pages: that can be given out; ids 1 .. pages.
        page_bytes: of one page, for messages.
        knob: what to change where pages run out, for messages.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        pages_per_list: int,
        pages: int,
        page_bytes: int = 0,
        knob: str = "give the session more pages",
    ) -> None:
        if pages < layers * heads:
            raise OutOfPagesError(
                f"pages={pages} cannot hold one sequence: its {layers * heads} lists need a page each; {knob}"
            )
        self.table = np.full((layers, batch, heads, pages_per_list), NO_PAGE, np.int32)
        self.bound = np.zeros((layers, batch, heads), np.int64)
        self.owned = np.zeros((layers, batch, heads), np.int64)
        self.pages = pages
        self.page_bytes = page_bytes
        self.knob = knob
        self._free = np.arange(pages, 0, -1, dtype=np.int32)  # the first `free` are free
        self.free = pages

    @property
    def in_use(self) -> int:
        """Pages that lists own."""
        return self.pages - self.free

    def _wanted(self, rows: Sequence[int], extra: int) -> NDArray[np.int64]:
        """Pages [L, n, K] that lists of these batch slots need to take `extra` more tokens."""
        capacity = self.table.shape[-1] * PAGE
        # A list is never longer than the tokens of its sequence, which the session keeps below that.
        slots = np.minimum(self.bound[:, rows] + extra, capacity)
        return -(-slots // PAGE)

    def covers(self, rows: Sequence[int], extra: int) -> bool:
        """Whether the lists of these batch slots own room for `extra` more tokens."""
        return bool((self._wanted(rows, extra) <= self.owned[:, rows]).all())

    def reserve(self, rows: Sequence[int], extra: int) -> bool:
        """Give the lists of these batch slots room for `extra` more tokens each.

        Returns:
            Whether the table changed.

        Raises:
            OutOfPagesError: there are too few free pages; then nothing changed.
        """
        owned = self.owned[:, rows]
        wanted = np.maximum(self._wanted(rows, extra), owned)
        count = int((wanted - owned).sum())
        if count > self.free:
            raise OutOfPagesError(
                f"out of pages: the KV cache has {self.pages} pages of {PAGE} slots ({self.pages * self.page_bytes} "
                f"bytes), {self.in_use} are in use and {count} more are asked for; {self.knob}"
            )
        if not count:
            return False
        index = np.arange(self.table.shape[-1])
        new = (index >= owned[..., None]) & (index < wanted[..., None])  # [L, n, K, P]
        table = self.table[:, rows]
        table[new] = self._free[self.free - count : self.free]
        self.free -= count
        self.table[:, rows] = table
        self.owned[:, rows] = wanted
        return True

    def advance(self, rows: Sequence[int], tokens: int) -> None:
        """The lists of these batch slots took in so many tokens; each may have grown by as many."""
        capacity = self.table.shape[-1] * PAGE
        self.bound[:, rows] = np.minimum(self.bound[:, rows] + tokens, capacity)

    def settle(self, rows: Sequence[int], live: NDArray[np.int32]) -> bool:
        """The lists of these batch slots have so many live slots [L, n, K]; what they own beyond is free again.

        Returns:
            Whether the table changed.
        """
        self.bound[:, rows] = live
        owned = self.owned[:, rows]
        kept = np.minimum(owned, -(-live.astype(np.int64) // PAGE))
        index = np.arange(self.table.shape[-1])
        surplus = (index >= kept[..., None]) & (index < owned[..., None])
        if not surplus.any():
            return False
        table = self.table[:, rows]
        returned = table[surplus]
        self._free[self.free : self.free + len(returned)] = returned
        self.free += len(returned)
        table[surplus] = NO_PAGE
        self.table[:, rows] = table
        self.owned[:, rows] = kept
        return True

    def release(self, row: int) -> None:
        """The sequence of this batch slot is over: all its pages are free."""
        layers, _, heads = self.bound.shape
        self.settle([row], np.zeros((layers, 1, heads), np.int32))

    def check_integrity(self) -> None:
        """That every page is free or owned by one list, and that the table says so.

        Raises:
            AssertionError: a fault of this file.
        """
        index = np.arange(self.table.shape[-1])
        owns = index < self.owned[..., None]
        assert ((self.table != NO_PAGE) == owns).all(), "tables and counts of pages differ"
        ids = np.concatenate([self.table[owns], self._free[: self.free]])
        assert sorted(ids.tolist()) == list(range(1, self.pages + 1)), "a page is lost or twice"
