# SPDX-License-Identifier: Apache-2.0
"""Slots for one layer's KV rows in pages on a device, which all layers of a cache share.

`PagedHeadCaches` keeps what `head_caches.HeadCaches` keeps, and both follow `LayerCache`; what it does with tokens
stands in `kernels.append` and `kernels.append_reference`.

Shapes: B sequences, K KV heads, T new tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modelopt_dms.kernels import append_reference, dispatch, reorder
from modelopt_dms.kernels.gating import Decided, GateInput
from modelopt_dms.kernels.layout import NO_PAGE, PAGE, PagePool, PageTables, RowLayout
from modelopt_dms.kernels.number_formats import RowFormat
from modelopt_dms.kernels.prefill_reference import expiry
from modelopt_dms.kernels.rollback import (
    LONGEST_DRAFT,
    UndoLog,
    decide_previous,
    one_by_one,
    take_back,
)
from modelopt_dms.kernels.rows import read_rows, stored_rows
from modelopt_dms.kvcache import forced_eviction
from modelopt_dms.kvcache.layer_cache import check_recoverable, check_slots
from modelopt_dms.kvcache.page_pool import SharedPool
from modelopt_dms.kvcache.usage import PoolSize, Usage


@dataclass
class PagedUsage:
    """What a layer's cache holds. Waits for the device in `synchronized`, not when it is made.

    Attributes:
        state: the layer's lists, without their rows.
        padding: positions [B] that were padding.
        page_bytes: of a page.
        log_bytes: of the rows held for a rollback.
        row_bytes: of one key and value row.
        row_values: numbers in one key and value row.
        pool: size of the pool that the pages are of.
    """

    state: PageTables
    padding: Tensor
    page_bytes: int
    log_bytes: int
    row_bytes: int
    row_values: int
    pool: PoolSize

    def synchronized(self) -> Usage:
        """The numbers as they are now."""
        state = self.state
        pages = int((state.table != NO_PAGE).sum())
        return Usage(
            live=state.live.long(),
            tokens=state.seen[:, 0] - self.padding,
            kv_bytes=pages * self.page_bytes + self.log_bytes,
            row_bytes=self.row_bytes,
            row_values=self.row_values,
            pool=self.pool,
            log_bytes=self.log_bytes,
        )


class PagedHeadCaches:
    """The `LayerCache` of a device: B sequences and K KV heads, in pages.

    Attributes:
        seen: positions, padding included, as the host knows; those of a sequence stand in `state`.
        rollback: tokens that can be taken back; 0 until somebody wants more, since the log takes memory.
        state: the lists, for kernels.
        usage: what they hold.
        padding: positions [B] that were padding.
    """

    state: PageTables
    usage: PagedUsage
    padding: Tensor

    def __init__(
        self,
        window: int,
        shift: int,
        shared: SharedPool,
        formats: tuple[RowFormat | None, RowFormat | None] = (None, None),
        rollback: int = 0,
    ) -> None:
        """Make an empty cache; shapes are taken from the first append.

        Args:
            window: tokens a marked token stays readable.
            shift: 1 if a token's logit governs the token before it, else 0.
            shared: the pages.
            formats: number formats of the stored keys and values; None is the model's own dtype.
            rollback: tokens that can be taken back.
        """
        self.window = window
        self.shift = shift
        self.shared = shared
        self.formats = formats
        self.seen = 0
        self.rollback = rollback
        self._log: UndoLog | None = None
        self._recoverable = 0  # tokens in the log

    @property
    def pool(self) -> PagePool:
        """The pages, as they are now."""
        return self.shared.pool

    @property
    def impl(self) -> str:
        """What computes: "triton" or "reference"."""
        return self.shared.impl

    @property
    def B(self) -> int:
        """Sequences."""
        return self.state.batch

    @property
    def K(self) -> int:
        """KV heads."""
        return self.state.heads

    @property
    def lists(self) -> int:
        """Number of lists, B * K."""
        return self.B * self.K

    @property
    def live(self) -> Tensor:
        """Slots in use [B, K]."""
        return self.state.live

    def decide_previous(self, decisions: Tensor) -> None:
        """With shift 1: the first new token's decision [B, K] governs the last token held."""
        decide_previous(self.state, decisions)

    def expiry(self, length: int) -> Tensor:
        """The last position [B, K, length] int32 of a query that may read each slot; see `prefill_reference.expiry`."""
        return expiry(self.state, length)

    @contextmanager
    def expiries(self) -> Iterator[Tensor | None]:
        """The same for a chunk to read while inside, without making it anew; None where nothing is held."""
        if not self.seen:
            yield None
            return
        with self.shared.expiries(self.state) as found:
            # The reference reads as many slots as there are expiries.
            yield found if self.impl == "triton" else found[..., : self.seen]

    def read(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rows [B, K, length, D] of keys and values in this dtype; zeros behind a list's end."""
        slots = torch.arange(length, device=self.live.device)
        slots = torch.where(slots < self.live[..., None], slots, -1)
        return read_rows(self.pool, self.state, slots, dtype)

    def rows(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of list `index` = b * K + k; see `rows.stored_rows`."""
        return stored_rows(self.pool, self.state, index)

    def pending(self, index: int) -> tuple[Tensor, Tensor]:
        """Positions [N] and slots [N] of list `index`'s tokens that are marked and not yet evicted."""
        state, at = self.state, divmod(index, self.K)
        marked = state.ring_evict[at] & (state.ring_slot[at] >= 0)
        return state.ring_positions()[at][marked], state.ring_slot[at][marked]

    def append_token(
        self, k: Tensor, v: Tensor, gate: GateInput, valid: Tensor | None = None
    ) -> None:
        """Take in one token of every active sequence.

        Args:
            k: key rows [B, K, Dk], not encoded.
            v: value rows [B, K, Dv].
            gate: decisions [B, K], or what they are made from.
            valid: False [B] for padding, at which a sequence stands still; None if there is none.
        """
        self.prepare(k[:, :, None], v[:, :, None])
        state = self.state
        self.shared.reserve(self, 1, lambda: torch.where(state.active[:, None], state.live + 1, 0))
        if valid is not None:
            state = replace(state, active=state.active & valid)
        dispatch.append_token(k, v, gate, self.pool, state, impl=self.impl, log=self._log)
        if self.shared.positions is not None:
            forced_eviction.note_token(self.shared.positions, self.state)
        self.seen += 1
        if self._log is not None:
            self._recoverable = min(self._recoverable + 1, self._log.tokens)

    def append(self, k: Tensor, v: Tensor, decisions: Tensor, valid: Tensor | None) -> None:
        """See `LayerCache.append`; sequences that are not active take in nothing."""
        if self.rollback and valid is not None and bool(valid.all()):
            valid = None
        self.prepare(k, v)
        T = k.shape[2]
        bulk = T - (one_by_one(T, self.rollback) if valid is None else 0)
        if bulk:
            self._append_many(k[:, :, :bulk], v[:, :, :bulk], decisions[..., :bulk], valid)
        for t in range(bulk, T):
            self.append_token(k[:, :, t], v[:, :, t], Decided(decisions[..., t]))

    def advance(self, tokens: int) -> None:
        """A captured graph took in so many tokens of every active sequence."""
        self.seen += tokens
        self._recoverable = 0
        self.shared.took(self, tokens)

    def crop(self, tokens: int) -> None:
        """See `LayerCache.crop`; sequences that are not active keep what they have."""
        check_recoverable(self, tokens, self._recoverable)
        for _ in range(tokens):
            assert self._log is not None
            take_back(self._log, self.pool, self.state)
            if self.shared.positions is not None:
                forced_eviction.note_taken_back(self.shared.positions, self.state)
        self.seen -= tokens
        self._recoverable -= tokens

    def release(self, sequences: Tensor) -> None:
        """Finished sequences [B] bool give their pages back and take in nothing more; on the device."""
        reorder.release(self.state, self.pool, sequences)
        self.padding.masked_fill_(sequences, 0)

    def cut(self, live: Tensor) -> None:
        """Lists lose their oldest tokens until they have these lengths [B, K]; see `kvcache.forced_eviction`."""
        shared = self.shared
        assert shared.positions is not None
        forced_eviction.cut(self.state, self.pool, shared.positions, shared.protect_first, live)
        self._recoverable = 0

    def select(self, sequences: Tensor) -> None:
        """Keep these sequences [B'], in this order; one may be named several times (beams). Waits for the device.

        Raises:
            ValueError: one of them is not active, or the cache is of fixed size and B' is not B.
        """
        state = self.state
        sequences = sequences.to(state.live.device).long()
        if not bool(state.active[sequences].all()):
            raise ValueError(f"released sequences cannot be selected: got {sequences.tolist()}")
        active = self.shared.with_batch(len(sequences))
        reorder.drop(state, self.pool, reorder.unnamed(state, sequences))
        lists = len(sequences) * self.K
        self.shared.reserve_exactly(reorder.copied_pages(state, sequences), lists)
        pages = state.table[sequences].long()
        reorder.select(state, self.pool, sequences)
        if self.shared.positions is not None:
            self.shared.positions[state.table.long()] = self.shared.positions[pages]
        state.active = active
        self.padding = self.padding[sequences]
        self._log, self._recoverable = None, 0
        self._count()

    def emptied(self) -> "PagedHeadCaches":
        """These, after they have given their pages back."""
        self.clear()
        return self

    def clear(self) -> None:
        """Give all pages back and forget everything; the next append starts anew."""
        self.seen = self._recoverable = 0
        if not hasattr(self, "state"):
            return
        if self.shared.max_bytes is not None:
            reorder.drop(self.state, self.pool, torch.ones_like(self.state.active))
            self.pool.forget_shortage()
            self.padding.zero_()
            self.state.active.fill_(True)
            return
        # Whoever holds `usage` goes on reading what there was.
        self.pool.give_back(self.state.table.flatten())
        self.shared.leave(self)
        self._log = None
        del self.state, self.padding

    def check_integrity(self) -> None:
        """Raise AssertionError if a slot or a page is shared, out of range, or missing. Waits for the device."""
        self.shared.check_integrity()
        state = self.state
        own = append_reference.spanned_pages(state, state.live)
        assert bool((state.table[own] != NO_PAGE).all()), "a list lacks a page"
        assert bool((state.seen == state.seen[:, :1]).all()), "heads saw different lengths"
        check_slots(state.live, state.ring_slot, state.ring_positions())

    def _append_many(self, k: Tensor, v: Tensor, decisions: Tensor, valid: Tensor | None) -> None:
        T = k.shape[2]
        plan = append_reference.plan_pack(decisions, valid, self.state)
        if self.shared.reserve(self, T, lambda: plan.live):
            plan = append_reference.plan_pack(decisions, valid, self.state)
        positions, seen = self.shared.positions, self.state.seen.clone()
        if positions is not None:
            forced_eviction.note_moves(positions, self.state, plan)
        dispatch.apply_plan(plan, k, v, self.pool, self.state, impl=self.impl)
        if positions is not None:
            forced_eviction.note_chunk(positions, self.state, plan, seen)
        self.seen += T
        self._recoverable = 0
        if valid is not None:
            self.padding += torch.where(self.state.active, (~valid).sum(-1), 0)

    def prepare(self, k: Tensor, v: Tensor) -> None:
        """Make what is not there yet: the lists, room in their tables, the log."""
        T = k.shape[2]
        if not hasattr(self, "state"):
            k_format, v_format = self.formats
            layouts = (
                RowLayout.of(k_format, k.shape[-1], k.dtype),
                RowLayout.of(v_format, v.shape[-1], v.dtype),
            )
            self.shared.join(self, layouts, k)
            width = max(self.shared.width, -(-T // PAGE))
            B, K = k.shape[:2]
            active = self.shared.active
            self.state = PageTables.make(B, K, width, self.window, self.shift, active, self.formats)
            self.padding = torch.zeros(B, dtype=torch.int32, device=k.device)
            self._row_values = k.shape[-1] + v.shape[-1]
            self._count()
        pages = -(-(self.seen + T) // PAGE)
        width = self.state.table.shape[2]
        if pages > width:
            table = self.state.table.new_full((self.B, self.K, max(pages, 2 * width)), NO_PAGE)
            table[..., :width] = self.state.table
            self.state.table = table
            self._count()
        if self.rollback and (self._log is None or self._log.tokens < self.rollback):
            self._log = UndoLog.make(max(self.rollback, LONGEST_DRAFT), self.pool, self.state)
            self._recoverable = 0
            self._count()

    def _count(self) -> None:
        """Make `usage` anew."""
        pool, log = self.pool, self._log
        self.usage = PagedUsage(
            self.state,
            self.padding,
            pool.page_bytes,
            0 if log is None else log.row_bytes,
            pool.key_layout.row_bytes + pool.value_layout.row_bytes,
            self._row_values,
            self.shared.size,
        )
