# SPDX-License-Identifier: Apache-2.0
"""What attention of a chunk onto a paged cache means, in plain PyTorch. For whole prompts see `kernels.reference`."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_dms.kernels.layout import PAGE, PagePool, PageTables, padded_length
from modelopt_dms.kernels.reference import (
    Prompt,
    Scoring,
    merge_partials,
    partial_attention,
    prefill_partial,
    with_sinks,
)
from modelopt_dms.kernels.rows import read_rows

NEVER = 2**31 - 1  # a position that no query has


@dataclass(frozen=True)
class Chunk:
    """T new tokens of every sequence, which are not in the lists yet.

    Attributes:
        q: queries [B, H, T, D].
        k: keys [B, K, T, D].
        v: values [B, K, T, Dv].
        evict: decisions [B, K, T] bool of the token each governs.
        first: position [B] int32 of the chunk's first token.
        starts: the first key [B, T] int32 that each query may see, counted from the chunk's first token; the lists
            hold what was before the chunk, so a query reads them if its start is negative. None: it sees all.
        expiry: last position [B, K, S] int32 whose query may read a slot, S >= live; None: they never expire.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    evict: Tensor
    first: Tensor
    starts: Tensor | None = None
    expiry: Tensor | None = None


def attend_chunk(chunk: Chunk, pool: PagePool, lists: PageTables, scoring: Scoring) -> Tensor:
    """Attention of a chunk over a layer's lists and over itself, under the delayed-eviction mask.

    Args:
        chunk: new tokens.
        pool: pages.
        lists: which of them hold the layer's slots.
        scoring: scale, softcap and sinks.

    Returns:
        Output [B, H, T, Dv].
    """
    q, evict, starts, expiry = chunk.q, chunk.evict, chunk.starts, chunk.expiry
    T, K = q.shape[2], chunk.k.shape[1]
    slots = torch.arange(lists.table.shape[2] * PAGE, dtype=torch.int32, device=q.device)
    if expiry is not None:
        slots = slots[: expiry.shape[2]]
    slots = torch.where(slots < lists.live[..., None], slots, -1)  # [B, K, S]
    past_k, past_v = read_rows(pool, lists, slots, q.dtype)
    visible = (slots >= 0)[:, :, None].expand(-1, -1, T, -1)  # [B, K, T, S]
    if expiry is not None:
        positions = chunk.first[:, None] + torch.arange(T, device=q.device)
        visible = visible & (positions[:, None, :, None] <= expiry[:, :, None])
    mask = None
    if starts is not None:
        visible = visible & (starts < 0)[:, None, :, None]
        keys = torch.arange(T, device=q.device)
        mask = ((keys >= starts[..., None]) & (keys <= keys[:, None]))[:, None]
    bias = torch.zeros(visible.shape, device=q.device).masked_fill(~visible, float("-inf"))
    grouped = q.unflatten(1, (K, -1))  # [B, H, T, D] -> [B, K, G, T, D]
    old, old_lse = partial_attention(
        grouped, past_k[:, :, None], past_v[:, :, None], bias[:, :, None], scoring
    )
    keep_logprob = torch.zeros(evict.shape, device=q.device).masked_fill(evict, float("-inf"))
    own = Prompt(q, chunk.k, chunk.v, keep_logprob, lists.window, mask)
    new, new_lse = prefill_partial(own, scoring)
    out, lse = merge_partials(old.flatten(1, 2), old_lse.flatten(1, 2), new, new_lse)
    return with_sinks(out, lse, scoring.sinks)


def expiry(lists: PageTables, length: int) -> Tensor:
    """The last position [B, K, length] int32 of a query that may read what is in each slot; NEVER without end.

    Of what is marked so far: with shift 1, decide about the last token first.

    Args:
        lists: of one layer.
        length: slots of every list to look at.
    """
    slots, last = expiring(lists, length)
    shape = (lists.batch, lists.heads, length + 1)
    found = torch.full(shape, NEVER, dtype=torch.int32, device=last.device)
    return found.scatter_(2, slots, last)[..., :length]


def expiring(lists: PageTables, length: int) -> tuple[Tensor, Tensor]:
    """Slots [B, K, R] below `length` that will expire, `length` for others; and their last positions, int32."""
    pending = lists.ring_evict & (lists.ring_slot >= 0) & (lists.ring_slot < length)
    slots = torch.where(pending, lists.ring_slot, length).long()
    return slots, (lists.ring_positions() + lists.window).to(torch.int32)


def log2_bias(keep_logprob: Tensor) -> Tensor:
    """log(1 - alpha) [.., T] as the kernels add it to their scores: in units of log 2, and padded."""
    T = keep_logprob.shape[-1]
    scaled = keep_logprob.float() * math.log2(math.e)
    return F.pad(scaled, (0, padded_length(T) - T)).contiguous()
