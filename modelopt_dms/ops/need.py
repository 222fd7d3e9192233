# SPDX-License-Identifier: Apache-2.0
"""How much the future needs a key: the attention that queries beyond the delay window pay to it. Plain PyTorch.

Shapes as in `ops.reference`. What queries within the window read is no reason to keep a key: they read it anyway.
"""

import torch
from torch import Tensor

from modelopt_dms.ops.reference import Scoring

# Scores that exist at a time; at 32K tokens these are 64 queries of a group of 8 heads.
SCORES = 1 << 24


@torch.no_grad()
def future_need(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, window: int, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Largest and mean attention weight, times value norm, that each key gets from queries beyond the window.

    Attention is causal, and sequences are padded on the right, so that no mask [T, T] is needed.

    Args:
        q: queries [B, H, T, D].
        k: keys [B, K, T, D].
        v: values [B, K, T, Dv].
        lengths: tokens [B] of each sequence; what follows them counts for nothing.
        window: tokens a marked key stays readable.
        scoring: how scores become weights.

    Returns:
        Largest and mean need [B, K, T] float32, over those queries and the heads of a KV head's group. A value's norm
        counts relative to the mean of its sequence and head. 0 for keys that no such query sees.
    """
    B, H, T, _ = q.shape
    K = k.shape[1]
    largest = torch.zeros(B, K, T, dtype=torch.float32, device=q.device)
    mean = torch.zeros_like(largest)
    positions = torch.arange(T, device=q.device)
    valid = positions < lengths[:, None].to(q.device)  # [B, T]
    rows = max(1, SCORES // (H // K * T))
    for b in range(B):
        for head in range(K):
            group = slice(head * (H // K), (head + 1) * (H // K))
            sinks = None if scoring.sinks is None else scoring.sinks[group].float()
            length = int(lengths[b])
            for start in range(window + 1, length, rows):  # earlier queries are within the window
                end = min(start + rows, length)
                some = positions[start:end]
                weights = _weights(q[b, group, some], k[b, head, :end], some, sinks, scoring)
                weights = weights.masked_fill(some[:, None] - positions[:end] <= window, 0.0)
                best = weights.amax(dim=(0, 1))
                largest[b, head, :end] = torch.maximum(largest[b, head, :end], best)
                mean[b, head, :end] += weights.mean(dim=0).sum(dim=0)
    late = (lengths[:, None].to(q.device) - 1 - window - positions).clamp(
        min=1
    )  # queries that count
    norms = v.float().norm(dim=-1) * valid[:, None]
    average = norms.sum(-1, keepdim=True) / valid.sum(-1)[:, None, None].clamp(min=1)
    norms = norms / average.clamp(min=torch.finfo(torch.float32).tiny)
    return largest * norms, mean / late[:, None] * norms


def _weights(q: Tensor, k: Tensor, at: Tensor, sinks: Tensor | None, scoring: Scoring) -> Tensor:
    """Attention weights [G, t, S] in float32 of queries [G, t, D] at positions [t] on keys [S, D]."""
    scores = (q @ k.T * scoring.scale).float()
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    future = torch.arange(len(k), device=k.device) > at[:, None]
    scores = scores.masked_fill_(future, float("-inf"))
    if sinks is None:
        return scores.softmax(-1)
    column = sinks[:, None, None].expand(-1, len(at), 1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
