# SPDX-License-Identifier: Apache-2.0
"""Slots for one layer's KV rows: what is kept, where, and until when.

Every (sequence, KV head) owns a dense list of slots, in buffers of its own that grow by pages. A ring remembers the
slots of the last W + 1 tokens and what was decided about them: when a marked token leaves the window, the newest token
overwrites its slot (`kernels.assign_slots`). So lists have no holes, and eviction frees memory for good.
"""

from collections import deque
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modelopt_dms.kernels import assign_slots, shift_decisions
from modelopt_dms.kernels.layout import ring_positions
from modelopt_dms.kernels.rollback import ROLLBACK, one_by_one
from modelopt_dms.kvcache.layer_cache import check_recoverable, check_slots
from modelopt_dms.kvcache.usage import Usage

PAGE = 16  # rows; a buffer is a whole number of pages, at most one page + 1/16 larger than its list


@dataclass(frozen=True)
class _Undo:
    """What one appended token replaced; enough to take it back."""

    live: Tensor
    ring_slot: Tensor
    ring_evict: Tensor
    rows: list[tuple[int, int, Tensor, Tensor]]


class HeadCaches:
    """The `LayerCache` of a CPU: B sequences and K KV heads."""

    def __init__(self, window: int, shift: int) -> None:
        """Make an empty cache; shapes are taken from the first append.

        Args:
            window: tokens a marked token stays readable.
            shift: 1 if a token's logit governs the token before it, else 0.
        """
        self.window = window
        self.shift = shift
        self.seen = 0  # positions, padding included
        self.rollback = ROLLBACK
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self._undo: deque[_Undo] = deque()

    def emptied(self) -> "HeadCaches":
        """Empty slots like these."""
        return HeadCaches(self.window, self.shift)

    @property
    def ring(self) -> int:
        """Tokens whose slots are remembered: those in the window and the one that is about to leave it."""
        return self.window + 1

    @property
    def lists(self) -> int:
        """Number of lists, B * K."""
        return len(self.keys)

    def _initialize(self, k: Tensor, v: Tensor) -> None:
        B, K = k.shape[:2]
        self.B, self.K = B, K
        self.live = torch.zeros(B, K, dtype=torch.long, device=k.device)
        self.tokens = torch.zeros(B, dtype=torch.long, device=k.device)
        self.ring_slot = torch.full((B, K, self.ring), -1, device=k.device)
        self.ring_evict = torch.zeros(B, K, self.ring, dtype=torch.bool, device=k.device)
        self.keys = [k.new_empty(0, k.shape[-1]) for _ in range(B * K)]
        self.values = [v.new_empty(0, v.shape[-1]) for _ in range(B * K)]
        row_bytes = k.shape[-1] * k.element_size() + v.shape[-1] * v.element_size()
        self.usage = Usage(self.live, self.tokens, 0, row_bytes, k.shape[-1] + v.shape[-1])

    def rows(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys [L, Dk] and values [L, Dv] of list `index` = b * K + k, as views."""
        live = int(self.live.view(-1)[index])
        return self.keys[index][:live], self.values[index][:live]

    def pending(self, index: int) -> tuple[Tensor, Tensor]:
        """Positions [N] and slots [N] of list `index`'s tokens that are marked and not yet evicted."""
        b, k = divmod(index, self.K)
        slots = self.ring_slot[b, k]
        marked = self.ring_evict[b, k] & (slots >= 0)
        return self._ring_positions()[marked], slots[marked]

    def decide_previous(self, decisions: Tensor) -> None:
        """With shift 1: the first new token's decision [B, K] governs the last token held."""
        if self.shift and self.seen:
            self.ring_evict[..., (self.seen - 1) % self.ring] = decisions

    def append(self, k: Tensor, v: Tensor, decisions: Tensor, valid: Tensor | None) -> None:
        """See `LayerCache.append`."""
        if not self.keys:
            self._initialize(k, v)
        T = k.shape[2]
        if valid is not None and bool(valid.all()):
            valid = None
        single = 0 if valid is not None else one_by_one(T, self.rollback)
        bulk = T - single
        if bulk:
            self._forget_undo(len(self._undo))
            kept = torch.ones(self.B, bulk, dtype=torch.bool, device=k.device)
            self._append_many(
                k[:, :, :bulk],
                v[:, :, :bulk],
                decisions[..., :bulk],
                kept if valid is None else valid,
            )
        for t in range(bulk, T):
            self._append_one(k[:, :, t], v[:, :, t], decisions[..., t])
        self._forget_undo(len(self._undo) - (self.rollback and max(self.rollback, single)))
        self.usage.live, self.usage.tokens = self.live, self.tokens

    def _append_one(self, k: Tensor, v: Tensor, decisions: Tensor) -> None:
        column = self.seen % self.ring
        self.decide_previous(decisions)
        expired = self.ring_slot[..., column].clone()
        marked = self.ring_evict[..., column].clone()
        slot, live = assign_slots(expired, marked, self.live)
        reused = (live == self.live).flatten().tolist()
        replaced = []
        k, v = k.flatten(0, 1), v.flatten(0, 1)
        for i, at in enumerate(slot.flatten().tolist()):
            if reused[i]:
                replaced.append((i, at, self.keys[i][at].clone(), self.values[i][at].clone()))
            elif at == len(self.keys[i]):
                self._grow(i, at, at + 1)
            self.keys[i][at] = k[i]
            self.values[i][at] = v[i]
        self._undo.append(_Undo(self.live, expired, marked, replaced))
        self.usage.kv_bytes += len(replaced) * self.usage.row_bytes
        self.live = live
        self.ring_slot[..., column] = slot
        self.ring_evict[..., column] = False if self.shift else decisions
        self.seen += 1
        self.tokens = self.tokens + 1

    def _append_many(self, k: Tensor, v: Tensor, decisions: Tensor, valid: Tensor) -> None:
        """As `append`, for a chunk: the survivors fill the holes of what expires, then the end of the list."""
        T = k.shape[2]
        self.decide_previous(decisions[..., 0])
        evict = shift_decisions(decisions, self.shift)
        positions = torch.arange(self.seen, self.seen + T, device=k.device)
        horizon = self.seen + T - 1 - self.window  # positions below it have left the window
        keep = valid[:, None] & ((positions >= horizon) | ~evict)  # [B, K, T]
        gone = self.ring_evict & (self.ring_slot >= 0) & (self._ring_positions() < horizon)
        slots = torch.full_like(keep, -1, dtype=torch.long)
        for i in range(self.B * self.K):
            b, h = divmod(i, self.K)
            holes = self.ring_slot[b, h][gone[b, h]]
            slots[b, h, keep[b, h]] = self._place(
                i, k[b, h, keep[b, h]], v[b, h, keep[b, h]], holes
            )
        recent = positions[-self.ring :]
        self.ring_slot[..., recent % self.ring] = slots[..., -self.ring :]
        self.ring_evict[..., recent % self.ring] = evict[..., -self.ring :]
        self.seen += T
        self.tokens = self.tokens + valid.sum(-1)

    def _place(self, index: int, k: Tensor, v: Tensor, holes: Tensor) -> Tensor:
        """Write rows [N, D] into a list's holes, then behind its end; returns their slots [N]."""
        b, h = divmod(index, self.K)
        old, new = int(self.live[b, h]), len(k)
        end = old + new - len(holes)
        if end < old:
            holes = self._shorten(index, holes, old, end)
        elif end > len(self.keys[index]):
            self._grow(index, old, end)
        slots = torch.cat([holes, torch.arange(old, max(end, old), device=k.device)])
        self.keys[index][slots] = k
        self.values[index][slots] = v
        self.live[b, h] = end
        return slots

    def _shorten(self, index: int, holes: Tensor, old: int, end: int) -> Tensor:
        """Move the rows behind a list's new end into holes before it; returns the holes that are left.

        Lists shrink only where padding follows tokens: it takes no slots while others expire.
        """
        b, h = divmod(index, self.K)
        tail = torch.arange(end, old, device=holes.device)
        source = tail[~torch.isin(tail, holes)]
        holes = holes[holes < end]
        target = holes[: len(source)]
        for rows in (self.keys[index], self.values[index]):
            rows[target] = rows[source]
        slot_now = torch.arange(old, device=holes.device)
        slot_now[source] = target
        ring = self.ring_slot[b, h]
        self.ring_slot[b, h] = torch.where(ring >= 0, slot_now[ring.clamp(min=0)], ring)
        return holes[len(source) :]

    def _grow(self, index: int, live: int, needed: int) -> None:
        capacity = len(self.keys[index])
        capacity = -(-max(needed, capacity + capacity // 16) // PAGE) * PAGE
        for buffers in (self.keys, self.values):
            grown = buffers[index].new_empty(capacity, buffers[index].shape[-1])
            grown[:live] = buffers[index][:live]
            self.usage.kv_bytes += (grown.numel() - buffers[index].numel()) * grown.element_size()
            buffers[index] = grown

    def crop(self, tokens: int) -> None:
        """See `LayerCache.crop`."""
        check_recoverable(self, tokens, len(self._undo))
        for _ in range(tokens):
            undo = self._undo.pop()
            self.usage.kv_bytes -= len(undo.rows) * self.usage.row_bytes
            for i, at, k, v in undo.rows:
                self.keys[i][at] = k
                self.values[i][at] = v
            self.seen -= 1
            column = self.seen % self.ring
            self.live = undo.live
            self.ring_slot[..., column] = undo.ring_slot
            self.ring_evict[..., column] = undo.ring_evict
            # The decision that the token taken back made about the one before it is gone too.
            self.decide_previous(torch.zeros_like(undo.ring_evict))
            self.tokens = self.tokens - 1
        if tokens:
            self.usage.live, self.usage.tokens = self.live, self.tokens

    def _forget_undo(self, oldest: int) -> None:
        for _ in range(oldest):
            self.usage.kv_bytes -= len(self._undo.popleft().rows) * self.usage.row_bytes

    def select(self, sequences: Tensor) -> None:
        """Keep these sequences [B'], in this order; one may be named several times (beams)."""
        taken: set[int] = set()
        keys, values = [], []
        for b in sequences.tolist():
            for i in range(b * self.K, (b + 1) * self.K):
                # A sequence that survives once keeps its buffers; only copies are copied.
                keys.append(self.keys[i].clone() if b in taken else self.keys[i])
                values.append(self.values[i].clone() if b in taken else self.values[i])
            taken.add(b)
        self.keys, self.values = keys, values
        sequences = sequences.to(self.live.device)
        self.B = len(sequences)
        self.live = self.live[sequences]
        self.tokens = self.tokens[sequences]
        self.ring_slot = self.ring_slot[sequences]
        self.ring_evict = self.ring_evict[sequences]
        self._undo.clear()
        kv_bytes = sum(x.numel() * x.element_size() for x in (*keys, *values))
        self.usage = replace(self.usage, live=self.live, tokens=self.tokens, kv_bytes=kv_bytes)

    def check_integrity(self) -> None:
        """Raise AssertionError if a slot is shared, out of range, or misses its buffer."""
        check_slots(self.live, self.ring_slot, self._ring_positions().expand_as(self.ring_slot))
        for i, live in enumerate(self.live.flatten().tolist()):
            capacity = len(self.keys[i])
            assert live <= capacity == len(self.values[i]), f"list {i} is longer than its buffer"
            assert capacity % PAGE == 0, f"list {i}: buffer is not whole pages"

    def _ring_positions(self) -> Tensor:
        """Position [R] of the token in each column of the ring; negative where there is none yet."""
        return ring_positions(torch.tensor(self.seen, device=self.ring_slot.device), self.ring)
