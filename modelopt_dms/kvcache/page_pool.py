# SPDX-License-Identifier: Apache-2.0
"""The pages that layers of a cache share, and when there must be more of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from modelopt_dms.kernels import dispatch
from modelopt_dms.kernels.append_reference import wanted_pages
from modelopt_dms.kernels.layout import (
    NO_PAGE,
    PAGE,
    OutOfPagesError,
    PagePool,
    PageTables,
    RowLayout,
)
from modelopt_dms.kernels.prefill_reference import NEVER, expiring
from modelopt_dms.kvcache.forced_eviction import LOOKAHEAD, kept_anyway, lengths_that_fit
from modelopt_dms.kvcache.usage import PoolSize

OnFull = Literal["error", "evict"]


class Store(Protocol):
    """What a pool knows of a layer: `kvcache.paged_head_caches.PagedHeadCaches`."""

    state: PageTables
    seen: int
    window: int

    @property
    def lists(self) -> int:
        """Number of lists, B * K."""

    def release(self, sequences: Tensor) -> None:
        """Finished sequences [B] bool give their pages back and take in nothing more."""

    def cut(self, live: Tensor) -> None:
        """Lists lose their oldest tokens until they have these lengths [B, K]; see `kvcache.forced_eviction`."""


class SharedPool:
    """The pages of layers of a cache that store rows alike on one device, and which of its sequences are active.

    A pool with a limit has its size from the start, and whoever uses it calls `check` now and then. One without grows
    before it could run out: the host knows an upper bound of what is in use, and asks the device only where that is not
    enough. Where the length of sequences is known (`expect`), such a pool begins with what they should need.

    Attributes:
        device: where the pages are.
        impl: "triton" or "reference".
        batch: sequences, or None to take their number from the first append.
        width: pages that a list can own at first; tables with a limit keep it.
        max_bytes: of all pages; None is no limit.
        layers: how many layers there will be, for a first guess at the size.
        on_full: "evict" makes room in a pool with a limit; see `kvcache.forced_eviction`.
        protect_first: tokens at the start that it does not evict.
        stores: the layers so far.
        pool: the pages; replaced where they grow.
        size: bytes of them, for who may not hold them.
        positions: of the tokens in all slots [N + 1, PAGE] int32, if on_full is "evict", else None.
        active: [B] bool, one tensor for all layers.
    """

    pool: PagePool
    size: PoolSize
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
        on_full: OnFull = "error",
        protect_first: int = 0,
    ) -> None:
        """Make a pool that takes the shapes of rows from the first layer's first append.

        Raises:
            ValueError: `impl` cannot run on this device, or `on_full` is not known or has no limit to be full at.
        """
        if on_full not in get_args(OnFull):
            raise ValueError(f"on_full={on_full!r} must be 'error' or 'evict'")
        if on_full == "evict" and max_bytes is None:
            raise ValueError("on_full='evict' needs max_cache_bytes: without it the pool grows")
        self.on_full = on_full
        self.protect_first = protect_first
        self.positions: Tensor | None = None
        self.device = device
        self.impl = dispatch.choose(impl, device)
        self.batch = batch
        self.width = width
        self.max_bytes = max_bytes
        self.layers = layers
        self.stores: list[Store] = []
        self._length = 0  # tokens of a sequence at the end, if known
        self._pages_per_list = 0  # that they should need then
        self._granted: dict[Store, int] = {}  # tokens that each layer can take in without asking
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
            lists = batch * like.shape[1]
            pages = self._pages_per_list * self.layers * lists
            if self.max_bytes is not None:
                pages = self._limit(self.max_bytes, layouts, lists, store.window)
            # Else that of layers that have left would exist until there is the new one.
            vars(self).pop("pool", None)
            self.pool = PagePool.make(pages, *layouts, like.device)
            if self.on_full == "evict":
                shape = (pages + 1, PAGE)
                self.positions = torch.zeros(shape, dtype=torch.int32, device=like.device)
            self.size = PoolSize(self.kv_bytes)
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
        self._granted.pop(store, None)

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
        return self.pool.check(
            "raise max_cache_bytes, let fewer sequences in at a time, or pass on_full='evict'"
        )

    def expect(self, length: int, pages_per_list: int) -> None:
        """Sequences will be so long, and should need so many pages a list: reserve those now, or with the first rows.

        Waits for the device if there are pages already. A pool with a limit has its size.
        """
        self._length, self._pages_per_list = length, pages_per_list
        if self.max_bytes is not None or not self.stores:
            return
        extra = pages_per_list * sum(x.lists for x in self.stores) - self.pool.pages
        if extra > 0:
            self._grow(int(self.pool.counters[0]), extra)

    def reserve(self, store: Store, tokens: int, live: Callable[[], Tensor]) -> bool:
        """See to it that a layer can take in tokens; asks the device only if what it knows does not suffice.

        Args:
            store: the layer.
            tokens: that every list of the layer may grow by.
            live: gives the lengths [B, K] of its lists with them, or more.

        Returns:
            Whether slots changed: a plan that was made for them must be made anew.

        Raises:
            OutOfPagesError: not even by eviction; nothing changed.
        """
        if self.max_bytes is not None and self.on_full == "error":
            return False
        left = self._granted.get(store, 0) - tokens
        self._granted[store] = max(0, left)
        if left >= 0:
            return False
        # A list that grew by n slots since took at most ceil(n / PAGE) pages.
        before = self._since.get(store, 0)
        self._since[store] = before + tokens
        self._taken += store.lists * (-(-(before + tokens) // PAGE) - -(-before // PAGE))
        if self._taken <= self._free:
            return False
        after = live()
        wanted = wanted_pages(store.state, after)
        if self.on_full == "error":
            self.reserve_exactly(wanted, store.lists)
            return False
        needed, free = torch.stack([wanted.sum(), self.pool.counters[0]]).tolist()
        self._forget(free - needed)
        if needed <= free:
            return False
        if tokens == 1:
            self._evict(LOOKAHEAD)
            self._granted[store] -= 1
        else:
            self._evict(0, {store: (after - store.state.live).clamp(min=0)})
        return True

    def reserve_exactly(self, wanted: Tensor, lists: int) -> None:
        """Ask the device, and grow where pages are missing.

        Args:
            wanted: bool of any shape; as many pages as are True will be taken next.
            lists: of a layer; there will be a page more for each.
        """
        if self.max_bytes is not None and self.on_full == "error":
            return
        needed, free = torch.stack([wanted.sum(), self.pool.counters[0]]).tolist()
        self._forget(free - needed)
        if self.max_bytes is not None:
            if needed > free:
                self._evict(0, extra=needed)
            return
        # With a page more for every list, the next PAGE tokens need no asking. A reserve has none to spare.
        spare = 0 if self._pages_per_list else max(self.layers, len(self.stores)) * lists
        if self._free < spare:
            if self.pool.pages == 0:
                extra = needed * self.layers + spare
            else:
                extra = max(spare - self._free, self.pool.pages // 8)
            self._grow(free, extra)

    def make_room(self, tokens: int) -> bool:
        """Make room for tokens (at most PAGE) of every list, and check; whether pages moved. Waits for the device.

        Until they are taken in, no layer asks the device: a captured graph can take them in without a word to the host.

        Raises:
            OutOfPagesError: see `check`.
        """
        assert tokens <= PAGE, "a list could take more than one page"
        self.check()
        if self.max_bytes is not None and self.on_full == "error":
            return False
        free = int(self.pool.counters[0])
        # Pages that these tokens take are counted by nobody: who wants more must ask.
        self._grant(tokens)
        if free >= sum(x.lists for x in self.stores):
            return False
        wanted = int(torch.stack([_wanted(x.state, tokens) for x in self.stores]).sum())
        if wanted <= free:
            return False
        if self.on_full == "evict":
            self._evict(tokens)
            return False
        self._grow(free, max(wanted - free, self._missing(free)))
        self._grant(tokens)
        return True

    def _evict(
        self, tokens: int, growth: dict[Store, Tensor] | None = None, extra: int = 0
    ) -> None:
        """Make room by force, see `kvcache.forced_eviction`; waits for the device.

        Args:
            tokens: of every list of an active sequence, for which there is room afterwards.
            growth: of lists of some layers [B, K], instead.
            extra: pages that are free afterwards besides.

        Raises:
            OutOfPagesError: that is impossible; nothing changed.
        """
        numbers: list[Tensor] = []
        for store in self.stores:
            state = store.state
            more = (growth or {}).get(store, tokens * state.active[:, None].expand_as(state.live))
            least = kept_anyway(state, self.protect_first)
            numbers.append(torch.stack([state.live, more, least]).flatten(1))
        live, more_of, least_of = torch.cat(numbers, dim=1).tolist()
        found = lengths_that_fit(live, more_of, least_of, self.pool.pages - extra)
        if found is None:
            raise OutOfPagesError(
                f"the KV cache ran out of pages: {self.pool.pages} of {PAGE} slots ({self.kv_bytes} bytes) are too "
                "few, even if all is evicted that may be (delay windows, protected tokens and new ones stay); raise "
                "max_cache_bytes, or let fewer sequences in at a time"
            )
        lengths = torch.tensor(found, dtype=torch.int32, device=self.device)
        parts = lengths.split([x.lists for x in self.stores])
        for store, part in zip(self.stores, parts, strict=True):
            store.cut(part.view_as(store.state.live))
        self._grant(tokens)

    def _grant(self, tokens: int) -> None:
        """Let every layer take in so many tokens without asking, and then ask."""
        self._forget(0)
        self._granted = dict.fromkeys(self.stores, tokens)

    def took(self, store: Store, tokens: int) -> None:
        """A captured graph took in so many tokens of a layer (negative: it did not, after all)."""
        self._granted[store] = max(0, self._granted.get(store, 0) - tokens)

    def _missing(self, free: int) -> int:
        """Pages by which to grow where a reserve was too small: what is in use, at the length of the end."""
        seen = max(x.seen for x in self.stores)
        if not self._length or not seen:
            return self.pool.pages // 8
        whole = sum(x.lists for x in self.stores) * -(-self._length // PAGE)
        expected = -(-(self.pool.pages - free) * self._length // seen)
        return min(expected, whole) - self.pool.pages

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
        self._granted.clear()  # for which the free pages were meant
        self._taken, self._free = 0, free

    def check_integrity(self) -> None:
        """Raise AssertionError if a page has two owners, or none. Waits for the device."""
        free = self.pool.free[: int(self.pool.counters[0])].tolist()
        owned = [x.state.table.flatten() for x in self.stores]
        pages = free + [page for page in torch.cat(owned).tolist() if page != NO_PAGE]
        assert len(set(pages)) == len(pages), "two lists share a page"
        assert sorted(pages) == list(range(1, self.pool.pages + 1)), "pages were lost"

    def _limit(
        self, max_bytes: int, layouts: tuple[RowLayout, RowLayout], lists: int, window: int
    ) -> int:
        """Pages of a pool with a limit.

        Raises:
            ValueError: not a page for every list, or not as many as cannot be evicted.
        """
        each = 1
        if self.on_full == "evict":
            each = -(-(window + 1 + self.protect_first + LOOKAHEAD) // PAGE)
        page = PAGE * sum(x.row_bytes for x in layouts)
        pages, needed = max_bytes // page, each * self.layers * lists
        if pages < needed:
            raise ValueError(
                f"max_cache_bytes={max_bytes} is {pages} pages of {page} bytes, but {self.layers * lists} lists "
                f"({self.layers} layers x {lists} of sequences and KV heads) need {'one' if each == 1 else each} each: "
                f"at least {needed * page} bytes"
            )
        return pages

    def _grow(self, free: int, extra: int) -> None:
        """Make the pool larger by `extra` pages, of which `free` are free now.

        Tensor by tensor, each old one freed before the next new one is taken: what exists at the worst is the new pool
        and one old tensor (of rows alike, half of the old pool), not both pools.
        """
        pages = self.pool.pages + extra
        # The new ids, highest first, and behind them those that were free.
        ids = torch.arange(pages, -1, -1, dtype=torch.int32, device=self.pool.free.device)
        ids[extra : extra + free] = self.pool.free[:free]
        counters = self.pool.counters + extra
        # Pages are counted by `keys`: where memory ends before, the pool is as large as it was.
        for name in ("key_scales", "value_scales", "values"):
            if getattr(self.pool, name) is not None:
                longer: dict[str, Any] = {name: _longer(getattr(self.pool, name), pages + 1)}
                self.pool = replace(self.pool, **longer)
        keys = _longer(self.pool.keys, pages + 1)
        self.pool = replace(self.pool, keys=keys, free=ids, counters=counters)
        self.size.bytes = self.kv_bytes
        self._free += extra


def _longer(x: Tensor, length: int) -> Tensor:
    """A copy with zeros behind; itself if a growth that failed has made it already."""
    if len(x) >= length:
        return x
    longer = x.new_zeros(length, *x.shape[1:])
    longer[: len(x)] = x
    return longer


def _wanted(lists: PageTables, tokens: int) -> Tensor:
    """Pages [] that a layer's lists may lack for so many tokens more of every active sequence."""
    live = torch.where(lists.active[:, None], lists.live + tokens, 0)
    return wanted_pages(lists, live).sum()
