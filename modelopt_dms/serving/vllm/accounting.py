# SPDX-License-Identifier: Apache-2.0
"""How many blocks of a paged pool a request must hold, where every layer and KV head keeps another number of tokens.

Numbers only; knows no engine. A request's blocks form one *slab*. A block is cut into pages of `page` tokens of one
KV head, as many as the rank has (layer, KV head) lists, and any list of the request may use any page of its slab.

What lists hold is decided on the workers, so the scheduler hears of it a step late. It reserves for the worst case of
the tokens that it has scheduled and not heard of yet (no list evicts anything), and gives back what was not needed:

    blocks(u) = max over ranks of ceil(sum over lists of ceil((live + u) / page) / lists)

after u such tokens. It never reserves more than `limit` for one request: past it, a request is *capped*, its workers
make room by force (`modelopt_dms.kvcache.forced_eviction`), and it finishes however little its gates evict.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Usage:
    """What the lists of one request hold on one rank.

    Attributes:
        lists: layers x KV heads of the rank; also the pages of a block.
        pages: that the lists own.
        room: (free slots in a list's last page, number of lists that have as many), of lists that own a page or not.
        forced: tokens that were evicted by force so far.
    """

    lists: int
    pages: int
    room: tuple[tuple[int, int], ...]
    forced: int = 0

    @staticmethod
    def of(live: list[int], page: int, forced: int = 0) -> "Usage":
        """From the length of every list."""
        counted: dict[int, int] = {}
        for tokens in live:
            free = -tokens % page
            counted[free] = counted.get(free, 0) + 1
        pages = sum(-(-tokens // page) for tokens in live)
        return Usage(len(live), pages, tuple(sorted(counted.items())), forced)

    def pages_after(self, tokens: int, page: int) -> int:
        """Pages for `tokens` more in every list."""
        more = (n * -(-max(0, tokens - free) // page) for free, n in self.room)
        return self.pages + sum(more)

    def blocks_after(self, tokens: int, page: int) -> int:
        """Blocks for them."""
        return -(-self.pages_after(tokens, page) // self.lists)


@dataclass
class Entry:
    """A request that holds blocks.

    Attributes:
        epoch: which of the times that the request was started: a report of an earlier one is void.
        held: blocks.
        settled: tokens that all ranks have reported about.
        scheduled: tokens that ranks have been given.
        usage: by rank, after `settled` tokens; empty before the first report.
    """

    epoch: int
    held: int = 0
    settled: int = 0
    scheduled: int = 0
    usage: dict[str, Usage] = field(default_factory=dict)


class Ledger:
    """What the scheduler knows of the slabs of all requests."""

    def __init__(self, page: int, limit: int, least: int) -> None:
        """Start with no request.

        Args:
            page: tokens of a page.
            limit: blocks that one request may hold.
            least: blocks with which forced eviction always finds room; see `least_blocks`.

        Raises:
            ValueError: the limit is below that.
        """
        if limit < least:
            raise ValueError(
                f"a request may hold {limit} blocks of {page} tokens, but {least} are always resident (delay window, "
                "protected first tokens and new ones); give the KV cache more memory, or raise max_request_blocks"
            )
        self.page, self.limit = page, limit
        self._entries: dict[str, Entry] = {}
        self._epochs = 0

    def __contains__(self, request: str) -> bool:
        return request in self._entries

    def __getitem__(self, request: str) -> Entry:
        return self._entries[request]

    def worst_case(self, request: str, tokens: int) -> int:
        """Blocks that a request needs at most once it has taken in so many tokens in all, whatever the limit."""
        entry = self._entries.get(request)
        if entry is None or not entry.usage:
            return -(-tokens // self.page)
        unsettled = max(0, tokens - entry.settled)
        return max(x.blocks_after(unsettled, self.page) for x in entry.usage.values())

    def missing(self, request: str, tokens: int) -> int:
        """Blocks that a request must get before it is given tokens up to this many in all."""
        held = self._entries[request].held if request in self._entries else 0
        return max(0, min(self.worst_case(request, tokens), self.limit) - held)

    def grow(self, request: str, tokens: int) -> int:
        """Note that a request gets them, and is given the tokens: how many blocks."""
        more = self.missing(request, tokens)
        entry = self._entries.get(request)
        if entry is None:
            self._epochs += 1
            entry = self._entries[request] = Entry(self._epochs)
        entry.held += more
        entry.scheduled = max(entry.scheduled, tokens)
        return more

    def is_capped(self, request: str) -> bool:
        """Whether what a request holds may not do for the tokens it was given, so that its lists must be cut."""
        entry = self._entries[request]
        return self.worst_case(request, entry.scheduled) > entry.held

    def settle(self, request: str, epoch: int, tokens: int, usage: Mapping[str, Usage]) -> int:
        """Take in a report of all ranks: how many blocks, the last ones, the request gives back.

        It keeps what it needs for the tokens that it was given, and for one more. A report of an earlier life of the
        request is ignored.

        Args:
            request: its name.
            epoch: that the ranks were told.
            tokens: that they have taken in.
            usage: by rank.
        """
        entry = self._entries.get(request)
        if entry is None or entry.epoch != epoch or tokens < entry.settled:
            return 0
        entry.settled, entry.usage = tokens, dict(usage)
        kept = min(self.worst_case(request, max(entry.scheduled, tokens + 1)), self.limit)
        surplus = max(0, entry.held - kept)
        entry.held -= surplus
        return surplus

    def close(self, request: str) -> int:
        """Forget a request: how many blocks it gives back."""
        entry = self._entries.pop(request, None)
        return 0 if entry is None else entry.held


def least_blocks(window: int, protect_first: int, page: int) -> int:
    """Blocks with which every list can keep what may not be evicted, and take in a page of new tokens."""
    return math.ceil((window + 1 + protect_first + page) / page)
