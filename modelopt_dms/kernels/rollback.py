# SPDX-License-Identifier: Apache-2.0
"""What the last tokens overwrote in paged lists, so that they can be taken back. Tensors on the device only.

Shapes: U tokens that can be taken back, B sequences, K KV heads. The token at position p is logged in entry p % U.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_dms.kernels.layout import PagePool, PageTables, RowLayout

ROLLBACK = 24  # tokens that can be taken back unless more is asked for; assisted decoding drafts 20 by default
# A chunk up to this length may be a draft, all of which can be taken back until the next chunk: 64 tokens, and the one
# before them.
LONGEST_DRAFT = 65


def one_by_one(tokens: int, rollback: int) -> int:
    """How many of the last of these tokens are appended one by one, so that they can be taken back one by one.

    Args:
        tokens: appended together, none of them padding.
        rollback: tokens that must be recoverable; 0 if nothing is ever taken back.
    """
    if tokens == 1 or (rollback and tokens <= max(rollback, LONGEST_DRAFT)):
        return tokens
    return rollback


@dataclass(frozen=True)
class UndoLog:
    """A ring of what U appended tokens replaced.

    Attributes:
        keys: codes [U, B, K, .] that stood in the slot the token took; they mean nothing where the list grew.
        values: likewise.
        key_scales: scales [U, B, K, S] of those rows, or None.
        value_scales: likewise.
        expired: slot [U, B, K] int32 of the token that left the window, -1 if there was none.
        marked: whether [U, B, K] that token was marked.
        live: length [U, B, K] int32 of the list before the token.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    expired: Tensor
    marked: Tensor
    live: Tensor

    @staticmethod
    def make(tokens: int, pool: PagePool, lists: PageTables) -> "UndoLog":
        """An empty log of up to `tokens` tokens."""
        shape = (tokens, lists.batch, lists.heads)
        device = lists.live.device

        def rows(layout: RowLayout) -> Tensor:
            return torch.zeros(*shape, layout.codes, dtype=layout.dtype, device=device)

        def scales(layout: RowLayout) -> Tensor | None:
            if layout.scales is None:
                return None
            width, dtype = layout.scales
            return torch.zeros(*shape, width, dtype=dtype, device=device)

        k, v = pool.key_layout, pool.value_layout
        slots = torch.zeros(shape, dtype=torch.int32, device=device)
        marks = torch.zeros(shape, dtype=torch.bool, device=device)
        return UndoLog(
            rows(k), rows(v), scales(k), scales(v), slots, marks, torch.zeros_like(slots)
        )

    @property
    def tokens(self) -> int:
        """U."""
        return len(self.live)

    @property
    def row_bytes(self) -> int:
        """Bytes of the rows it holds room for."""
        rows = (self.keys, self.values, self.key_scales, self.value_scales)
        return sum(x.numel() * x.element_size() for x in rows if x is not None)


def record(
    log: UndoLog, pool: PagePool, lists: PageTables, slots: Tensor, expired: Tensor, marked: Tensor
) -> None:
    """Log, before it happens, that the next token goes to slots [B, K]; of active sequences only.

    Args:
        log: is changed.
        pool: where the rows still stand.
        lists: before the token.
        slots: -1 where the row is lost.
        expired: slot [B, K] of the token that left the window.
        marked: whether [B, K] it was marked.
    """
    rows = lists.rows_of(slots[..., None])[..., 0]  # [B, K]
    new = (expired, marked, lists.live)
    pairs = [*zip((log.expired, log.marked, log.live), new, strict=True)]
    pairs += [(kept, stored.flatten(0, 1)[rows]) for kept, stored in _stores(log, pool)]
    for kept, now in pairs:
        index = _entry(log, lists, lists.seen, kept)
        active = lists.active.view(-1, *[1] * (now.ndim - 1))
        kept.scatter_(0, index, torch.where(active, now, kept.gather(0, index)[0])[None])


def take_back(log: UndoLog, pool: PagePool, lists: PageTables) -> None:
    """Undo the last token of every active sequence; it must be in the log. On the device."""
    active = lists.active[:, None]
    seen = lists.seen - 1  # [B, K]

    def logged(kept: Tensor) -> Tensor:
        return kept.gather(0, _entry(log, lists, seen, kept))[0]

    live, expired, marked = (logged(x) for x in (log.live, log.expired, log.marked))
    column = (seen.clamp(min=0) % lists.ring).long()[..., None]
    reused = active & (live == lists.live)
    slots = torch.where(reused, expired, -1)
    rows = lists.rows_of(slots[..., None])[..., 0]
    for kept, stored in _stores(log, pool):
        stored.flatten(0, 1)[rows] = logged(kept)
    lists.live.copy_(torch.where(active, live, lists.live))
    lists.seen.copy_(torch.where(active, seen, lists.seen))
    for ring, before in ((lists.ring_slot, expired), (lists.ring_evict, marked)):
        now = ring.gather(2, column)
        ring.scatter_(2, column, torch.where(active[..., None], before[..., None], now))
    # The decision that the token taken back made about the one before it is gone too.
    decide_previous(lists, torch.zeros_like(reused))


def decide_previous(lists: PageTables, decisions: Tensor) -> None:
    """With shift 1: the first new token's decision [B, K] governs the last token held. On the device."""
    if lists.shift:
        column = ((lists.seen - 1) % lists.ring).long()[..., None]
        now = lists.ring_evict.gather(2, column)
        known = (lists.active[:, None] & (lists.seen > 0))[..., None]
        lists.ring_evict.scatter_(2, column, torch.where(known, decisions[..., None], now))


def _entry(log: UndoLog, lists: PageTables, seen: Tensor, kept: Tensor) -> Tensor:
    """Index [1, B, K, ...] along U, for a tensor of the log, of the token at position seen [B, K]."""
    index = (seen % log.tokens).long()
    return index.view(1, *index.shape, *[1] * (kept.ndim - 3)).expand(1, *kept.shape[1:])


def _stores(log: UndoLog, pool: PagePool) -> list[tuple[Tensor, Tensor]]:
    """Each tensor of rows in the log, with the one of the pool."""
    kept = (log.keys, log.values, log.key_scales, log.value_scales)
    stored = (pool.keys, pool.values, pool.key_scales, pool.value_scales)
    return [(x, y) for x, y in zip(kept, stored, strict=True) if x is not None and y is not None]
