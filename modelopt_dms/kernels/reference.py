# SPDX-License-Identifier: Apache-2.0
"""What each DMS op means, in plain PyTorch: the specification and, on padded lists, the CPU path.

Shapes: B batch, T query tokens, S key tokens, H query heads, K KV heads, G = H / K, D head dim, L live slots.
Source: arXiv 2506.05345, section 3. A query i reads a key j with

    score(i, j) += 0 if i - j <= W;  log(1 - alpha_j) if i - j > W;  -inf if j > i.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Scores exist for at most this many query rows at a time; more than this falls out of a CPU core's cache.
QUERY_ROWS = 128
# Likewise where PyTorch's attention, which does not keep them, is given a mask.
MASKED_ROWS = 256
# Up to so many blocks, training keeps the scores: they are small, and making them anew takes time.
KEPT_BLOCKS = 4


@dataclass(frozen=True)
class Scoring:
    """How a model turns q.k into attention weights.

    Attributes:
        scale: factor on q.k.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2), or None.
        sinks: logits [H] of one extra key per head with no value (gpt-oss), or None.
    """

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether PyTorch's scaled_dot_product_attention computes the same."""
        return self.softcap is None and self.sinks is None


@dataclass(frozen=True)
class Prompt:
    """T tokens that attend to each other under the delayed-eviction mask.

    Attributes:
        q: queries [B, H, T, D].
        k: keys [B, K, T, D].
        v: values [B, K, T, Dv].
        keep_logprob: log(1 - alpha) [B, K, T] float32, of the token each value governs.
        window: tokens a marked key stays readable.
        mask: bool [B or 1, 1, T, T], True where the model itself lets a query see a key (padding, documents);
            None is causal.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keep_logprob: Tensor
    window: int
    mask: Tensor | None = None


def shift_decisions(decisions: Tensor, shift: int) -> Tensor:
    """Move decisions [.., T] from the token whose hidden state made them to the token they govern.

    With shift 1 (NVIDIA's checkpoints) token j + 1 decides about token j; nobody has decided about the
    last token yet, so it is kept (0 / False).
    """
    if shift == 0:
        return decisions
    return F.pad(decisions[..., shift:], (0, shift))


def hard_keep_logprob(evict: Tensor, shift: int) -> Tensor:
    """log(1 - alpha) [B, K, T] of the tokens that hard decisions [B, K, T], as made, govern: 0 or -inf."""
    governed = shift_decisions(evict, shift)
    return torch.zeros(governed.shape, device=evict.device).masked_fill(governed, float("-inf"))


def delay_bias(keep_logprob: Tensor, queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """Additive bias [B, K, T, S] of the delayed-eviction mask; the one definition that all paths share.

    Args:
        keep_logprob: log(1 - alpha) [B, K, S]; hard decisions are 0 and -inf.
        queries: positions [T] of the queries.
        keys: positions [S] of the keys.
        window: tokens a marked key stays readable.
    """
    age = queries[:, None] - keys[None, :]
    bias = torch.where(age > window, keep_logprob[:, :, None, :], 0.0)  # [B, K, T, S]
    return bias.masked_fill(age < 0, float("-inf"))


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Attention over a part of the keys: output [.., T, Dv] and log-sum-exp [.., T] in float32.

    A row that sees no key has output 0 and log-sum-exp -inf. Sinks are not part of any part: see `with_sinks`.

    Args:
        q: queries [.., T, D].
        k: keys [.., S, D].
        v: values [.., S, Dv].
        bias: additive float bias broadcastable to [.., T, S], or None.
        scoring: scale and softcap.
    """
    scores = _capped(q @ k.transpose(-1, -2) * scoring.scale, scoring.softcap)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if bias is not None:
        scores = scores + bias
    if not scores.shape[-1]:
        return scores.to(v.dtype) @ v, scores.new_full(scores.shape[:-1], float("-inf"))
    top = scores.amax(-1, keepdim=True)
    empty = top == float("-inf")
    has_empty = bool(empty.any())
    weights = (scores.masked_fill(empty, 0.0) if has_empty else scores).softmax(-1)
    # The largest weight is exp(top - lse). On a CPU this is three times as fast as logsumexp.
    lse = top - weights.amax(-1, keepdim=True).log()
    if has_empty:
        weights = weights.masked_fill(empty, 0.0)
    return weights.to(v.dtype) @ v, lse.squeeze(-1)


def merge_partials(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Join attention over two disjoint sets of keys; either side may be empty (log-sum-exp -inf)."""
    lse = torch.logaddexp(lse_a, lse_b)
    both_empty = lse == float("-inf")
    safe = lse.masked_fill(both_empty, 0.0)
    share_a = torch.exp(lse_a - safe)[..., None].to(out_a.dtype)
    share_b = torch.exp(lse_b - safe)[..., None].to(out_b.dtype)
    return out_a * share_a + out_b * share_b, lse


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Account for one value-less key per head: out [B, H, T, Dv], lse [B, H, T], sinks [H]."""
    if sinks is None:
        return out
    return out * torch.sigmoid(lse - sinks.float()[:, None])[..., None].to(out.dtype)


def prefill_partial(prompt: Prompt, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """Attention among the tokens of a prompt, without sinks: output [B, H, T, Dv] and log-sum-exp [B, H, T]."""
    k, v = prompt.k, prompt.v
    grouped = prompt.q.unflatten(1, (k.shape[1], -1))  # [B, H, T, D] -> [B, K, G, T, D]
    outs, lses = [], []
    for start, end in _query_blocks(k.shape[2]):
        bias = _block_bias(prompt, start, end)
        out, lse = partial_attention(
            grouped[..., start:end, :],
            k[:, :, None, :end],
            v[:, :, None, :end],
            bias[:, :, None],
            scoring,
        )
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs, dim=3).flatten(1, 2), torch.cat(lses, dim=3).flatten(1, 2)


def prefill_attention(prompt: Prompt, scoring: Scoring) -> Tensor:
    """As `prefill_partial` with sinks, and fast: output [B, H, T, Dv], differentiable in all tensors."""
    tensors = (prompt.q, prompt.k, prompt.v, prompt.keep_logprob)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if scoring.is_plain and not learns:
        return _masked_prefill(prompt, scoring)
    B, H, T, D = prompt.q.shape
    K = prompt.k.shape[1]
    G = H // K
    grouped = prompt.q.reshape(B * K, G, T, D)
    k, v = prompt.k.flatten(0, 1), prompt.v.flatten(0, 1)
    sinks = None if scoring.sinks is None else scoring.sinks.float().view(K, G).repeat(B, 1)

    def rows(start: int, end: int) -> Tensor:
        """Output [B*K, G, t, Dv] of the queries from start to end."""
        bias = _block_bias(prompt, start, end)
        some = grouped[:, :, start:end].flatten(1, 2)  # [B*K, G*t, D]
        bias = bias[:, :, None].expand(-1, -1, G, -1, -1).reshape(B * K, -1, end)
        scores = _biased_scores(some, k[:, :end].transpose(1, 2), bias, scoring)
        if sinks is not None:
            column = sinks.repeat_interleave(end - start, dim=1)[..., None]
            scores = torch.cat([scores, column], dim=-1)
        weights = scores.softmax(-1)[..., :end].to(v.dtype)
        return (weights @ v[:, :end]).unflatten(1, (G, -1))

    outs = []
    for start, end in _query_blocks(T):
        if torch.is_grad_enabled() and T > KEPT_BLOCKS * QUERY_ROWS:
            # The backward pass makes the scores anew: kept, they would take memory with the square of T.
            out = checkpoint(rows, start, end, use_reentrant=False, preserve_rng_state=False)
        else:
            out = rows(start, end)
        outs.append(out)
    return torch.cat(outs, dim=2).reshape(B, H, T, -1)


def _masked_prefill(prompt: Prompt, scoring: Scoring) -> Tensor:
    """As `prefill_attention` without gradients and sinks, by PyTorch's own attention: half the time in bfloat16."""
    B, H, T, D = prompt.q.shape
    K = prompt.k.shape[1]
    grouped = prompt.q.reshape(B * K, H // K, T, D)
    k, v = (x.flatten(0, 1)[:, None] for x in (prompt.k, prompt.v))  # [B * K, 1, S, D]
    outs = []
    for start, end in _query_blocks(T, MASKED_ROWS):
        bias = _block_bias(prompt, start, end).to(k.dtype).flatten(0, 1)[:, None]
        rows = grouped[:, :, start:end]
        outs.append(masked_attention(rows, k[:, :, :end], v[:, :, :end], bias, scoring))
    return torch.cat(outs, dim=2).reshape(B, H, T, -1)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scoring: Scoring,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of N lists, padded to one length, each with its own queries: output [N, H, T, Dv]. No gradients.

    Args:
        q: queries [N, H, T, D].
        k: keys [N, H or 1, S, D].
        v: values [N, H or 1, S, Dv].
        bias: additive [N, 1, T, S], -inf where a query does not see a key; it sees one at least.
        scoring: scale and softcap; its sinks are not read.
        sinks: logits [N, H] of one key more without a value, or None.
    """
    alone = q.shape[2] == 1 and k.shape[1] == 1
    if alone:  # heads read the keys once, as if they were tokens
        q = q.transpose(1, 2)
    if scoring.is_plain:
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scoring.scale)
        return out.transpose(1, 2) if alone else out
    scores = _capped(q @ k.transpose(-1, -2) * scoring.scale, scoring.softcap)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) + bias
    if sinks is not None:
        column = sinks[:, None, :, None] if alone else sinks[:, :, None, None]
        scores = torch.cat([scores, column.to(scores.dtype).expand(*scores.shape[:3], 1)], dim=-1)
    out = scores.softmax(-1)[..., : k.shape[2]].to(v.dtype) @ v
    return out.transpose(1, 2) if alone else out


def assign_slots(expired: Tensor, marked: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
    """Where the next token of every list is written, and the list's new length.

    The slot of the token that leaves the window is reused if that token was marked for eviction, else the list
    grows by one: lists have no holes and never shrink while decoding.

    Args:
        expired: slot [B, K] of the token that just left the window, -1 if there is none.
        marked: whether [B, K] that token was marked.
        live: slots in use [B, K].
    """
    reuse = marked & (expired >= 0)
    return torch.where(reuse, expired, live), live + (~reuse).long()


def _query_blocks(T: int, rows: int = QUERY_ROWS) -> Iterator[tuple[int, int]]:
    """Blocks of query rows, start..end."""
    for start in range(0, T, rows):
        yield start, min(start + rows, T)


def _block_bias(prompt: Prompt, start: int, end: int) -> Tensor:
    """Bias [B, K, t, end] of query rows start..end on the keys up to their end."""
    keep_logprob = prompt.keep_logprob[..., :end]
    positions = torch.arange(end, device=keep_logprob.device)
    bias = delay_bias(keep_logprob, positions[start:], positions, prompt.window)
    if prompt.mask is None:
        return bias
    # A padding token sees itself: a row without any key would be NaN, and spread through its value.
    itself = positions[start:, None] == positions
    return bias.masked_fill(~(prompt.mask[:, :, start:end, :end] | itself), float("-inf"))


def _biased_scores(rows: Tensor, keys: Tensor, bias: Tensor, scoring: Scoring) -> Tensor:
    """Scores [N, R, S] in float32 (float64 stays) from rows [N, R, D] and keys [N, D, S]."""
    if scoring.softcap is None and rows.dtype == bias.dtype:
        return torch.baddbmm(bias, rows, keys, alpha=scoring.scale)
    scores = _capped(rows @ keys * scoring.scale, scoring.softcap)
    return scores.to(torch.promote_types(scores.dtype, bias.dtype)) + bias


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
