# SPDX-License-Identifier: Apache-2.0
"""A DMS model made ready for `torch.export`: every layer's attention is one `gated_attention` node, gates included."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from modelopt_dms.exporters.hf import ExportError
from modelopt_dms.exporters.trtllm import ops
from modelopt_dms.gates import handover
from modelopt_dms.modeling.attention import GRAPH_ATTENTION_NAME
from modelopt_dms.modeling.convert import dms_modules, is_attention

RATIO_FIELD = "dms_pool_ratio"


def check_servable(model: PreTrainedModel) -> None:
    """Refuse what the served graph cannot hold.

    Raises:
        ExportError: no gates, layers of another kind, or attention with sinks or a softcap; the message says which.
    """
    converted = dms_modules(model)
    if not converted:
        raise ExportError(
            f"{type(model).__name__} has no gates, so there is nothing that format='trtllm' adds; serve the plain "
            "checkpoint with TensorRT-LLM"
        )
    others = [
        name for name, x in model.named_modules() if is_attention(x) and name not in converted
    ]
    if others:
        raise ExportError(
            f"format='trtllm' needs gates on every attention layer, but {others[0]} and {len(others) - 1} more have "
            "none (sliding windows, or dms.layers); use format='hf'"
        )
    for name, module in converted.items():
        if hasattr(module, "expand_kv"):
            raise ExportError(f"{name} caches latents (MLA), which format='trtllm' does not serve")
        if getattr(module, "sinks", None) is not None:
            raise ExportError(f"{name} has attention sinks, which format='trtllm' does not serve")
        if getattr(module, "attn_logit_softcapping", None):
            raise ExportError(f"{name} caps its scores, which format='trtllm' does not serve")


def prepare(
    model: PreTrainedModel, ranges: Mapping[str, tuple[float, float]] | None = None
) -> PreTrainedModel:
    """Make a DMS model's attention layers nodes of the graph that `torch.export` takes; in place.

    Args:
        model: in eval mode, on any device; `config.dms_pool_ratio` says how much smaller than without eviction its
            cache will be.
        ranges: calibrated FP8 ranges of keys and values by name of the attention layer; others stay as they are.

    Raises:
        ExportError: see `check_servable`.
    """
    check_servable(model)
    AttentionInterface.register(GRAPH_ATTENTION_NAME, _graph_attention)
    # Sequences of a served batch lie one behind the other: there is no padding, and no mask but the causal one.
    AttentionMaskInterface.register(GRAPH_ATTENTION_NAME, _no_mask)
    ratio = float(getattr(model.config, RATIO_FIELD, 1.0))
    if ratio < 1.0:
        raise ExportError(f"{RATIO_FIELD}={ratio} must be at least 1")
    for name, module in dms_modules(model).items():
        module.dms_served = (ratio, *(ranges or {}).get(name, (None, None)))
    model.set_attn_implementation(GRAPH_ATTENTION_NAME)
    return model


def _graph_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As `attention.dms_attention` for whole sequences q [B, H, T, D], k [B, K, T, D], v [B, K, T, Dv]."""
    step = handover.get(module)
    step.used = True
    zero_borrowed_dim = getattr(module.dms_gate, "zero_borrowed_dim_rotated", None)
    query = query if zero_borrowed_dim is None else zero_borrowed_dim(query)
    ratio, key_amax, value_amax = module.dms_served
    out = ops.SOURCE(
        *(x.transpose(1, 2) for x in (query, key, value, step.evict)),
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        module.dms_gate.window,
        module.dms_gate.shift,
        key_amax,
        value_amax,
        ratio,
    )
    return out, None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None
