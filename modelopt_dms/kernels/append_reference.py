# SPDX-License-Identifier: Apache-2.0
"""Taking tokens into paged lists, in plain PyTorch over all lists at once and without synchronizing with the host.

What the kernels of `kernels.append` mean, and where `pack` finds its slots for them too. As
`kvcache.head_caches.HeadCaches` does, list by list.
Where a list outgrows its table, or the pool its pages, rows are lost and the pool's counters say so.

Shapes: B sequences, K KV heads, T new tokens, R ring, P pages a list can own.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_dms.kernels.gating import GateInput
from modelopt_dms.kernels.layout import NO_PAGE, PAGE, PagePool, PageTables
from modelopt_dms.kernels.reference import assign_slots, shift_decisions
from modelopt_dms.kernels.rollback import UndoLog, decide_previous, record
from modelopt_dms.kernels.rows import write_rows


def append_token(
    k: Tensor,
    v: Tensor,
    gate: GateInput,
    pool: PagePool,
    lists: PageTables,
    log: UndoLog | None = None,
) -> None:
    """Take in one token of every active sequence, in the slot of the marked token that leaves the window or a new one.

    Args:
        k: key rows [B, K, Dk].
        v: value rows [B, K, Dv].
        gate: decisions, or what they are made from.
        pool: may give pages.
        lists: are changed.
        log: where to keep what is overwritten, if it may be taken back.
    """
    evict = gate.decide(lists.heads)
    active = lists.active[:, None]
    decide_previous(lists, evict)
    column = (lists.seen % lists.ring).long()[..., None]  # [B, K, 1]
    expired = lists.ring_slot.gather(2, column)[..., 0]
    marked = lists.ring_evict.gather(2, column)[..., 0]
    slot, live = assign_slots(expired, marked, lists.live)
    _allocate_for(pool, lists, torch.where(active & (slot % PAGE == 0), live, 0))
    limit = lists.table.shape[2] * PAGE
    slot = torch.where(active & (slot < limit), slot, -1)
    if log is not None:
        record(log, pool, lists, slot, expired, marked)
    write_rows(pool, lists, slot[..., None], k[:, :, None], v[:, :, None])
    lists.live.copy_(torch.where(active, live.clamp(max=limit), lists.live))
    decision = torch.zeros_like(marked) if lists.shift else evict
    for ring, new, old in (
        (lists.ring_slot, slot.to(torch.int32), expired),
        (lists.ring_evict, decision, marked),
    ):
        ring.scatter_(2, column, torch.where(active, new, old)[..., None])
    lists.seen += active.to(torch.int32)


@dataclass(frozen=True)
class Moves:
    """Rows that change their slots before new ones come.

    Attributes:
        sources: slots [B, K, R] int32, -1 where nothing moves.
        targets: likewise.
        count: moves [B, K] int32 of each list; the first ones.
    """

    sources: Tensor
    targets: Tensor
    count: Tensor


@dataclass(frozen=True)
class Plan:
    """Where a chunk of tokens goes, and what the lists look like afterwards.

    Attributes:
        slots: of the tokens [B, K, T] int32, -1 where they are not kept.
        live: [B, K] int32; may exceed what the table can hold.
        ring_slot: [B, K, R] int32.
        ring_evict: [B, K, R].
        moves: None where no list can shrink.
    """

    slots: Tensor
    live: Tensor
    ring_slot: Tensor
    ring_evict: Tensor
    moves: Moves | None


def plan_pack(
    evict: Tensor, valid: Tensor | None, lists: PageTables, *, shrinks: bool = True
) -> Plan:
    """Find slots for T tokens: the survivors fill the holes of what expires, then the end of the list.

    Args:
        evict: decisions [B, K, T] bool, as made by these tokens' hidden states.
        valid: False [B, T] for padding, which is never kept; None if there is none.
        lists: are not changed.
        shrinks: whether a list may become shorter, because padding comes while others expire.
    """
    T = evict.shape[-1]
    active = lists.active[:, None, None]
    columns = torch.arange(lists.ring, device=evict.device)
    ring_evict = lists.ring_evict
    if lists.shift:
        newest = (columns == (lists.seen - 1)[..., None] % lists.ring) & (lists.seen > 0)[..., None]
        ring_evict = torch.where(newest & active, evict[..., :1], ring_evict)
        evict = shift_decisions(evict, lists.shift)
    new = torch.arange(T, device=evict.device)
    last_expired = (
        T - 2 - lists.window
    )  # counted from the first new token; older ones have left the window
    keep = active & ((new > last_expired) | ~evict)  # [B, K, T]
    if valid is not None:
        keep &= valid[:, None]
    ages = lists.ring_positions() - lists.seen[..., None]  # negative: counted likewise
    expired = (ages <= last_expired) & ring_evict & (lists.ring_slot >= 0) & active
    live = lists.live + _count(keep) - _count(expired)

    holes, filled = _in_front(lists.ring_slot, expired & (lists.ring_slot < live[..., None]))
    ring_slot, moves = lists.ring_slot, None
    rank = keep.cumsum(-1, dtype=torch.int32) - 1  # [B, K, T]
    if valid is not None and shrinks:
        # Padding takes no slots while others expire.
        ring_slot, moves = _shorten(lists, expired, holes, live)
        rank += moves.count[..., None]
    hole = holes.gather(2, rank.clamp(0, lists.ring - 1).long())
    behind = lists.live[..., None] + rank - filled[..., None]
    slots = torch.where(rank < filled[..., None], hole, behind)
    slots = torch.where(keep & (slots < lists.table.shape[2] * PAGE), slots, -1)

    recent = min(T, lists.ring)
    column = ((lists.seen[..., None] + new[T - recent :]) % lists.ring).long()  # [B, K, recent]

    def remembered(ring: Tensor, tokens: Tensor) -> Tensor:
        tokens = torch.where(active, tokens[..., T - recent :], ring.gather(2, column))
        return ring.scatter(2, column, tokens)

    return Plan(slots, live, remembered(ring_slot, slots), remembered(ring_evict, evict), moves)


def pack(
    k: Tensor, v: Tensor, evict: Tensor, valid: Tensor | None, pool: PagePool, lists: PageTables
) -> None:
    """Take in T tokens of every active sequence, and drop what is marked and has left the window.

    Args:
        k: key rows [B, K, T, Dk].
        v: value rows [B, K, T, Dv].
        evict: decisions [B, K, T] bool, as made by these tokens' hidden states.
        valid: False [B, T] for padding, which is never kept; None if there is none.
        pool: gives pages.
        lists: are changed.
    """
    apply_plan(plan_pack(evict, valid, lists), k, v, pool, lists)


def apply_plan(plan: Plan, k: Tensor, v: Tensor, pool: PagePool, lists: PageTables) -> None:
    """Carry out a plan for the rows k [B, K, T, Dk] and v [B, K, T, Dv]."""
    if plan.moves is not None:
        sources, targets = (lists.rows_of(x) for x in (plan.moves.sources, plan.moves.targets))
        for x in (pool.keys, pool.values, pool.key_scales, pool.value_scales):
            if x is not None:
                x.flatten(0, 1)[targets] = x.flatten(0, 1)[sources]
    allocate_pages(plan, pool, lists)
    write_rows(pool, lists, plan.slots, k, v)
    update_metadata(plan, lists)


def spanned_pages(lists: PageTables, live: Tensor) -> Tensor:
    """Which pages [B, K, P] have slots of lists of this length [B, K]."""
    index = torch.arange(lists.table.shape[2], device=live.device)
    return index * PAGE < live[..., None]


def wanted_pages(lists: PageTables, live: Tensor) -> Tensor:
    """Which of them [B, K, P] the lists do not own."""
    return spanned_pages(lists, live) & (lists.table == NO_PAGE)


def allocate_pages(plan: Plan, pool: PagePool, lists: PageTables) -> None:
    """Take the pages that the rows of a plan need."""
    _allocate_for(pool, lists, torch.where(lists.active[:, None], plan.live, 0))


def update_metadata(plan: Plan, lists: PageTables) -> None:
    """Write the lengths and rings of a plan to the lists, in place."""
    lists.live.copy_(plan.live.clamp(max=lists.table.shape[2] * PAGE))
    lists.ring_slot.copy_(plan.ring_slot)
    lists.ring_evict.copy_(plan.ring_evict)
    lists.seen += lists.active[:, None].to(torch.int32) * plan.slots.shape[2]


def _allocate_for(pool: PagePool, lists: PageTables, live: Tensor) -> None:
    """Take what lists of this length [B, K] lack."""
    wanted = wanted_pages(lists, live)
    too_long = live > lists.table.shape[2] * PAGE
    first = 0 if pool.shared else 1
    pages = pool.take(wanted.flatten(first)).view_as(wanted)
    lists.table.copy_(torch.where(wanted, pages, lists.table))
    fewest = pool.counters[..., 1]
    fewest.clamp_(max=torch.where(too_long.flatten(first).any(-1), -1, fewest))


def _shorten(
    lists: PageTables, expired: Tensor, holes: Tensor, live: Tensor
) -> tuple[Tensor, Moves]:
    """Move the rows behind each list's new end into holes before it.

    Args:
        lists: are not changed.
        expired: which columns of the ring [B, K, R] hold tokens that leave holes.
        holes: slots [B, K, R] of the holes before the new ends.
        live: the new ends [B, K].

    Returns:
        The ring's slots [B, K, R] afterwards, and what moves.
    """
    end = live[..., None]
    behind = torch.arange(lists.ring, device=live.device)  # slots, counted from the new end
    ring = lists.ring_slot - end
    at = ring.clamp(0, lists.ring - 1).long()
    hole_at = torch.where(expired & (ring >= 0), at, lists.ring)
    is_hole = F.pad(torch.zeros_like(expired), (0, 1)).scatter_(2, hole_at, True)[..., :-1]
    stays = (behind < lists.live[..., None] - end) & ~is_hole  # [B, K, R]
    sources, count = _in_front((end + behind).to(torch.int32), stays)
    moves = Moves(
        torch.where(behind < count[..., None], sources, -1),
        torch.where(behind < count[..., None], holes, -1),
        count,
    )
    rank = (stays.cumsum(-1) - 1).clamp(min=0)
    follows = (ring >= 0) & (lists.ring_slot >= 0) & stays.gather(2, at)
    return torch.where(follows, holes.gather(2, rank.gather(2, at)), lists.ring_slot), moves


def _in_front(x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen elements of x [B, K, R] in front, in their order, with anything behind; and their number [B, K]."""
    order = chosen.cumsum(-1) - 1
    width = x.shape[-1]
    at = torch.where(chosen, order, width)
    front = x.new_zeros(*x.shape[:-1], width + 1).scatter_(2, at, x)[..., :width]
    return front, _count(chosen)


def _count(chosen: Tensor) -> Tensor:
    return chosen.sum(-1, dtype=torch.int32)
