# SPDX-License-Identifier: Apache-2.0
"""One query token per sequence on paged lists in plain PyTorch: what `kernels.decode`'s kernels mean.

Every live slot is read and no other: eviction has already overwritten what is gone. Works on lists padded to the
longest that pages allow, and never synchronizes with the host.
"""

import torch
from torch import Tensor

from modelopt_dms.kernels.layout import PAGE, PagePool, PageTables
from modelopt_dms.kernels.reference import Scoring
from modelopt_dms.kernels.rows import read_rows


def decode_attention(q: Tensor, pool: PagePool, lists: PageTables, scoring: Scoring) -> Tensor:
    """Attention of queries [B, H, D] over their lists: [B, H, Dv] in q's dtype, 0 where a list is empty.

    Args:
        q: queries, one a sequence.
        pool: where rows lie.
        lists: which rows each (sequence, KV head) has.
        scoring: scale, softcap, sinks.
    """
    k, v, valid = _padded(pool, lists, torch.promote_types(q.dtype, torch.float32))
    return _attend(q, k, v, valid, scoring)


def decode_latent(q: Tensor, pool: PagePool, lists: PageTables, scoring: Scoring) -> Tensor:
    """As `decode_attention` for MLA: queries [B, H, D1 + D2] over one list a sequence, [B, H, D1].

    The pool's keys are the latents [D1], also the values; the pool's values are the rotary parts [D2] of the keys.
    """
    latent, rotary, valid = _padded(pool, lists, torch.promote_types(q.dtype, torch.float32))
    return _attend(q, torch.cat([latent, rotary], dim=-1), latent, valid, scoring)


def _padded(pool: PagePool, lists: PageTables, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [B, K, S, .] of all slots that pages could give, and which of them are live [B, K, S]."""
    slots = torch.arange(lists.table.shape[2] * PAGE, device=lists.live.device)
    valid = slots < lists.live[..., None]
    k, v = read_rows(pool, lists, torch.where(valid, slots, -1), dtype)
    return k, v, valid


def _attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, scoring: Scoring) -> Tensor:
    grouped = q.unflatten(1, (k.shape[1], -1)).to(k.dtype)  # [B, H, D] -> [B, K, G, D]
    scores = grouped @ k.transpose(-1, -2) * scoring.scale  # [B, K, G, S]
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    scores = scores.masked_fill(~valid[:, :, None], float("-inf"))
    # An empty list's maximum is made finite, and its sum positive.
    top = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(k.dtype).min)
    if scoring.sinks is not None:
        sinks = scoring.sinks.to(k.dtype).view(1, k.shape[1], -1, 1)
        top = torch.maximum(top, sinks)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if scoring.sinks is not None:
        total = total + torch.exp(sinks - top)
    out = weights @ v / total.clamp(min=torch.finfo(k.dtype).tiny)
    return out.flatten(1, 2).to(q.dtype)
