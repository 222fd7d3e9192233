# SPDX-License-Identifier: Apache-2.0
"""Sequences that leave paged lists, or change their order, with their pages. Plain PyTorch.

Shapes: B sequences, B' sequences afterwards, K KV heads, P pages a list can own.
"""

import torch
from torch import Tensor

from modelopt_dms.kernels.append_reference import spanned_pages
from modelopt_dms.kernels.layout import NO_PAGE, PagePool, PageTables


def release(lists: PageTables, pool: PagePool, sequences: Tensor) -> None:
    """Empty the lists of these sequences [B] bool, which take in nothing from now on; on the device."""
    drop(lists, pool, sequences)
    lists.active &= ~sequences


def drop(lists: PageTables, pool: PagePool, sequences: Tensor) -> None:
    """Empty the lists of these sequences [B] bool and give their pages back; on the device."""
    gone = sequences[:, None, None]
    pool.give_back(torch.where(gone, lists.table, NO_PAGE).flatten())
    lists.table.masked_fill_(gone, NO_PAGE)
    lists.ring_slot.masked_fill_(gone, -1)
    lists.ring_evict.masked_fill_(gone, False)
    lists.live.masked_fill_(gone[..., 0], 0)
    lists.seen.masked_fill_(gone[..., 0], 0)


def repeated(sequences: Tensor) -> Tensor:
    """Which of these sequences [B'] were named before, as bool [B']. Waits for the device."""
    named = sequences.tolist()
    again = [b in named[:i] for i, b in enumerate(named)]
    return torch.tensor(again, dtype=torch.bool, device=sequences.device)


def copied_pages(lists: PageTables, sequences: Tensor) -> Tensor:
    """Pages in use [B', K, P] of those sequences [B'] that were named before."""
    used = spanned_pages(lists, lists.live) & (lists.table != NO_PAGE)
    return used[sequences] & repeated(sequences)[:, None, None]


def unnamed(lists: PageTables, sequences: Tensor) -> Tensor:
    """Which sequences [B] are not among those [B']; on the device."""
    gone = torch.ones(lists.batch, dtype=torch.bool, device=lists.live.device)
    return gone.index_fill_(0, sequences, False)


def select(lists: PageTables, pool: PagePool, sequences: Tensor) -> None:
    """Keep these sequences [B'], in this order; one may be named several times. Waits for the device.

    The first of a name keeps its pages, further ones get copies, and what is not named gives its pages back. Tensors
    stay where they are if B' is B. `active` is left to whoever owns it.
    """
    drop(lists, pool, unnamed(lists, sequences))
    copied = copied_pages(lists, sequences)
    pages = pool.take(copied.flatten()).view_as(copied)
    table = lists.table[sequences]
    source, target = table[copied].long(), pages[copied].long()
    for x in (pool.keys, pool.values, pool.key_scales, pool.value_scales):
        if x is not None:
            x[target] = x[source]
    for name in ("table", "live", "seen", "ring_slot", "ring_evict"):
        old = getattr(lists, name)
        new = old[sequences]
        if name == "table":
            new = torch.where(repeated(sequences)[:, None, None], pages, table)
        if new.shape == old.shape:
            old.copy_(new)
        else:
            setattr(lists, name, new)
