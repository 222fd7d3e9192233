# SPDX-License-Identifier: Apache-2.0
"""Which modules are full-attention layers, and what is put on them: a gate, two hooks, no new forward."""

import pickle
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from modelopt.torch.opt.dynamic import DynamicModule, _DMRegistryCls
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.gates.gate import EvictionGate
from modelopt_dms.gates.kinds import NeuronGate, ResidualGate
from modelopt_dms.kvcache.paged_head_caches import PagedUsage
from modelopt_dms.kvcache.usage import Usage
from modelopt_dms.modeling.attention import register_attention
from modelopt_dms.modeling.finite import check_weights
from modelopt_dms.modeling.probe import probe
from modelopt_dms.modeling.staging import put_gate, use_dms, watch_calls

DMSRegistry = _DMRegistryCls("DMS")

# Kinds of layers whose caches do not grow with the context, and what their size is called. Of others only
# full_attention is known.
BOUNDED = {
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
    "linear_attention": "",
    "conv": "",
}


# Numbers that a weight can be read from without a scale.
PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class UnsupportedModelError(ValueError):
    """A model that cannot be converted; the message says which layer and why."""


class DMSAttention(DynamicModule):
    """An attention module with a gate. ModelOpt's way of changing a module in place.

    ModelOpt matches layers by their forward(); overriding it would drop the KV quantizers of a later mtq.quantize.
    """

    def _setup(self, gate: EvictionGate) -> None:
        put_gate(self, gate)
        # Numbers of the last KV cache by layer index, for kv_stats.
        self.dms_usages: dict[int, Usage | PagedUsage] | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by the class that was converted: ModelOpt makes classes that pickle cannot find."""
        return _bare, (_ClassOf(type(self)),), self.__dict__


class _ClassOf:
    """A class that ModelOpt made, pickled as the one it was made of."""

    def __init__(self, made: type) -> None:
        self.made = made

    def __deepcopy__(self, memo: Any) -> "_ClassOf":
        return self

    def __reduce__(self) -> Any:
        plain = self.made.__mro__[self.made.__mro__.index(DMSAttention) + 2]
        if DMSRegistry.get(plain) is not self.made:
            raise pickle.PicklingError(
                f"a model with DMS gates and other ModelOpt modes ({self.made.__name__}) cannot be pickled; use "
                "model.save_pretrained(DIR) and modelopt_dms.load(DIR)"
            )
        return _converted_class, (plain,)


def _converted_class(plain: type) -> "_ClassOf":
    register_attention()
    return _ClassOf(_registered(plain))


def _bare(kind: _ClassOf) -> nn.Module:
    return object.__new__(kind.made)


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
    text = model.config.get_text_config(decoder=True)
    never_slides, window = _never_slides(text), getattr(text, "sliding_window", None)
    if never_slides:
        # transformers would make caches of sliding layers, which a gate cannot serve.
        text.sliding_window = None
    failure = probe(model, plan)
    if failure is not None:
        if never_slides:
            text.sliding_window = window
        raise UnsupportedModelError(failure)
    for module, gate in plan.values():
        _registered(type(module))
        DMSRegistry.convert(module, gate=gate)
    use_dms(model, (module for module, _ in plan.values()))
    watch_calls(model)
    return ConvertSummary(list(plan), left_alone)


def _registered(plain: type) -> type:
    """The class of a converted module of this class."""
    if plain not in DMSRegistry:
        DMSRegistry.register({plain: plain.__name__})(DMSAttention)
    return DMSRegistry[plain]


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
    if model.base_model is model and model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head (get_output_embeddings gives none); DMS needs a causal "
            "LM (AutoModelForCausalLM)"
        )
    if not type(model)._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{type(model).__name__} does not use transformers' attention interface, so its layers cannot be hooked"
        )
    check_not_quantized(model)
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


def check_not_quantized(model: PreTrainedModel) -> None:
    """Refuse a model whose weights are quantized already, by whom ever.

    Raises:
        UnsupportedModelError: see above; the message says by whom.
    """
    way_out = "start from the original checkpoint in float32, float16 or bfloat16, and quantize after apply_dms"
    if any(isinstance(x, TensorQuantizer) for x in model.modules()):
        raise UnsupportedModelError(f"the model is quantized by ModelOpt already; {way_out}")
    quantizer = getattr(model, "hf_quantizer", None)
    # GGUF and others keep their quantizer after they have made the weights plain.
    plain = getattr(getattr(quantizer, "quantization_config", None), "dequantize", False)
    if not plain and (quantizer is not None or getattr(model, "is_quantized", False)):
        how = getattr(model.config, "quantization_config", None)
        method = how.get("quant_method") if isinstance(how, dict) else how
        method = getattr(method, "quant_method", method)
        raise UnsupportedModelError(
            f"the weights are quantized (quant_method={getattr(method, 'value', method)!r}); {way_out}"
        )
    for name, weight in model.named_parameters():
        if weight.dtype not in PLAIN:
            raise UnsupportedModelError(f"{name} is stored as {weight.dtype}; {way_out}")


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
