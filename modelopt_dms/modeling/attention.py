# SPDX-License-Identifier: Apache-2.0
"""The attention function that transformers calls by the name "dms": picks the op, appends to the cache."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from modelopt_dms.gates import handover
from modelopt_dms.kernels import dispatch
from modelopt_dms.kernels.reference import Prompt, Scoring
from modelopt_dms.kvcache.hf_cache import LayerStep
from modelopt_dms.kvcache.paged_head_caches import PagedHeadCaches
from modelopt_dms.modeling.list_attention import attend_lists
from modelopt_dms.modeling.masks import read_mask
from modelopt_dms.modeling.paged_attention import attend_pages

ATTENTION_NAME = "dms"
# Attention that becomes a node of somebody's graph, with the decisions as an input: `exporters.trtllm.graph`.
GRAPH_ATTENTION_NAME = "dms_graph"

# What transformers hands on to every attention function, and what does not change what it computes. `position_ids` and
# sequence indices are in the mask already.
HARMLESS = {
    "assistant_tokenizer",
    "cache_position",
    "image_sizes",
    "inputs_embeds",
    "labels",
    "logits_to_keep",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_ids",
    "return_dict",
    "tokenizer",
    "use_cache",
}


class AttentionError(ValueError):
    """A layer with a gate was asked for attention that DMS does not implement; the message says by what."""


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
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer: with eviction if the hooks around it staged a `LayerStep`, else what it ran before.

    Args:
        module: the attention module; layers without a gate that share a config come here too.
        query: [B, H, T, D].
        key: [B, K, S, D]; of the new tokens only, if the layer's cache is a DMS layer.
        value: [B, K, S, Dv].
        attention_mask: bool or additive [B or 1, 1, T, S'], or None for causal; see `masks.ACCEPTED`.
        dropout: refused; decisions are trained without it.
        scaling: factor on q.k, 1 / sqrt(D) by default.
        **kwargs: `softcap` (Gemma 2's soft cap on scores), `s_aux` (gpt-oss' sink logits [H]), and what is harmless.

    Returns:
        Output [B, T, H, Dv] and None (weights are never materialised).

    Raises:
        AttentionError: an argument that a layer with a gate does not implement, or a second call in one forward.
        MaskError: a mask that DMS would read as another.
    """
    gate = getattr(module, "dms_gate", None)
    given = {"dropout": dropout, "scaling": scaling, **kwargs}
    if gate is None:
        if not hasattr(module, "dms_ran"):
            raise AttentionError(
                f"{layer_name(module)} runs attn_implementation='dms', but its model has no gates: it was made from "
                "the config of a DMS model, or set to it; use modelopt_dms.load, or another attn_implementation"
            )
        return _as_before(module, query, key, value, attention_mask, given)
    _check_arguments(module, dropout, kwargs)
    softcap, sinks = kwargs.get("softcap"), kwargs.get("s_aux")
    scoring = Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sinks)
    if gate.observer is not None:
        gate.observer(query, key, value, scoring)
    step: LayerStep | None = handover.get(module)
    if step is None:
        if gate.enabled:
            raise AttentionError(
                f"{layer_name(module)} was run past its hooks, so nothing has decided about its tokens; call the "
                "module, not its forward()"
            )
        out = _packed(module, query, key, value, attention_mask, scoring)
        if out is not None:
            return out, None
        return _as_before(module, query, key, value, attention_mask, given)
    if step.used:
        raise AttentionError(f"{layer_name(module)} computes attention more than once a forward")
    step.used = True
    query = (
        gate.zero_borrowed_dim_rotated(query)
        if hasattr(gate, "zero_borrowed_dim_rotated")
        else query
    )
    out = _evicting(module, step, query, key, value, attention_mask, scoring)
    return out.transpose(1, 2).contiguous(), None


def layer_name(module: Any) -> str:
    """How errors call an attention module."""
    names = [x.__name__ for x in type(module).__mro__ if x.__module__.startswith("transformers")]
    return f"layer {module.layer_idx} ({(names or [type(module).__name__])[0]})"


