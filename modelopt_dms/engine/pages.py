# SPDX-License-Identifier: Apache-2.0
"""Which list owns which page, decided on the host before a graph runs. Knows neither graphs nor devices.

A list is (layer, sequence, KV head); its slot s lies in page table[layer, sequence, head, s // PAGE]. How many slots
live is known on the device; the host keeps an upper bound and learns the truth when it reads them back.

Every layer has as many pages, of its own: an id names a page of its layer, and graphs may take a layer's pages as a
tensor that nothing else lies in. The price: a layer that keeps more than others is out of pages while they have some.

Shapes: L layers, B batch slots, K KV heads, P pages a list can own, n batch slots named.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from modelopt_dms.ops.paged import NO_PAGE, PAGE, OutOfPagesError


class PageTables:
    """Pages of all lists.

    Attributes:
        table: page ids [L, B, K, P] int32; NO_PAGE where a list owns none.
        bound: upper bounds [L, B, K] int64 of the lists' live slots.
        owned: pages [L, B, K] int64 that each list owns; the first ones of its row of the table.
        pages: of each layer that can be given out; ids 1 .. pages.
        free: pages [L] int64 of each layer that no list owns.
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
        if pages < heads:
            raise OutOfPagesError(
                f"pages={pages} cannot hold one sequence: its {heads} lists of a layer need a page each; {knob}"
            )
        self.table = np.full((layers, batch, heads, pages_per_list), NO_PAGE, np.int32)
        self.bound = np.zeros((layers, batch, heads), np.int64)
        self.owned = np.zeros((layers, batch, heads), np.int64)
        self.pages = pages
        self.page_bytes = page_bytes
        self.knob = knob
        # Of each layer, the first `free` are free.
        self._free = np.tile(np.arange(pages, 0, -1, dtype=np.int32), (layers, 1))
        self.free = np.full(layers, pages, np.int64)

    @property
    def in_use(self) -> int:
        """Pages that lists own, of all layers together."""
        return int((self.pages - self.free).sum())

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
            OutOfPagesError: a layer has too few free pages; then nothing changed.
        """
        owned = self.owned[:, rows]
        wanted = np.maximum(self._wanted(rows, extra), owned)
        counts = (wanted - owned).sum((1, 2))  # [L]
        if (counts > self.free).any():
            raise OutOfPagesError(self._shortage(counts))
        if not counts.any():
            return False
        index = np.arange(self.table.shape[-1])
        new = (index >= owned[..., None]) & (index < wanted[..., None])  # [L, n, K, P]
        table = self.table[:, rows]
        for layer in np.flatnonzero(counts):
            end = self.free[layer]
            table[layer][new[layer]] = self._free[layer, end - counts[layer] : end]
        self.free -= counts
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
        for layer in np.flatnonzero(surplus.any((1, 2, 3))):
            returned = table[layer][surplus[layer]]
            start = self.free[layer]
            self._free[layer, start : start + len(returned)] = returned
            self.free[layer] += len(returned)
        table[surplus] = NO_PAGE
        self.table[:, rows] = table
        self.owned[:, rows] = kept
        return True

    def release(self, row: int) -> None:
        """The sequence of this batch slot is over: all its pages are free."""
        layers, _, heads = self.bound.shape
        self.settle([row], np.zeros((layers, 1, heads), np.int32))

    def check_integrity(self) -> None:
        """That every page is free or owned by one list of its layer, and that the table says so.

        Raises:
            AssertionError: a fault of this file.
        """
        index = np.arange(self.table.shape[-1])
        owns = index < self.owned[..., None]
        assert ((self.table != NO_PAGE) == owns).all(), "tables and counts of pages differ"
        for layer, count in enumerate(self.free):
            ids = [*self.table[layer][owns[layer]], *self._free[layer, :count]]
            assert sorted(ids) == list(range(1, self.pages + 1)), "a page is lost or twice"

    def _shortage(self, counts: NDArray[np.int64]) -> str:
        """What is said where layers [L] are asked for so many more pages than they have."""
        layers = len(counts)
        layer = int((counts - self.free).argmax())
        return (
            f"out of pages: the KV cache has {self.pages} pages of {PAGE} slots in each of {layers} layers "
            f"({self.pages * layers * self.page_bytes} bytes); layer {layer} has {self.pages - self.free[layer]} in "
            f"use, and {counts[layer]} more are asked for; {self.knob}"
        )
