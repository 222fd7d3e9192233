# SPDX-License-Identifier: Apache-2.0
"""The pages that layers of a cache share, and when there must be more of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from modelopt_dms.kernels import dispatch
from modelopt_dms.kernels.layout import NO_PAGE, PAGE, PagePool, PageTables, RowLayout
from modelopt_dms.kernels.prefill_reference import NEVER, expiring


class Store(Protocol):
    """What a pool knows of a layer: `kvcache.paged_head_caches.PagedHeadCaches`."""

    state: PageTables

    @property
    def lists(self) -> int:
        """Number of lists, B * K."""

    def release(self, sequences: Tensor) -> None:
        """Finished sequences [B] bool give their pages back and take in nothing more."""


class SharedPool:
    """The pages of layers of a cache that store rows alike on one device, and which of its sequences are active.

    A pool with a limit has its size from the start, and whoever uses it calls `check` now and then. One without grows
    before it could run out: the host knows an upper bound of what is in use, and asks the device only where that is not
    enough.

    Attributes:
        device: where the pages are.
        impl: "triton" or "reference".
        batch: sequences, or None to take their number from the first append.
        width: pages that a list can own at first; tables with a limit keep it.
        max_bytes: of all pages; None is no limit.
        layers: how many layers there will be, for a first guess at the size.
        stores: the layers so far.
        pool: the pages; replaced where they grow.
        active: [B] bool, one tensor for all layers.
    """

    pool: PagePool
    active: Tensor

    def __init__(
        self,
        device: torch.device,
        impl: str = "auto",
        *,
        batch: int | None = None,
        width: int = 1,
        max_bytes: int | None = None,
        layers: int = 1,
    ) -> None:
        """Make a pool that takes the shapes of rows from the first layer's first append.

        Raises:
            ValueError: `impl` cannot run on this device.
        """
        self.device = device
        self.impl = dispatch.choose(impl, device)
        self.batch = batch
        self.width = width
        self.max_bytes = max_bytes
        self.layers = layers
        self.stores: list[Store] = []
        self._free = 0  # pages, when the device was last asked
        self._since: dict[Store, int] = {}  # tokens that each layer took in since
        self._taken = 0  # pages that they took at most
        self._expiries: Tensor | None = None  # NEVER everywhere, but within `expiries`

    @property
    def kv_bytes(self) -> int:
        """Bytes of all pages, free ones included."""
        return self.pool.pages * self.pool.page_bytes

    def join(self, store: Store, layouts: tuple[RowLayout, RowLayout], like: Tensor) -> None:
        """Let a layer with rows like [B, K, T, D] in; the first one decides on shapes.

        Raises:
            ValueError: the layer's rows lie otherwise than those of the layers before it, or B is another.
        """
        batch = len(like)
        allowed = self.batch if self.batch is not None or not self.stores else len(self.active)
        if allowed is not None and batch != allowed:
            raise ValueError(f"this cache holds {allowed} sequences, got {batch}")
        if not self.stores:
            pages = self._limit(layouts, batch * like.shape[1])
            self.pool = PagePool.make(pages, *layouts, like.device)
            self.active = torch.ones(batch, dtype=torch.bool, device=like.device)
            self._free = pages
        held = (self.pool.key_layout, self.pool.value_layout)
        if layouts != held:
            raise ValueError(
                f"layers that share pages must store rows alike: got {layouts}, the pages hold {held}"
            )
        self.stores.append(store)

    def leave(self, store: Store) -> None:
        """Forget a layer that owns no pages any more."""
        self.stores.remove(store)
        self._since.pop(store, None)

    def with_batch(self, batch: int) -> Tensor:
        """`active` of so many sequences, all of them active.

        Raises:
            ValueError: the cache is for another number.
        """
        if self.batch is not None and batch != self.batch:
            raise ValueError(f"this cache holds {self.batch} sequences, got {batch}")
        if batch == len(self.active):
            self.active.fill_(True)
        else:
            self.active = torch.ones(batch, dtype=torch.bool, device=self.active.device)
        return self.active

    def release(self, sequences: Tensor) -> None:
        """Finished sequences [B] bool give their pages back and take in nothing more; on the device."""
        for store in self.stores:
            store.release(sequences)

    def check(self) -> int:
        """The most pages ever in use. Waits for the device.

        Raises:
            OutOfPagesError: rows were lost, because the pool was too small.
        """
        option = "raise max_cache_bytes, or let fewer sequences in at a time"
        return self.pool.check(option)

    def reserve(self, store: Store, tokens: int, wanted: Callable[[], Tensor]) -> None:
        """See to it that a layer can take in tokens; asks the device only if what it knows does not suffice.

        Args:
            store: the layer.
            tokens: that every list of the layer may grow by.
            wanted: gives pages, bool of any shape; those True are all that it can take now.
        """
        if self.max_bytes is not None:
            return
        # A list that grew by n slots since took at most ceil(n / PAGE) pages.
        before = self._since.get(store, 0)
        self._since[store] = before + tokens
        self._taken += store.lists * (-(-(before + tokens) // PAGE) - -(-before // PAGE))
        if self._taken > self._free:
            self.reserve_exactly(wanted(), store.lists)

    def reserve_exactly(self, wanted: Tensor, lists: int) -> None:
        """Ask the device, and grow where pages are missing.

        Args:
            wanted: bool of any shape; as many pages as are True will be taken next.
            lists: of a layer; there will be a page more for each.
        """
        if self.max_bytes is not None:
            return
        needed, free = torch.stack([wanted.sum(), self.pool.counters[0]]).tolist()
        self._forget(free - needed)
        # With a page more for every list, the next PAGE tokens need no asking.
        spare = max(self.layers, len(self.stores)) * lists
        if self._free < spare:
            if self.pool.pages == 0:
                extra = needed * self.layers + spare
            else:
                extra = max(spare - self._free, self.pool.pages // 8)
            self._grow(free, extra)

    def make_room(self, tokens: int, expected: float = 1.0) -> bool:
        """Make room for tokens (at most PAGE) of every list, and check; whether pages moved. Waits for the device.

        Args:
            tokens: that a captured graph will take in without a word to the host.
            expected: how many times as many pages as now will be in use at the end, as far as anybody knows.

        Raises:
            OutOfPagesError: see `check`.
        """
        assert tokens <= PAGE, "a list could take more than one page"
        self.check()
        if self.max_bytes is not None:
            return False
        free = int(self.pool.counters[0])
        self._forget(free)
        used = self.pool.pages - free
        wanted = sum(x.lists for x in self.stores) + int((expected - 1.0) * used)
        if free < wanted:
            self._grow(free, max(wanted - free, self.pool.pages // 8))
        return free < wanted

    @contextmanager
    def expiries(self, lists: PageTables) -> Iterator[Tensor]:
        """As `prefill_reference.expiry` [B, K, S] of all slots that pages hold and a page more, while inside.

        All layers use one tensor. Only what is in the ring can expire: to make one anew, for every layer and chunk of a
        prompt, would cost as much as the context is long.
        """
        length = lists.table.shape[2] * PAGE
        shape = (lists.batch, lists.heads, length + PAGE)
        if self._expiries is None or self._expiries.shape != shape:
            self._expiries = torch.full(shape, NEVER, dtype=torch.int32, device=lists.live.device)
        slots, last = expiring(lists, length)
        try:
            yield self._expiries.scatter_(2, slots, last)
        finally:
            self._expiries.scatter_(2, slots, NEVER)

    def _forget(self, free: int) -> None:
        """The device was asked: so many pages are free."""
        self._since.clear()
        self._taken, self._free = 0, free

    def check_integrity(self) -> None:
        """Raise AssertionError if a page has two owners, or none. Waits for the device."""
        free = self.pool.free[: int(self.pool.counters[0])].tolist()
        owned = [x.state.table.flatten() for x in self.stores]
        pages = free + [page for page in torch.cat(owned).tolist() if page != NO_PAGE]
        assert len(set(pages)) == len(pages), "two lists share a page"
        assert sorted(pages) == list(range(1, self.pool.pages + 1)), "pages were lost"

    def _limit(self, layouts: tuple[RowLayout, RowLayout], lists: int) -> int:
        """Pages of a pool with a limit; 0 without.

        Raises:
            ValueError: not a page for every list.
        """
        if self.max_bytes is None:
            return 0
        page = PAGE * sum(x.row_bytes for x in layouts)
        pages, needed = self.max_bytes // page, self.layers * lists
        if pages < needed:
            raise ValueError(
                f"max_cache_bytes={self.max_bytes} is {pages} pages of {page} bytes, but {needed} lists ({self.layers} "
                f"layers x {lists} of sequences and KV heads) need one each: at least {needed * page} bytes"
            )
        return pages

    def _grow(self, free: int, extra: int) -> None:
        """Make the pool larger by `extra` pages, of which `free` are free now."""
        old = self.pool
        new = PagePool.make(old.pages + extra, old.key_layout, old.value_layout, old.free.device)
        for name in ("keys", "values", "key_scales", "value_scales"):
            if getattr(old, name) is not None:
                getattr(new, name)[: old.pages + 1] = getattr(old, name)
        # `free` of the new pool starts with the new ids, highest first.
        new.free[extra : extra + free] = old.free[:free]
        new.counters.copy_(old.counters + extra)
        self.pool = new
        self._free += extra
