# SPDX-License-Identifier: Apache-2.0
"""Which modules are full-attention layers, and what is put on them: a gate, two hooks, no new forward."""

from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch
from modelopt.torch.opt.dynamic import DynamicModule, _DMRegistryCls
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from modelopt_dms.attention import ATTENTION_NAME, GRAPH_ATTENTION_NAME, register_attention
from modelopt_dms.cache import LayerStep, adopt
from modelopt_dms.config import DMSConfig
from modelopt_dms.finite import check_weights
from modelopt_dms.gate import EvictionGate, hidden_input
from modelopt_dms.gate_kinds import NeuronGate, ResidualGate
from modelopt_dms.kv_format import kv_formats
from modelopt_dms.ops import shift_decisions
from modelopt_dms.paging import PagedSlots, PagedUsage
from modelopt_dms.usage import Usage

DMSRegistry = _DMRegistryCls("DMS")

# Kinds of layers whose caches do not grow with the context, and what their size is called. Of others only
# full_attention is known.
BOUNDED = {
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
    "linear_attention": "",
    "conv": "",
}


class UnsupportedModelError(ValueError):
    """A model that cannot be converted; the message says which layer and why."""


class DMSAttention(DynamicModule):
    """An attention module with a gate. ModelOpt's way of changing a module in place.

    ModelOpt matches layers by their forward(); overriding it would drop the KV quantizers of a later mtq.quantize.
    """

    def _setup(self, gate: EvictionGate) -> None:
        self.dms_gate = gate
        self.dms_usage: Usage | PagedUsage | None = (
            None  # numbers of the last KV cache, for kv_stats
        )
        gate.attach()
        self.register_forward_pre_hook(_stage_step, with_kwargs=True)
        self.register_forward_hook(_drop_step, with_kwargs=True, always_call=True)


@dataclass(frozen=True)
class ConvertSummary:
    """Names of the layers that were converted, and of those left alone with the reason."""

    converted: list[str]
    left_alone: dict[str, str]


def dms_modules(model: nn.Module) -> dict[str, Any]:
    """Converted attention modules by name, in layer order; each has its gate as `dms_gate`."""
    return {name: x for name, x in model.named_modules() if isinstance(x, DMSAttention)}


def is_converted(model: nn.Module) -> bool:
    """Whether any layer of a model has a gate."""
    return any(isinstance(x, DMSAttention) for x in model.modules())


def convert_model(model: PreTrainedModel, config: DMSConfig) -> ConvertSummary:
    """Put a gate on every full-attention layer of a causal LM, in place.

    Raises:
        UnsupportedModelError: nothing to convert, or a layer that cannot be; nothing was changed.
    """
    plan, left_alone = plan_conversion(model, config)
    register_attention()
    for module, gate in plan.values():
        if type(module) not in DMSRegistry:
            DMSRegistry.register({type(module): type(module).__name__})(DMSAttention)
        reference = next(module.parameters())
        DMSRegistry.convert(module, gate=gate.to(reference.device))
    text = model.config.get_text_config(decoder=True)
    if _never_slides(text):
        # transformers would make caches of sliding layers, which a gate cannot serve.
        text.sliding_window = None
    model.set_attn_implementation(ATTENTION_NAME)
    return ConvertSummary(list(plan), left_alone)


def plan_conversion(
    model: PreTrainedModel, config: DMSConfig
) -> tuple[dict[str, tuple[nn.Module, EvictionGate]], dict[str, str]]:
    """Layers to convert with their new gates, and layers left alone with the reason; the model is not touched.

    Raises:
        UnsupportedModelError: nothing to convert, or a layer that cannot be.
        WeightError: a weight is not finite.
    """
    if is_converted(model):
        raise UnsupportedModelError(
            "the model already has DMS gates; start from the original checkpoint"
        )
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"expected a transformers PreTrainedModel, got {type(model).__name__}"
        )
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder; DMS needs a causal LM"
        )
    if not type(model)._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{type(model).__name__} does not use transformers' attention interface, so its layers cannot be hooked"
        )
    check_weights(model)
    plan: dict[str, tuple[nn.Module, EvictionGate]] = {}
    left_alone: dict[str, str] = {}
    for name, module in model.named_modules():
        if not is_attention(module):
            continue
        reason = _reason_to_leave(module)
        if reason is None and not any(fnmatch(name, pattern) for pattern in config.layers):
            reason = f"not matched by dms.layers={config.layers}"
        if reason is None:
            layer = model.get_submodule(name.rpartition(".")[0])
            plan[name] = (module, _make_gate(name, module, layer, config))
        else:
            left_alone[name] = reason
    if not plan:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_alone.items())
        raise UnsupportedModelError(
            f"{type(model).__name__} has no full-attention layer to convert ({reasons or 'no attention layer found'})"
        )
    return plan, left_alone


def is_attention(module: nn.Module) -> bool:
    """What transformers' attention classes have in common; linear attention and decoder layers lack is_causal."""
    return (
        isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(module, "is_causal")
        and isinstance(getattr(module, "config", None), PreTrainedConfig)
    )


def _reason_to_leave(module: Any) -> str | None:
    """Why a layer stays as it is, or None: bounded, of an unknown kind, or its keys are not its own."""
    if not module.is_causal:
        return "attention is not causal"
    config = _text_config(module)
    kind = _kind(config, module.layer_idx)
    if kind in BOUNDED:
        size = f" ({getattr(config, BOUNDED[kind])} tokens)" if BOUNDED[kind] else ""
        return f"{kind}{size} is bounded already"
    if kind != "full_attention":
        return f"layers of kind {kind!r} are not supported"
    if getattr(module, "is_kv_shared_layer", False):
        return "its keys and values are another layer's"
    if getattr(module, "store_full_length_kv", False):
        return "its keys and values are read by other layers, too"
    if getattr(config, "num_kv_shared_layers", 0) and not hasattr(module, "is_kv_shared_layer"):
        return "layers share keys and values in a way that is not known"
    return None


