# SPDX-License-Identifier: Apache-2.0
"""Attention of one layer over a paged cache: a decode step in a few launches, a long prompt in chunks.

A prompt is read in chunks, each of which attends to what the chunks before it left: so its cost follows the compression
ratio, as that of decoding does.
"""

from typing import Any

import torch
from torch import Tensor, nn

from modelopt_dms.kernels import dispatch
from modelopt_dms.kernels.prefill_reference import Chunk
from modelopt_dms.kernels.reference import (
    Prompt,
    Scoring,
    hard_keep_logprob,
    merge_partials,
    partial_attention,
    prefill_partial,
    shift_decisions,
    with_sinks,
)
from modelopt_dms.kvcache.hf_cache import LayerStep
from modelopt_dms.kvcache.paged_head_caches import PagedHeadCaches

# Tokens of a prompt that attend to each other in full; what they evict is gone for the next chunk.
CHUNK = 2048


def attend_pages(
    module: Any,
    step: LayerStep,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scoring: Scoring,
) -> Tensor:
    """Attention [B, H, T, Dv] of T new tokens over what lives and among themselves, after which they are taken in.

    Args:
        module: the attention module.
        step: what its hooks staged, with a paged cache layer.
        q: queries [B, H, T, D].
        k: keys [B, K, T, D] as they will be read from the cache; of all heads, where the cache holds latents (MLA).
        v: values [B, K, T, Dv], likewise.
        mask: bool [B or 1, 1, T, S], or None for causal.
        scoring: how scores become weights.
    """
    slots = _slots(step)
    latent = hasattr(module, "expand_kv")
    if step.undecided is None:
        attend = _attend_latents if latent else _attend_chunks
        return attend(module, step, q, k, v, mask, scoring)
    assert step.layer is not None
    valid = None if mask is None else mask[:, 0, 0, -1].expand(len(q))
    k, v = step.layer.take_incoming()
    slots.append_token(k[:, :, 0], v[:, :, 0], step.undecided, valid)
    if latent:
        return _absorbed(module, q[:, :, 0], slots, scoring)[:, :, None]
    out = dispatch.decode_attention(q[:, :, 0], slots.pool, slots.state, scoring, impl=slots.impl)
    return out[:, :, None]


def _attend_chunks(
    module: Any,
    step: LayerStep,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scoring: Scoring,
) -> Tensor:
    slots = _slots(step)
    assert step.layer is not None and step.evict is not None
    evict = step.evict.expand(-1, k.shape[1], -1)
    batch, T = len(q), q.shape[2]
    starts, valid = _starts(mask, batch, T), _valid(mask, batch, T)
    incoming = step.layer.take_incoming()
    if starts is not None and T > CHUNK:
        _check_documents(starts, valid)
    outs = []
    for start in range(0, T, CHUNK):
        part = slice(start, start + CHUNK)
        decisions = evict[..., part]
        new_k, new_v = (x[:, :, part] for x in incoming)
        slots.prepare(new_k, new_v)
        slots.decide_previous(decisions[..., 0])
        with slots.expiries() as expiry:
            chunk = Chunk(
                q[:, :, part],
                k[:, :, part],
                v[:, :, part],
                shift_decisions(decisions, slots.shift),
                slots.state.seen[:, 0].contiguous(),
                None if starts is None else starts[:, part] - start,
                expiry,
            )
            pool, lists = slots.pool, slots.state
            outs.append(dispatch.attend_chunk(chunk, pool, lists, scoring, impl=slots.impl))
        slots.append(new_k, new_v, decisions, None if valid is None else valid[:, part])
    return torch.cat(outs, dim=2)


