# SPDX-License-Identifier: Apache-2.0
"""Slots for one layer's KV rows: what is kept, where, and until when.

Every (sequence, KV head) owns a dense list of slots. A ring remembers the slots of the last W + 1 tokens and what was
decided about them: when a marked token leaves the window, the newest token overwrites its slot
(`kernels.assign_slots`). So lists have no holes, and eviction frees memory for good.

All lists of a layer lie in one buffer, sorted by length, and those of about one length have equally much room: such a
bucket is one tensor [N, C, D] for attention, and a token is written to all lists at once. What is said about lists is a
few numbers each, on which NumPy takes a tenth of PyTorch's time.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modelopt_dms.kernels.layout import ring_positions
from modelopt_dms.kernels.reference import shift_decisions
from modelopt_dms.kernels.rollback import ROLLBACK, one_by_one
from modelopt_dms.kvcache.layer_cache import check_recoverable, check_slots
from modelopt_dms.kvcache.usage import Usage

Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]

STEP = 16  # rows; the room of a list is a multiple
# Lists whose lengths differ by less share a bucket: fewer, larger products against rows that are read for nothing.
SPREAD = 1 / 8
GROWTH = 32  # a list that is laid out gets a 32nd of its length as room to grow


@dataclass(frozen=True)
class Bucket:
    """N lists of a layer with room for C rows each.

    Attributes:
        lists: which lists [N], b * K + k.
        keys: [N, C, .] as stored; behind a list's end, anything finite.
        values: likewise.
        bias: 0 where a slot is in use, else -inf [N, C] float32.
    """

    lists: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor


@dataclass(frozen=True)
class _Undo:
    """What one appended token replaced; enough to take it back.

    Attributes:
        live: lengths [B, K] before it.
        ring_slot: of the token that left the window [B, K].
        ring_evict: likewise.
        lists: whose rows were overwritten [N].
        slots: where [N].
        keys: the rows [N, .].
        values: likewise.
    """

    live: Integers
    ring_slot: Integers
    ring_evict: Booleans
    lists: Integers
    slots: Integers
    keys: Tensor
    values: Tensor


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
        self.buckets: list[Bucket] = []
        self._undo: deque[_Undo] = deque()
        self._overwritten = 0  # rows in it

    def emptied(self) -> "HeadCaches":
        """Empty slots like these."""
        return HeadCaches(self.window, self.shift)

    @property
    def ring(self) -> int:
        """Tokens whose slots are remembered: those in the window and the one that is about to leave it."""
        return self.window + 1

    @property
    def live(self) -> Tensor:
        """Slots in use [B, K]."""
        return torch.from_numpy(self._live)

    @property
    def tokens(self) -> Tensor:
        """Tokens seen [B], padding not counted."""
        return torch.from_numpy(self._tokens)

    @property
    def ring_slot(self) -> Tensor:
        """Slots [B, K, R] of the last tokens, the one at position p in column p % R; -1 where there is none."""
        return torch.from_numpy(self._ring_slot).permute(1, 2, 0)

    @property
    def ring_evict(self) -> Tensor:
        """Decisions [B, K, R] about them."""
        return torch.from_numpy(self._ring_evict).permute(1, 2, 0)

    @property
    def lists(self) -> int:
        """Number of lists, B * K."""
        return self.B * self.K

    def prepare(self, k: Tensor, v: Tensor) -> None:
        """Before the first token: empty lists for rows like these [B, K, T, D]."""
        if self.seen:
            return
        B, K = k.shape[:2]
        self.B, self.K = B, K
        self._live: Integers = np.zeros((B, K), np.int64)
        self._tokens: Integers = np.zeros(B, np.int64)
        self._ring_slot: Integers = np.full((self.ring, B, K), -1)
        self._ring_evict: Booleans = np.zeros((self.ring, B, K), bool)
        self._keys, self._values = k.new_empty(0, k.shape[-1]), v.new_empty(0, v.shape[-1])
        self._first: Integers = np.zeros(B * K, np.int64)  # row of slot 0
        self._room: Integers = np.zeros(B * K, np.int64)
        self._steps = 0  # tokens that fit every list for certain
        row_bytes = k.shape[-1] * k.element_size() + v.shape[-1] * v.element_size()
        self.usage = Usage(self.live, self.tokens, 0, row_bytes, k.shape[-1] + v.shape[-1])
        self._lay_out(self._room, np.arange(B * K))

    def rows(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys [L, Dk] and values [L, Dv] of list `index` = b * K + k, as views."""
        start = self._first[index]
        end = start + self._live.flat[index]
        return self._keys[start:end], self._values[start:end]

    def pending(self, index: int) -> tuple[Tensor, Tensor]:
        """Positions [N] and slots [N] of list `index`'s tokens that are marked and not yet evicted."""
        b, k = divmod(index, self.K)
        slots = self.ring_slot[b, k]
        marked = self.ring_evict[b, k] & (slots >= 0)
        return self._ring_positions()[marked], slots[marked]

    def last_readers(self, bucket: Bucket) -> Tensor:
        """The last position [N, C] of a query that may read each slot; far away if it is not marked, -1 if not used."""
        slots = self.ring_slot.flatten(0, 1)[bucket.lists]
        marked = self.ring_evict.flatten(0, 1)[bucket.lists] & (slots >= 0)
        N, C = bucket.bias.shape
        last = torch.where(bucket.bias == 0, torch.iinfo(torch.long).max, -1)
        last = torch.cat([last, last.new_empty(N, 1)], dim=1)
        leaves = (self._ring_positions() + self.window).expand_as(slots)
        return last.scatter_(1, torch.where(marked, slots, C), leaves)[:, :C]

    def decide_previous(self, decisions: Tensor) -> None:
        """With shift 1: the first new token's decision [B, K] governs the last token held."""
        if self.shift and self.seen:
            self._ring_evict[(self.seen - 1) % self.ring] = decisions.numpy()

    def append(self, k: Tensor, v: Tensor, decisions: Tensor, valid: Tensor | None) -> None:
        """See `LayerCache.append`."""
        self.prepare(k, v)
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
        self._count()

    def _append_one(self, k: Tensor, v: Tensor, decisions: Tensor) -> None:
        column = self.seen % self.ring
        self.decide_previous(decisions)
        expired, marked = self._ring_slot[column].copy(), self._ring_evict[column].copy()
        reuse = marked & (expired >= 0)  # as `kernels.assign_slots`
        slot, live = np.where(reuse, expired, self._live), self._live + ~reuse
        if self._steps:
            self._steps -= 1
        else:
            self._make_room(live)
        at = self._first + slot.ravel()
        if self.rollback:
            lists = reuse.ravel().nonzero()[0]
            old = torch.from_numpy(at[lists])
            replaced = (lists, slot.ravel()[lists], self._keys[old], self._values[old])
            self._undo.append(_Undo(self._live, expired, marked, *replaced))
            self._overwritten += len(lists)
        rows = torch.from_numpy(at)
        self._keys.index_copy_(0, rows, k.flatten(0, 1))
        self._values.index_copy_(0, rows, v.flatten(0, 1))
        self._bias.index_fill_(0, rows, 0.0)
        self._live = live
        self._ring_slot[column] = slot
        self._ring_evict[column] = False if self.shift else decisions.numpy()
        self.seen += 1
        self._tokens = self._tokens + 1

    def _append_many(self, k: Tensor, v: Tensor, decisions: Tensor, valid: Tensor) -> None:
        """As `append`, for a chunk: the survivors fill the holes of what expires, then the end of the list."""
        T = k.shape[2]
        self.decide_previous(decisions[..., 0])
        evict = shift_decisions(decisions, self.shift)
        positions = torch.arange(self.seen, self.seen + T, device=k.device)
        horizon = self.seen + T - 1 - self.window  # positions below it have left the window
        keep = valid[:, None] & ((positions >= horizon) | ~evict)  # [B, K, T]
        gone = self.ring_evict & (self.ring_slot >= 0) & (self._ring_positions() < horizon)
        end: Integers = (self.live + keep.sum(-1) - gone.sum(-1)).numpy()
        self._make_room(end)
        slots = torch.full_like(keep, -1, dtype=torch.long)
        for i in range(self.lists):
            b, h = divmod(i, self.K)
            holes = self.ring_slot[b, h][gone[b, h]]
            slots[b, h, keep[b, h]] = self._place(
                i, k[b, h, keep[b, h]], v[b, h, keep[b, h]], holes, int(end[b, h])
            )
        self._live = end
        self._mark_used()
        recent = positions[-self.ring :]
        self.ring_slot[..., recent % self.ring] = slots[..., -self.ring :]
        self.ring_evict[..., recent % self.ring] = evict[..., -self.ring :]
        self.seen += T
        self._tokens = self._tokens + valid.sum(-1).numpy()

    def _place(self, index: int, k: Tensor, v: Tensor, holes: Tensor, end: int) -> Tensor:
        """Write rows [N, D] into a list's holes, then behind its end up to a new one; returns their slots [N]."""
        old = int(self._live.flat[index])
        if end < old:
            holes = self._shorten(index, holes, old, end)
        slots = torch.cat([holes, torch.arange(old, max(end, old))])
        at = int(self._first[index]) + slots
        self._keys[at] = k
        self._values[at] = v
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
        first = int(self._first[index])
        for rows in (self._keys, self._values):
            rows[first + target] = rows[first + source]
        slot_now = torch.arange(old, device=holes.device)
        slot_now[source] = target
        ring = self.ring_slot[b, h]
        self.ring_slot[b, h] = torch.where(ring >= 0, slot_now[ring.clamp(min=0)], ring)
        return holes[len(source) :]

    def _make_room(self, wanted: Integers) -> None:
        """See to it that lists can be so long [B, K]."""
        if (wanted.ravel() > self._room).any():
            self._lay_out(wanted.ravel(), np.arange(self.lists))
        self._steps = int((self._room - wanted.ravel()).min())

    def _lay_out(self, wanted: Integers, sources: Integers) -> None:
        """Copy lists into a new buffer.

        Args:
            wanted: rows [N] that each new list must have room for.
            sources: the list [N] that each of them is now.
        """
        buckets = _buckets(wanted.tolist())
        order = np.array([i for _, members in buckets for i in members])
        rooms = np.array([room for room, members in buckets for _ in members])
        before, self._first, self._room = self._first[sources], np.empty_like(order), rooms.copy()
        self._first[order], self._room[order] = rooms.cumsum() - rooms, rooms
        lengths = self._live.ravel()[sources]
        moves = list(zip(before, self._first, lengths, strict=True))
        self._keys, self._values = (
            _moved(x, moves, rooms.sum()) for x in (self._keys, self._values)
        )
        self._bias = torch.empty(int(rooms.sum()))
        self.buckets = list(self._views(buckets))
        self._live = lengths.reshape(-1, self.K)
        self._mark_used()

    def _views(self, buckets: list[tuple[int, list[int]]]) -> Iterator[Bucket]:
        row = 0
        for room, members in buckets:
            end = row + len(members) * room
            parts = (x[row:end] for x in (self._keys, self._values, self._bias))
            views = (x.unflatten(0, (len(members), room)) for x in parts)
            yield Bucket(torch.tensor(members), *views)
            row = end

    def _mark_used(self) -> None:
        for bucket in self.buckets:
            used = torch.arange(bucket.bias.shape[1])
            used = used < self.live.flatten()[bucket.lists][:, None]
            bucket.bias.fill_(float("-inf")).masked_fill_(used, 0.0)

    def crop(self, tokens: int) -> None:
        """See `LayerCache.crop`."""
        check_recoverable(self, tokens, len(self._undo))
        for _ in range(tokens):
            undo = self._undo.pop()
            self._overwritten -= len(undo.lists)
            at = torch.from_numpy(self._first[undo.lists] + undo.slots)
            self._keys[at] = undo.keys
            self._values[at] = undo.values
            self.seen -= 1
            column = self.seen % self.ring
            self._live = undo.live
            self._ring_slot[column] = undo.ring_slot
            self._ring_evict[column] = undo.ring_evict
            # The decision that the token taken back made about the one before it is gone too.
            self.decide_previous(torch.zeros(self.B, self.K, dtype=torch.bool))
            self._tokens = self._tokens - 1
        if tokens:
            self._mark_used()
            self._count()

    def select(self, sequences: Tensor) -> None:
        """Keep these sequences [B'], in this order; one may be named several times (beams)."""
        named: Integers = sequences.cpu().numpy()
        self.B = len(named)
        sources = (named[:, None] * self.K + np.arange(self.K)).ravel()
        self._lay_out(self._live.ravel()[sources], sources)
        self._steps = int((self._room - self._live.ravel()).min())
        self._tokens = self._tokens[named]
        self._ring_slot, self._ring_evict = self._ring_slot[:, named], self._ring_evict[:, named]
        self._forget_undo(len(self._undo))
        self.usage = replace(self.usage)  # whoever holds the old one goes on reading what there was
        self._count()

    def _count(self) -> None:
        usage = self.usage
        usage.live, usage.tokens = self.live, self.tokens
        usage.kv_bytes = self._keys.nbytes + self._values.nbytes
        usage.kv_bytes += self._overwritten * usage.row_bytes

    def _forget_undo(self, oldest: int) -> None:
        for _ in range(oldest):
            self._overwritten -= len(self._undo.popleft().lists)

    def check_integrity(self) -> None:
        """Raise AssertionError if a slot is shared, out of range, or misses its buffer."""
        check_slots(self.live, self.ring_slot, self._ring_positions().expand_as(self.ring_slot))
        live = self._live.ravel()
        assert (live <= self._room).all(), "a list is longer than its room"
        assert self._steps <= (self._room - live).min(), "more tokens are let in than fit"
        order = self._first.argsort(kind="stable")
        ends = self._room[order].cumsum()
        assert ((self._first + self._room)[order] == ends).all(), "lists overlap, or leave gaps"
        assert len(self._keys) == len(self._values) == ends[-1]
        for bucket in self.buckets:
            used = (bucket.bias == 0).sum(-1)
            assert used.tolist() == live[bucket.lists.numpy()].tolist(), (
                "the bias is not that of the list"
            )

    def _ring_positions(self) -> Tensor:
        """Position [R] of the token in each column of the ring; negative where there is none yet."""
        return ring_positions(torch.tensor(self.seen, device=self.ring_slot.device), self.ring)


def _moved(rows: Tensor, moves: list[tuple[int, int, int]], total: int) -> Tensor:
    """A new buffer of so many rows, and in it those of lists: from where, to where, how many."""
    # Not empty: what is behind a list's end is read, and 0 * NaN is NaN.
    new = rows.new_zeros(total, rows.shape[1])
    for source, target, length in moves:
        new[target : target + length] = rows[source : source + length]
    return new


def _buckets(lengths: list[int]) -> list[tuple[int, list[int]]]:
    """Rows that each list of a bucket has room for, and which lists are in it, for lists of these lengths."""
    found: list[tuple[int, list[int]]] = []
    shortest = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        length = lengths[index]
        room = -(-(length + length // GROWTH) // STEP) * STEP
        if found and room <= max(shortest * (1 + SPREAD), shortest + STEP):
            found[-1] = (room, [*found[-1][1], index])
        else:
            found.append((room, [index]))
            shortest = room
    return [(room, sorted(members)) for room, members in found]