def _kind(config: PreTrainedConfig, index: int) -> str:
    """The kind of a layer in transformers' words, as its own caches read it from a config."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds[index]
    if getattr(config, "sliding_window", None) is not None and not _never_slides(config):
        return "sliding_attention"
    return (
        "full_attention"
        if getattr(config, "attention_chunk_size", None) is None
        else "chunked_attention"
    )


def _never_slides(config: PreTrainedConfig) -> bool:
    """Whether all layers have a window that holds the longest sequence, as in Phi-3.5-mini and Phi-4-mini."""
    if getattr(config, "layer_types", None) is not None:
        return False
    window, longest = (
        getattr(config, x, None) for x in ("sliding_window", "max_position_embeddings")
    )
    return window is not None and longest is not None and window >= longest


def _make_gate(name: str, module: Any, layer: nn.Module, config: DMSConfig) -> EvictionGate:
    text = _text_config(module)
    heads = getattr(module, "num_heads", None) or text.num_attention_heads
    # MLA: one latent a token, so one decision.
    latent = getattr(module, "kv_lora_rank", None) is not None
    kv_heads = 1 if latent else heads // getattr(module, "num_key_value_groups", 1)
    if config.gate == "adapter":
        return EvictionGate(config, module.layer_idx, kv_heads, text.hidden_size)
    if config.gate == "residual":
        eps = getattr(text, "rms_norm_eps", 1e-6)
        return ResidualGate(config, module.layer_idx, kv_heads, text.hidden_size, layer, eps)
    q_proj, head_dim = getattr(module, "q_proj", None), getattr(module, "head_dim", None)
    if latent or not isinstance(q_proj, nn.Linear) or head_dim is None:
        raise UnsupportedModelError(
            f"{name}: dms.gate='neuron' borrows from a plain q_proj, which {type(module).__name__} does not have; "
            "use dms.gate='adapter'"
        )
    if config.neuron_dim >= head_dim:
        raise UnsupportedModelError(
            f"dms.neuron_dim={config.neuron_dim} must be below {name}'s head_dim={head_dim}"
        )
    return NeuronGate(config, module.layer_idx, kv_heads, q_proj, head_dim)


def _text_config(module: Any) -> Any:
    """A layer's config, where they differ from layer to layer."""
    config = module.config.get_text_config(decoder=True)
    return config.per_layer_config[module.layer_idx] if config.is_heterogeneous else config


def _stage_step(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a layer's forward: decide about its tokens, and make its cache layer one that can forget."""
    gate: EvictionGate = module.dms_gate
    if module.config._attn_implementation == GRAPH_ATTENTION_NAME:
        hidden = hidden_input(args, kwargs)
        module.dms_step = LayerStep(None, None, gate.decide(hidden, _positions(hidden, kwargs, 0)))
        return
    if module.config._attn_implementation != ATTENTION_NAME:
        raise RuntimeError(
            f"attn_implementation is {module.config._attn_implementation!r}, but a DMS model runs only with "
            f"{ATTENTION_NAME!r}; call model.set_attn_implementation({ATTENTION_NAME!r})"
        )
    hidden = hidden_input(args, kwargs)
    cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
    if module.training:
        # Relaxed decisions need the whole sequence; HF makes a cache in training too, and nobody reads it.
        if cache is not None and cache.get_seq_length(module.layer_idx):
            raise ValueError(
                "a DMS model in training mode cannot continue from a cache; call model.eval()"
            )
        if gate.enabled:
            log_keep = gate.relax(hidden, _positions(hidden, kwargs, 0))
            module.dms_step = LayerStep(None, shift_decisions(log_keep, gate.shift), None)
    elif cache is not None:
        formats = partial(kv_formats, module)
        layer = adopt(cache, module.layer_idx, gate.window, gate.shift, formats, hidden.device)
        positions = _positions(hidden, kwargs, layer.get_seq_length())
        if hidden.shape[1] == 1 and isinstance(layer.slots, PagedSlots):
            module.dms_step = LayerStep(layer, None, None, gate.decide_later(hidden, positions))
        else:
            evict = gate.decide(hidden, positions)
            module.dms_step = LayerStep(layer, _hard_log_keep(evict, gate.shift), evict)
    elif gate.enabled:
        evict = gate.decide(hidden, _positions(hidden, kwargs, 0))
        module.dms_step = LayerStep(None, _hard_log_keep(evict, gate.shift), None)


def _drop_step(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """After it, also when it failed: nothing stays staged, and a cache layer's numbers are remembered."""
    if not module.training:  # in training, a checkpointed layer runs a second time
        module.dms_gate.forget()
    step: LayerStep | None = module.__dict__.pop("dms_step", None)
    if step is not None and step.layer is not None and step.used:
        module.dms_usage = step.layer.slots.usage


def _hard_log_keep(evict: Tensor, shift: int) -> Tensor:
    governed = shift_decisions(evict, shift)
    return torch.zeros(governed.shape, device=evict.device).masked_fill(governed, float("-inf"))


def _positions(hidden: Tensor, kwargs: dict[str, Any], seen: int) -> Tensor:
    """Positions [B or 1, T] of the new tokens within their document, as the model counts them."""
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim == 2:
        return positions
    return torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
