# SPDX-License-Identifier: Apache-2.0
"""Attention of one layer over lists on a CPU: all lists of about one length at once, a long prompt in chunks.

A chunk of a prompt attends to what the chunks before it left, so that its cost follows the compression ratio.

Shapes: B sequences, T new tokens, H query heads, K KV heads, N lists of a bucket, C rows that each has room for.
"""

from typing import Any

import torch
from torch import Tensor

from modelopt_dms.kernels.reference import (
    Prompt,
    Scoring,
    delay_bias,
    hard_keep_logprob,
    masked_attention,
)
from modelopt_dms.kvcache.head_caches import Bucket, HeadCaches
from modelopt_dms.kvcache.hf_cache import DMSLayer, LayerStep
from modelopt_dms.modeling.masks import only_padding

# Tokens of a prompt that attend to each other in full.
CHUNK = 512
# Biases exist for at most so many bytes at a time; larger buffers cost page faults.
BIAS_BYTES = 16 << 20


def attend_lists(
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
        step: what its hooks staged, with a cache layer of lists.
        q: queries [B, H, T, D].
        k: keys [B, K, T, D] as they will be read from the cache; of all heads, where the cache holds latents (MLA).
        v: values [B, K, T, Dv], likewise.
        mask: bool [B or 1, 1, T, S], or None for causal.
        scoring: how scores become weights.
    """
    layer = step.layer
    assert layer is not None and step.evict is not None
    slots, T = _slots(layer), q.shape[2]
    mask = None if mask is None else mask[..., -T:]
    valid = None if mask is None else mask[:, 0].diagonal(dim1=-2, dim2=-1).expand(len(q), -1)
    evict = step.evict.expand(-1, layer.heads, -1)
    incoming = layer.take_incoming()
    slots.prepare(*incoming)
    if T == 1 and (valid is None or bool(valid.all())):
        layer.append(incoming, evict, None)
        return _decode(module, layer, q, scoring)
    prompt = Prompt(q, k, v, hard_keep_logprob(evict, slots.shift), slots.window, mask)
    whole = T <= CHUNK or (mask is not None and not only_padding(mask))
    size = T if whole else -(-T // -(-T // CHUNK))
    outs = []
    for start in range(0, T, size):
        part = slice(start, start + size)
        slots.decide_previous(evict[..., start])
        outs.append(_attend_chunk(module, layer, _part(prompt, part), scoring))
        rows = tuple(x[:, :, part] for x in incoming)
        layer.append(rows, evict[..., part], None if valid is None else valid[:, part])
    return torch.cat(outs, dim=2)


def _part(prompt: Prompt, part: slice) -> Prompt:
    q, k, v, log_keep = (x[:, :, part] for x in (prompt.q, prompt.k, prompt.v, prompt.keep_logprob))
    mask = None if prompt.mask is None else prompt.mask[:, :, part, part]
    return Prompt(q, k, v, log_keep, prompt.window, mask)


def _decode(module: Any, layer: DMSLayer, q: Tensor, scoring: Scoring) -> Tensor:
    """Attention [B, H, 1, Dv] of one token a sequence, which the lists hold already."""
    slots = _slots(layer)
    rows = q.reshape(slots.lists, -1, 1, q.shape[-1])  # [B, H, 1, D] -> [B*K, H/K, 1, D]
    order = torch.cat([x.lists for x in slots.buckets]) if len(slots.buckets) > 1 else None
    rows = rows if order is None else rows[order]
    outs, done = [], 0
    for bucket in slots.buckets:
        some = rows[done : done + len(bucket.lists)]
        done += len(bucket.lists)
        k, v = _read(module, layer, bucket)
        bias = bucket.bias[:, None, None]  # [N, C] -> [N, 1, 1, C]
        outs.append(masked_attention(some, k, v, bias, scoring, _sinks(scoring, bucket, slots.K)))
    if order is None:
        return outs[0].reshape(*q.shape[:3], -1)
    out = torch.cat(outs)
    return torch.empty_like(out).index_copy_(0, order, out).reshape(*q.shape[:3], -1)


def _attend_chunk(module: Any, layer: DMSLayer, prompt: Prompt, scoring: Scoring) -> Tensor:
    """Attention [B, H, T, Dv] of new tokens over the lists and among themselves; the lists do not hold them yet."""
    slots, (B, H, T, _) = _slots(layer), prompt.q.shape
    new = [x.reshape(slots.lists, -1, T, x.shape[-1]) for x in (prompt.q, prompt.k, prompt.v)]
    out = prompt.q.new_empty(*new[0].shape[:3], prompt.v.shape[-1])  # [B*K, H/K, T, Dv]
    for bucket in slots.buckets:
        q, k, v = (x[bucket.lists] for x in new)
        N, C = bucket.bias.shape
        if C:
            past = _read(module, layer, bucket)
            k, v = (torch.cat(x, dim=2) for x in zip(past, (k, v), strict=True))
        sinks = _sinks(scoring, bucket, slots.K)
        size = max(32, BIAS_BYTES // (4 * N * (C + T)))
        for start in range(0, T, size):
            end = min(start + size, T)
            bias = _bias(slots, bucket, prompt, start, end)
            rows, S = q[:, :, start:end], C + end
            part = masked_attention(rows, k[:, :, :S], v[:, :, :S], bias, scoring, sinks)
            out[bucket.lists, :, start:end] = part
    return out.reshape(B, H, T, -1)


def _bias(slots: HeadCaches, bucket: Bucket, prompt: Prompt, start: int, end: int) -> Tensor:
    """Bias [N, 1, t, C + end] of the new tokens from start to end on the slots and on the tokens up to their end."""
    device = bucket.bias.device
    positions = torch.arange(end, device=device)
    queries = slots.seen + positions[start:, None]
    past = queries <= slots.last_readers(bucket)[:, None]  # [N, t, C]
    past = torch.zeros(past.shape, device=device).masked_fill_(~past, float("-inf"))
    log_keep = prompt.keep_logprob.flatten(0, 1)[bucket.lists, None, :end]
    own = delay_bias(log_keep, positions[start:], positions, prompt.window)  # [N, 1, t, end]
    if prompt.mask is not None:
        # A padding token sees itself: a row without any key would be NaN, and spread through its value.
        seen = prompt.mask[:, :, start:end, :end] | (positions[start:, None] == positions)
        seen = seen.expand(slots.B, -1, -1, -1)[bucket.lists // slots.K]
        own = own.masked_fill_(~seen, float("-inf"))
    return torch.cat([past[:, None], own], dim=-1)


def _read(module: Any, layer: DMSLayer, bucket: Bucket) -> tuple[Tensor, Tensor]:
    """Keys [N, 1 or H, C, D] and values [N, 1 or H, C, Dv] of a bucket, as attention reads them."""
    k, v = (x[:, None] for x in layer.read(bucket))
    # MLA caches one latent a token, and expands it to the keys and values of all heads for attention.
    return module.expand_kv(k, v) if hasattr(type(module), "expand_kv") else (k, v)


def _sinks(scoring: Scoring, bucket: Bucket, heads: int) -> Tensor | None:
    """Sink logits [N, H / K] of a bucket's lists."""
    if scoring.sinks is None:
        return None
    return scoring.sinks.view(heads, -1)[bucket.lists % heads]


def _slots(layer: DMSLayer) -> HeadCaches:
    assert isinstance(layer.slots, HeadCaches)
    return layer.slots
