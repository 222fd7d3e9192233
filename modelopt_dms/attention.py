# SPDX-License-Identifier: Apache-2.0
"""The attention function that transformers calls by the name "dms": picks the op, appends to the cache."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from modelopt_dms.cache import DMSLayer, LayerStep
from modelopt_dms.ops import (
    Scoring,
    decode_attention,
    door,
    merge_partials,
    partial_attention,
    past_bias,
    plain_attention,
    prefill_attention,
    prefill_partial,
    with_sinks,
)
from modelopt_dms.page_attention import attend_pages
from modelopt_dms.pages import SlotLists
from modelopt_dms.paging import PagedSlots

ATTENTION_NAME = "dms"
# Attention that becomes a node of somebody's graph, with the decisions as an input: `exporters.trtllm.graph`.
GRAPH_ATTENTION_NAME = "dms_graph"

# From one list's cached rows [L, .] to keys [N, L, D] and values [N, L, Dv].
Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def register_attention() -> None:
    """Make "dms" a valid attn_implementation. Once: ModelOpt's quantized attention pins what it found first."""
    AttentionInterface.register(ATTENTION_NAME, dms_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def dms_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer: with eviction if a `LayerStep` is staged on the module, else plain.

    Args:
        module: the attention module; layers that were not converted come here too.
        query: [B, H, T, D].
        key: [B, K, S, D]; of the new tokens only, if the layer's cache is a DMS layer.
        value: [B, K, S, Dv].
        attention_mask: bool or additive [B, 1, T, S'], or None for causal.
        dropout: refused; decisions are trained without it.
        scaling: factor on q.k, 1 / sqrt(D) by default.
        softcap: Gemma 2's soft cap on scores.
        s_aux: gpt-oss' sink logits [H].
        **kwargs: what other implementations use.

    Returns:
        Output [B, T, H, Dv] and None (weights are never materialised).
    """
    if dropout:
        raise ValueError(
            f"attention dropout {dropout} is not supported; set attention_dropout=0 in the model's config"
        )
    scoring = Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    mask = _as_bool(attention_mask)
    watch = getattr(getattr(module, "dms_gate", None), "watch", None)
    if watch is not None:
        watch(query, key, value, scoring)
    step: LayerStep | None = getattr(module, "dms_step", None)
    if step is None:
        out = plain_attention(query, key, value, mask, scoring)
    else:
        step.used = True
        silence = getattr(module.dms_gate, "silence_rotated", None)
        query = query if silence is None else silence(query)
        if step.layer is None:
            assert step.log_keep is not None
            log_keep = step.log_keep.expand(-1, key.shape[1], -1)
            window = module.dms_gate.window
            out = door.prefill_attention(query, key, value, log_keep, window, mask, scoring)
        elif (attend := getattr(step.layer.slots, "attend", None)) is not None:
            out = attend(step, query, key, value, scoring)  # a graph is being exported
        elif isinstance(step.layer.slots, PagedSlots):
            out = attend_pages(module, query, key, value, mask, scoring)
        else:
            out = _cached_attention(module, query, key, value, mask, scoring)
    return out.transpose(1, 2).contiguous(), None


def _cached_attention(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring
) -> Tensor:
    """Attention of T new tokens over what lives and among themselves, after which they are taken in."""
    step: LayerStep = module.dms_step
    layer, evict = step.layer, step.evict
    assert layer is not None and evict is not None and step.log_keep is not None
    assert isinstance(layer.slots, SlotLists)
    # MLA caches one latent a token, and expands it to the keys and values of all heads for attention.
    expand = _expander(module) if hasattr(module, "expand_kv") else _as_one_head
    evict = evict.expand(-1, layer.heads, -1)
    T = q.shape[2]
    mask = None if mask is None else mask[..., -T:]
    valid = None if mask is None else mask[:, 0].diagonal(dim1=-2, dim2=-1).expand(len(q), -1)
    if T == 1 and (valid is None or bool(valid.all())):
        layer.append(evict, None)
        held = [expand(*layer.rows(i)) for i in range(layer.slots.lists)]
        return decode_attention(q, [x for x, _ in held], [x for _, x in held], scoring)
    log_keep = step.log_keep.expand(-1, k.shape[1], -1)
    if not layer.slots.seen:
        layer.append(evict, valid)
        return prefill_attention(q, k, v, log_keep, layer.slots.window, mask, scoring)
    layer.slots.decide_previous(evict[..., 0])
    new = prefill_partial(q, k, v, log_keep, layer.slots.window, mask, scoring)
    past = _attend_past(layer, q, expand, scoring)
    layer.append(evict, valid)
    return with_sinks(*merge_partials(*new, *past), scoring.sinks)


def _attend_past(
    layer: DMSLayer, q: Tensor, expand: Expand, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Attention of new tokens [B, H, T, D] over the slots that lived before them, list by list."""
    slots = layer.slots
    assert isinstance(slots, SlotLists)
    B, H, T, _ = q.shape
    queries = torch.arange(slots.seen, slots.seen + T, device=q.device)
    grouped = q.reshape(slots.lists, -1, T, q.shape[-1])  # [B, H, T, D] -> [B*K, H/K, T, D]
    outs, lses = [], []
    for i in range(slots.lists):
        k, v = expand(*layer.rows(i))
        bias = past_bias(queries, *slots.pending(i), k.shape[1], slots.window)
        heads = grouped[i].unflatten(0, (len(k), -1))  # [H/K, T, D] -> [N, G, T, D]
        out, lse = partial_attention(heads, k[:, None], v[:, None], bias, scoring)
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs).reshape(B, H, T, -1), torch.stack(lses).reshape(B, H, T)


def _as_one_head(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return k[None], v[None]


def _expander(module: Any) -> Expand:
    def expand(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = module.expand_kv(k[None, None], v[None, None])
        return k[0], v[0]

    return expand


def _as_bool(mask: Tensor | None) -> Tensor | None:
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2