def _starts(mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """First of the new tokens [B, T] that each of them sees; -1 where it sees older ones, too. None: it sees all."""
    if mask is None:
        return None
    starts = dispatch.starts_of(mask, batch)
    sees_older = mask[:, 0, :, :-tokens].any(-1)
    return torch.where(sees_older, -1, starts)  # type: ignore[arg-type]


def _check_documents(starts: Tensor, valid: Tensor | None) -> None:
    """A chunk does not know which earlier tokens belong to another document."""
    others = starts != starts[:, -1:]
    if valid is not None:
        others = others & valid
    if bool(others.any()):
        raise ValueError(
            f"packed documents of more than {CHUNK} tokens in all cannot fill a KV cache on a CUDA device; pass "
            "use_cache=False, or one document a row"
        )


def _attend_latents(
    module: Any,
    step: LayerStep,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scoring: Scoring,
) -> Tensor:
    """As `_attend_chunks` where the cache holds one latent a token (MLA), which is expanded to all heads."""
    slots = _slots(step)
    assert step.layer is not None and step.evict is not None
    log_keep = hard_keep_logprob(step.evict, slots.shift).expand(-1, k.shape[1], -1)
    if mask is not None and slots.seen:
        mask = mask[..., -q.shape[2] :]
    valid = _valid(mask, len(q), q.shape[2])
    incoming = step.layer.take_incoming()
    slots.prepare(*incoming)
    slots.decide_previous(step.evict[..., 0])
    prompt = Prompt(q, k, v, log_keep, slots.window, mask)
    if not slots.seen:
        out = dispatch.prefill_attention(prompt, scoring, impl=slots.impl)
    else:
        new = prefill_partial(prompt, scoring)
        past = _past_latents(module, q, slots, scoring)
        out = with_sinks(*merge_partials(*new, *past), scoring.sinks)
    slots.append(*incoming, step.evict, valid)
    return out


def _past_latents(
    module: Any, q: Tensor, slots: PagedHeadCaches, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Attention of new tokens [B, H, T, D] over the latents that lived before them."""
    longest = int(slots.state.live.max())
    keys, values = module.expand_kv(*slots.read(longest, q.dtype))  # [B, H, L, .]
    at = torch.arange(longest, device=q.device)
    queries = slots.state.seen[:, 0, None] + torch.arange(q.shape[2], device=q.device)  # [B, T]
    readable = queries[:, None, :, None] <= slots.expiry(longest)[:, :, None]
    readable &= (at < slots.state.live[..., None])[:, :, None]
    bias = torch.zeros(readable.shape, device=q.device).masked_fill(~readable, float("-inf"))
    return partial_attention(q, keys, values, bias, scoring)


def _absorbed(module: Any, q: Tensor, slots: PagedHeadCaches, scoring: Scoring) -> Tensor:
    """Attention [B, H, Dv] of queries [B, H, D] over latents as they are: the projection moves to q and output.

    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2. Quantizers of the projection's input see nothing here.
    """
    nope = module.qk_nope_head_dim
    weight = _projection_weight(module.kv_b_proj, module.kv_lora_rank, q)
    weight = weight.unflatten(0, (q.shape[1], -1))  # [H * (nope + Dv), C] -> [H, nope + Dv, C]
    latent = torch.einsum("bhn,hnc->bhc", q[..., :nope], weight[:, :nope])
    query = torch.cat([latent, q[..., nope:]], dim=-1)
    out = dispatch.decode_latent(query, slots.pool, slots.state, scoring, impl=slots.impl)
    return torch.einsum("bhc,hvc->bhv", out, weight[:, nope:])


def _projection_weight(projection: Any, width: int, like: Tensor) -> Tensor:
    """The matrix [out, C] that a linear module applies, whatever stands there now."""
    if hasattr(projection, "weight_quantizer"):
        return projection.weight_quantizer(projection.weight)
    if type(projection) is nn.Linear and "forward" not in vars(projection):
        return projection.weight
    # An adapter, or weights that accelerate brings: only the module knows what it computes.
    return projection(torch.eye(width, dtype=like.dtype, device=like.device)).T


def _slots(step: LayerStep) -> PagedHeadCaches:
    assert step.layer is not None and isinstance(step.layer.slots, PagedHeadCaches)
    return step.layer.slots


def _valid(mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """Which of the new tokens [B, T] are not padding, from a mask [B or 1, 1, T, S]."""
    if mask is None:
        return None
    return mask[:, 0, :, -tokens:].diagonal(dim1=-2, dim2=-1).expand(batch, -1)
