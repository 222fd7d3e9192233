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
    rows = max(1, SCORES.get(q.device.type, SCORES_ELSEWHERE) // (G * T))
    for b in range(B):
        length = int(lengths[b])
        for head in range(K):
            group = slice(head * G, (head + 1) * G)
            sinks = None if scoring.sinks is None else scoring.sinks[group].float()
            queries, keys, values = (
                x[:, :length].float() for x in (q[b, group], k[b, head, None], v[b, head, None])
            )
            gram = stream.gram[group]
            from_keys = _key_terms(values[0], gram).mT  # [G, Dv + 2, S]
            for start in range(window + 1, length, rows):  # earlier queries are within the window
                end = min(start + rows, length)
                weights = _weights(queries[:, start:end], keys[0, :end], start, sinks, scoring)
                out = weights @ values[:, :end]  # [G, t, Dv]
                from_queries = _query_terms(out, gram).div_(stream.squared_norm[b, start:end, None])
                # Keys that no query of this block sees beyond the window.
                seen = end - 1 - window
                change = from_queries @ from_keys[..., :seen]  # [G, t, S]
                weights = weights[..., :seen]
                weights.div_((1 - weights).clamp_(min=LEAST_REST))
                _hide_recent(weights, start, window)
                importance[b, head, :seen] += change.mul_(weights).mul_(weights).sum(dim=(0, 1))
    return importance.clamp_(min=0)


def _key_terms(values: Tensor, gram: Tensor) -> Tensor:
    """Of values [S, Dv], what |P (v - o)|^2 = v'Mv - 2 o'Mv + o'Mo needs, M = P'P: [G, S, Dv + 2]."""
    projected = values @ gram  # [G, S, Dv]
    squares = (projected * values).sum(-1, keepdim=True)
    return torch.cat([projected, squares, torch.ones_like(squares)], dim=-1)


def _query_terms(out: Tensor, gram: Tensor) -> Tensor:
    """Of outputs [G, t, Dv], what the product with `_key_terms` makes of it: [G, t, Dv + 2]."""
    own = ((out @ gram) * out).sum(-1, keepdim=True)
    return torch.cat([-2 * out, torch.ones_like(own), own], dim=-1)


def _hide_recent(weights: Tensor, start: int, window: int) -> None:
    """Set to 0 the weights [G, t, S] of queries from `start` on for keys within their window: the last ones at most."""
    t, S = weights.shape[1:]
    first = max(0, start - window)
    query = torch.arange(start, start + t, device=weights.device)[:, None]
    key = torch.arange(first, S, device=weights.device)
    weights[..., first:].masked_fill_(query - key <= window, 0.0)


def _weights(q: Tensor, k: Tensor, start: int, sinks: Tensor | None, scoring: Scoring) -> Tensor:
    """Attention weights [G, t, S] of queries [G, t, D] at positions from `start` on, the last t of the keys [S, D]."""
    G, t, _ = q.shape
    # With beta 0 it only says the dtype: the scale costs no pass over the scores.
    scores = torch.baddbmm(q.new_empty(1), q, k.T.expand(G, -1, -1), beta=0, alpha=scoring.scale)
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    at = torch.arange(t, device=q.device)
    scores[..., start:].masked_fill_(at > at[:, None], float("-inf"))
    if sinks is None:
        return scores.softmax(-1)
    column = sinks[:, None, None].expand(-1, t, 1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1]