def _check_arguments(module: Any, dropout: float, kwargs: dict[str, Any]) -> None:
    """Refuse what would change the result, were it implemented."""
    if dropout:
        raise AttentionError(
            f"attention dropout {dropout} is not supported; set attention_dropout=0 in the model's config"
        )
    for name, value in kwargs.items():
        if value is None or value is False or name in ("softcap", "s_aux") or name in HARMLESS:
            continue
        if name == "is_causal" and value is True:
            continue
        raise AttentionError(
            f"{layer_name(module)} passes {name} to its attention function, which a layer with a DMS gate does not "
            "implement; leave it out, or the layer (dms.layers)"
        )
    if kwargs.get("is_causal") is False:
        raise AttentionError(
            f"{layer_name(module)} asks for attention that is not causal (is_causal=False), which DMS cannot evict from"
        )


def _packed(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scoring: Scoring
) -> Tensor | None:
    """Attention [B, T, H, Dv] without eviction over packed documents, where a kernel computes it; else None.

    For a mask SDPA would repeat keys and values for every query head, and read the mask T times T.
    """
    if mask is None or mask.dtype != torch.bool or k.shape[2] != q.shape[2]:
        return None
    if dispatch.choose("auto", q.device) != "triton":
        return None
    try:
        dispatch.starts_of(mask, len(q))
    except ValueError:  # another mask than the kernels take
        return None
    keeps = torch.zeros(len(q), k.shape[1], k.shape[2], device=q.device)
    prompt = Prompt(q, k, v, keeps, module.dms_gate.window, mask)
    return dispatch.prefill_attention(prompt, scoring).transpose(1, 2).contiguous()


def _as_before(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    given: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """What the layer ran before its model was converted, on masks made for SDPA."""
    if getattr(module, "dms_ran", "sdpa") == "sdpa":
        return sdpa_attention_forward(module, query, key, value, mask, **given)
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    mask = additive(mask, query.dtype, query.device, query.shape[2], key.shape[2], causal)
    if given["scaling"] is None:
        given["scaling"] = query.shape[-1] ** -0.5
    return _eager_function(module)(module, query, key, value, mask, **given)


def _eager_function(module: Any) -> Callable[..., tuple[Tensor, Tensor | None]]:
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    raise AttentionError(f"{layer_name(module)} has no eager attention to fall back to")


def additive(
    mask: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    tokens: int,
    keys: int,
    causal: bool,
) -> Tensor | None:
    """A mask [B or 1, 1, T, S] as eager attention takes it: SDPA leaves out one that is nothing but causal."""
    if mask is None:
        if not causal or tokens == 1:
            return None
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=device).tril(keys - tokens)
        mask = mask[None, None]
    if mask.dtype != torch.bool:
        return mask
    zeros = torch.zeros(mask.shape, dtype=dtype, device=device)
    return zeros.masked_fill(~mask, torch.finfo(dtype).min)


def _evicting(
    module: Any,
    step: LayerStep,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scoring: Scoring,
) -> Tensor:
    """Attention [B, H, T, Dv] with the decisions of a step."""
    layer, tokens = step.layer, query.shape[2]
    if layer is None:
        if key.shape[2] != tokens:
            raise AttentionError(
                f"{layer_name(module)} attends from {tokens} tokens to {key.shape[2]} without a cache that DMS knows"
            )
        assert step.log_keep is not None
        mask, _ = read_mask(layer_name(module), attention_mask, tokens, 0, None, None)
        log_keep = step.log_keep.expand(-1, key.shape[1], -1)
        prompt = Prompt(query, key, value, log_keep, module.dms_gate.window, mask)
        return dispatch.prefill_attention(prompt, scoring)
    attend = getattr(layer.slots, "attend", None)
    if attend is not None:
        return attend(step, query, key, value, scoring)  # a graph is being exported
    layer.check_rows(layer_name(module), tokens)
    past = layer.get_seq_length()
    mask, valid = read_mask(
        layer_name(module), attention_mask, tokens, past, layer.held, step.cache
    )
    if isinstance(layer.slots, PagedHeadCaches):
        out = attend_pages(module, step, query, key, value, mask, scoring)
    else:
        out = attend_lists(module, step, query, key, value, mask, scoring)
    if valid is not None:
        layer.hold(valid.expand(len(query), -1), past)
    return out
