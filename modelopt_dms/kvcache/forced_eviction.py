# SPDX-License-Identifier: Apache-2.0
"""Room in a full pool, if the user asked for that instead of an error: the longest lists lose their oldest tokens.

What `on_full="evict"` does, exactly:

List i (of any layer, sequence and KV head of a pool of N pages) holds l_i tokens, and may grow by g_i before the next
check: by 16 where single tokens are decoded (0 if its sequence has finished); by what a chunk of a prompt adds to the
lists of the layer that takes it in, and by 0 elsewhere. It needs n_i = ceil((l_i + g_i) / 64) pages.

Where pages for the tokens to come are missing, and as long as the sum of n_i is more than N: the longest list (the most
l_i; of equal ones the first by layer, sequence, head) is cut to 64 (n_i - 1) - g_i tokens, for which one page less is
enough. A list that cannot be cut so far is left out. It loses those of its tokens that stand first in the text, except
the last W + 1 (the delay window) and the first P (protect_first). If no list can be cut any more, it is an
`OutOfPagesError`.

Only numbers of tokens decide, so the same lists lose the same tokens every time. What was cut is gone, and `crop`
cannot take back tokens that came before it. To know which tokens are old, such a pool has 4 bytes for every slot on top
of its pages, and a decode step a few small launches a layer more.

Shapes: B sequences, K KV heads, R = W + 1, P pages a list can own, N pages.
"""

import heapq

import torch
from torch import Tensor

from modelopt_dms.kernels.append_reference import Plan, spanned_pages
from modelopt_dms.kernels.layout import NO_PAGE, PAGE, PagePool, PageTables

LOOKAHEAD = 16  # tokens of a decoding sequence that there is room for after a cut


