# SPDX-License-Identifier: Apache-2.0
"""What evicting a key would cost: the change of the layer's output that queries beyond the window would see.

Shapes as in `kernels.reference`. What queries within the window read is no reason to keep a key: they read it anyway.

Without key j, whose weight is a_ij, the output o_i of a head becomes o_i - a_ij / (1 - a_ij) (v_j - o_i): exact, as the
other weights are renormalised. Projected to the residual stream, squared and relative to r_i, the stream as the layer
leaves it, that is comparable between heads and layers, and sums over queries, so that one threshold can serve all:

    importance_j = sum over heads and i > j + W of (a_ij / (1 - a_ij))^2 |P (v_j - o_i)|^2 / |r_i|^2
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_dms.kernels.reference import Scoring

# Scores that exist at a time: on a CPU as many as stay in its caches.
SCORES = {"cpu": 1 << 18}
SCORES_ELSEWHERE = 1 << 24
# A key with nearly all of the weight: what remains without it is noise.
LEAST_REST = 0.05


@dataclass(frozen=True)
class ResidualStream:
    """How a layer's output reaches the residual stream.

    Attributes:
        gram: P^T P [H, Dv, Dv] of every head's part P [C, Dv] of the output projection, float32.
        squared_norm: of the stream after the layer [B, T], float32.
    """

    gram: Tensor
    squared_norm: Tensor


@torch.no_grad()
def output_change(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stream: ResidualStream,
    lengths: Tensor,
    window: int,
    scoring: Scoring,
) -> Tensor:
    """Squared relative change of a layer's output, summed over the queries beyond the window, if a key were evicted.

    Attention is causal, and sequences are padded on the right, so that no mask [T, T] is needed.

    Args:
        q: queries [B, H, T, D].
        k: keys [B, K, T, D].
        v: values [B, K, T, Dv].
        stream: what the output is added to.
        lengths: tokens [B] of each sequence; what follows them counts for nothing.
        window: tokens a marked key stays readable.
        scoring: how scores become weights.

    Returns:
        Importance [B, K, T] float32, summed over the heads of a KV head's group; 0 for keys that no such query sees.
    """
    B, H, T, _ = q.shape
    K = k.shape[1]
    G = H // K
    importance = torch.zeros(B, K, T, dtype=torch.float32, device=q.device)
    positions = torch.arange(T, device=q.device)
    rows = max(1, SCORES.get(q.device.type, SCORES_ELSEWHERE) // (G * T))
    for b in range(B):
        length = int(lengths[b])
        for head in range(K):
            group = slice(head * G, (head + 1) * G)
            sinks = None if scoring.sinks is None else scoring.sinks[group].float()
            values = v[b, head, :length].float()
            gram = stream.gram[group]
            projected = values @ gram  # [G, S, Dv]
            squares = (projected * values).sum(-1)  # [G, S]
            for start in range(window + 1, length, rows):  # earlier queries are within the window
                end = min(start + rows, length)
                weights = _weights(
                    q[b, group, start:end], k[b, head, :end], positions[start:end], sinks, scoring
                )
                out = weights @ values[:end]  # [G, t, Dv]
                own = ((out @ gram) * out).sum(-1, keepdim=True)  # [G, t, 1]
                change = torch.baddbmm(
                    squares[:, None, :end] + own, out, projected[:, :end].mT, alpha=-2
                )
                change = change.clamp_(min=0).div_(stream.squared_norm[b, start:end, None])
                weights = weights.div_((1 - weights).clamp_(min=LEAST_REST))
                # Keys that no query of this block sees beyond the window.
                seen = end - 1 - window
                change = change[..., :seen].mul_(weights[..., :seen].square())
                late = positions[start:end, None] - positions[:seen] > window
                importance[b, head, :seen] += change.mul_(late).sum(dim=(0, 1))
    return importance


def _weights(q: Tensor, k: Tensor, at: Tensor, sinks: Tensor | None, scoring: Scoring) -> Tensor:
    """Attention weights [G, t, S] in float32 of queries [G, t, D] at positions [t] on keys [S, D]."""
    scores = (q @ k.T).float().mul_(scoring.scale)
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    future = torch.arange(len(k), device=k.device) > at[:, None]
    scores = scores.masked_fill_(future, float("-inf"))
    if sinks is None:
        return scores.softmax(-1)
    column = sinks[:, None, None].expand(-1, len(at), 1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