def lengths_that_fit(
    live: list[int], growth: list[int], least: list[int], pages: int
) -> list[int] | None:
    """To how many tokens lists are cut; None if that is not enough.

    Args:
        live: tokens of each list.
        growth: by which each may grow.
        least: that each must keep.
        pages: of the pool.
    """
    live = list(live)
    needed = [-(-(x + more) // PAGE) for x, more in zip(live, growth, strict=True)]
    missing = sum(needed) - pages
    longest = [(-x, i) for i, x in enumerate(live)]
    heapq.heapify(longest)
    while missing > 0 and longest:
        _, i = heapq.heappop(longest)
        target = PAGE * (needed[i] - 1) - growth[i]
        if target >= least[i]:
            live[i], needed[i], missing = target, needed[i] - 1, missing - 1
            heapq.heappush(longest, (-target, i))
    return None if missing > 0 else live


def kept_anyway(lists: PageTables, protect_first: int) -> Tensor:
    """Tokens [B, K] that a list does not lose: of the window, and the first ones before it."""
    in_window = _in_ring(lists).sum(-1)
    return in_window + (lists.live - in_window).clamp(max=protect_first)


def cut(
    lists: PageTables,
    pool: PagePool,
    positions: Tensor,
    protect_first: int,
    live: Tensor,
) -> None:
    """Cut lists to these lengths [B, K], and give back all pages that nothing lies in. Waits for the device.

    Args:
        lists: are changed, in place.
        pool: is changed, in place: rows behind a list's new end move into the holes before it, in their order.
        positions: of the tokens in all slots [N + 1, PAGE] int32; likewise.
        protect_first: P.
        live: where it is what it was, a list stays as it is.
    """
    which = (lists.live > live).flatten().nonzero()[:, 0]  # [n]
    if len(which):
        _cut_some(lists, pool, positions, protect_first, live, which)
    surplus = ~spanned_pages(lists, lists.live) & (lists.table != NO_PAGE)
    pool.give_back(torch.where(surplus, lists.table, NO_PAGE).flatten())
    lists.table.masked_fill_(surplus, NO_PAGE)


def _cut_some(
    lists: PageTables,
    pool: PagePool,
    positions: Tensor,
    protect_first: int,
    live: Tensor,
    which: Tensor,
) -> None:
    """As `cut`, of the lists [n] that become shorter."""
    old, new = lists.live.flatten()[which, None], live.flatten()[which, None].to(torch.int32)
    slots = torch.arange(int(old.max()), device=old.device).expand(len(which), -1)  # [n, L]
    table = lists.table.flatten(0, 1)[which].long()
    rows = table.gather(1, slots // PAGE) * PAGE + slots % PAGE
    ring, in_ring = (x.flatten(0, 1)[which] for x in (lists.ring_slot, _in_ring(lists)))  # [n, R]
    length = slots.shape[1]
    in_window = torch.zeros(len(which), length + 1, dtype=torch.bool, device=old.device)
    in_window.scatter_(1, torch.where(in_ring, ring, length).long(), True)

    held, text = slots < old, positions.flatten()[rows]
    old_enough = held & ~in_window[:, :length]
    newest = torch.iinfo(torch.int32).max
    rank = torch.where(old_enough, text, newest).argsort(dim=1, stable=True).argsort(dim=1)
    # Gates do not evict the first P tokens of a text, so those are the oldest.
    gone = (rank >= protect_first) & (rank < protect_first + old - new)
    # Of every list, as many rows stay behind its new end as leave holes before it.
    sources, targets = held & ~gone & (slots >= new), gone & (slots < new)
    for x in (pool.keys, pool.values, pool.key_scales, pool.value_scales, positions):
        if x is not None:
            x.flatten(0, 1)[rows[targets]] = x.flatten(0, 1)[rows[sources]]
    moved = slots.clone()
    moved[sources] = slots[targets]
    ring = torch.where(in_ring, moved.gather(1, ring.clamp(min=0).long()).to(torch.int32), ring)
    lists.ring_slot.flatten(0, 1)[which] = ring
    lists.live.view(-1)[which] = new[:, 0]


def note_token(positions: Tensor, lists: PageTables, back: int = 0) -> None:
    """Note where the newest token of every list lies, or the one so many before it; on the device."""
    last = (lists.seen - 1 - back)[..., None]
    _note(positions, lists, lists.ring_slot.gather(2, (last % lists.ring).long()), last)


def note_taken_back(positions: Tensor, lists: PageTables) -> None:
    """Note where the token lies that came back into the window with the last one's leaving; on the device."""
    slots = lists.ring_slot.gather(2, (lists.seen % lists.ring).long()[..., None])
    _note(positions, lists, slots, (lists.seen - lists.ring)[..., None])


def note_moves(positions: Tensor, lists: PageTables, plan: Plan) -> None:
    """Note what a plan moves before its tokens come; on the device."""
    if plan.moves is not None:
        sources, targets = (lists.rows_of(x) for x in (plan.moves.sources, plan.moves.targets))
        positions.view(-1)[targets] = positions.view(-1)[sources]


def note_chunk(positions: Tensor, lists: PageTables, plan: Plan, seen: Tensor) -> None:
    """Note where the tokens of a plan lie, after it was carried out; on the device.

    Args:
        positions: are changed.
        lists: after it.
        plan: with the slots.
        seen: positions [B, K] seen before it.
    """
    new = torch.arange(plan.slots.shape[2], dtype=torch.int32, device=seen.device)
    _note(positions, lists, plan.slots, seen[..., None] + new)


def _note(positions: Tensor, lists: PageTables, slots: Tensor, values: Tensor) -> None:
    rows = lists.rows_of(slots)  # where there is no slot: page 0, in which nobody looks
    positions.view(-1).scatter_(0, rows.flatten(), values.to(torch.int32).flatten())


def _in_ring(lists: PageTables) -> Tensor:
    """Which columns [B, K, R] hold a token."""
    return (lists.ring_slot >= 0) & (lists.ring_positions() >= 0)
