# SPDX-License-Identifier: Apache-2.0
"""What runs around an attention module with a gate: decide about its tokens, and leave that for `attention`."""

import copy
import inspect
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from modelopt_dms.gates import handover
from modelopt_dms.gates.gate import EvictionGate, hidden_input
from modelopt_dms.kernels.reference import hard_keep_logprob, shift_decisions
from modelopt_dms.kernels.rollback import LONGEST_DRAFT
from modelopt_dms.kvcache.hf_cache import DMSLayer, LayerStep, adopt
from modelopt_dms.kvcache.kv_format import kv_formats
from modelopt_dms.kvcache.paged_head_caches import PagedHeadCaches
from modelopt_dms.modeling.attention import (
    ATTENTION_NAME,
    GRAPH_ATTENTION_NAME,
    additive,
    layer_name,
)

# ModelOpt keeps in modules, and in the function named "dms", what is only true while a quantized layer runs.
_QUANTIZED = threading.RLock()


def put_gate(module: Any, gate: EvictionGate) -> list[RemovableHandle]:
    """Give an attention module a gate and the hooks around its forward; the hooks, to take them off again."""
    gate.depth = model_depth(module)
    module.dms_gate = gate.to(gate_device(module))
    return [
        *gate.attach(module),
        module.register_forward_pre_hook(stage_step, with_kwargs=True),
        module.register_forward_hook(drop_step, with_kwargs=True, always_call=True),
    ]


def model_depth(module: Any) -> int | None:
    """Layers of the model that an attention module is in, as its config says."""
    config: Any = getattr(module, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return getattr(text, "num_hidden_layers", None)


def watch_calls(model: PreTrainedModel) -> list[RemovableHandle]:
    """Hooks around a model's forward: refuse what no layer can do, see how long a draft is, keep threads apart."""
    handles = []
    gated = next((x for x in model.modules() if hasattr(x, "dms_gate")), None)
    for network in {model, model.base_model}:
        begin = partial(_begin_call, gated)
        handles.append(network.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(network.register_forward_hook(_end_call, always_call=True))
    return handles


def use_dms(model: PreTrainedModel, modules: Iterable[Any]) -> Callable[[], None]:
    """Let attention modules run `dms_attention`, and no others; gives what takes it back.

    A config is shared by the layers of one network and the network that makes their masks. Vision towers have another,
    and keep what they run. Attention without a gate that shares a config gets a copy with what it ran: some modelling
    code asks its config which function it will call.
    """
    modules = set(modules)
    around = {x for x in model.modules() if not modules.isdisjoint(x.modules())}
    networks = [x for x in around if isinstance(x, PreTrainedModel)]
    configs: dict[int, Any] = {id(x.config): x.config for x in (*modules, *networks)}
    before = {key: config._attn_implementation for key, config in configs.items()}
    ran = {key: _without_flash(model, before[key]) for key in configs}
    copies: dict[int, Any] = {}
    others: list[tuple[Any, Any]] = []
    handles: list[RemovableHandle] = []
    for key, config in configs.items():
        copies[key] = copy.copy(config)
        copies[key]._attn_implementation_internal = ran[key]
        config._attn_implementation_internal = ATTENTION_NAME
    for module in model.modules():
        config = getattr(module, "config", None)
        if id(config) not in configs:
            continue
        module.dms_ran = ran[id(config)]
        if module not in around and _computes_attention(module):
            others.append((module, config))
            module.config = copies[id(config)]
            if ran[id(config)] == "eager":
                handles.append(_make_masks_additive(module))

    def undo() -> None:
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]
        for module, config in others:
            module.config = config
        for module in model.modules():
            vars(module).pop("dms_ran", None)
        for handle in handles:
            handle.remove()

    return undo


def _computes_attention(module: nn.Module) -> bool:
    return hasattr(module, "is_causal") or "attention" in type(module).__name__.lower()


def _make_masks_additive(module: nn.Module) -> RemovableHandle:
    """A DMS model makes masks for SDPA; eager attention adds them to its scores."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    # Behind all arguments where the mask has no place of its own.
    at = names.index("attention_mask") if "attention_mask" in names else len(names)
    return module.register_forward_pre_hook(partial(_additive_mask, at), with_kwargs=True)


def _additive_mask(
    at: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if at >= len(args) and "attention_mask" not in kwargs:
        return args, kwargs
    hidden = hidden_input(args, kwargs)
    tokens, causal = hidden.shape[1], getattr(module, "is_causal", True)
    given = args[at] if at < len(args) else kwargs["attention_mask"]
    mask = additive(given, hidden.dtype, hidden.device, tokens, tokens, causal)
    if at < len(args):
        return (*args[:at], mask, *args[at + 1 :]), kwargs
    return args, kwargs | {"attention_mask": mask}


def _without_flash(model: PreTrainedModel, implementation: str | None) -> str:
    """The masks of a DMS model are tensors, which flash and flex attention do not take; SDPA computes the same."""
    if implementation is None or implementation in ("eager", "sdpa"):
        return implementation or "eager"
    return "sdpa" if model._supports_sdpa else "eager"


def gate_device(module: nn.Module) -> torch.device:
    """Where a layer computes: where its weights are, or where accelerate will bring them if they are offloaded."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    hooks = [getattr(x, "_hf_hook", None) for x in module.modules()]
    hooks += [x for hook in hooks for x in getattr(hook, "hooks", ())]
    found = [getattr(hook, "execution_device", None) for hook in hooks]
    return next((torch.device(x) for x in found if x is not None), torch.device("cpu"))


def stage_step(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a layer's forward: decide about its tokens, and make its cache layer one that can forget."""
    gate: EvictionGate = module.dms_gate
    implementation = module.config._attn_implementation
    hidden = hidden_input(args, kwargs)
    handover.take(module)
    if implementation == GRAPH_ATTENTION_NAME:
        evict = gate("decide", gate.read(args, kwargs), _positions(hidden, kwargs, 0))
        handover.put(module, LayerStep(None, None, evict))
        return
    if implementation != ATTENTION_NAME:
        raise RuntimeError(
            f"attn_implementation is {implementation!r}, but a DMS model runs only with {ATTENTION_NAME!r}; call "
            f"model.set_attn_implementation({ATTENTION_NAME!r})"
        )
    cache = next((x for x in (*args, *kwargs.values()) if isinstance(x, Cache)), None)
    if module.training:
        # Relaxed decisions need the whole sequence; HF makes a cache in training too, and nobody reads it.
        if cache is not None and cache.get_seq_length(module.layer_idx):
            raise ValueError(
                "a DMS model in training mode cannot continue from a cache; call model.eval()"
            )
        if gate.enabled:
            log_keep = gate("relax", gate.read(args, kwargs), _positions(hidden, kwargs, 0))
            handover.put(module, LayerStep(None, shift_decisions(log_keep, gate.shift), None))
    elif cache is not None:
        _stage_cached(module, cache, hidden, args, kwargs)
    elif gate.enabled:
        evict = gate("decide", gate.read(args, kwargs), _positions(hidden, kwargs, 0))
        handover.put(module, LayerStep(None, hard_keep_logprob(evict, gate.shift), None))


def _stage_cached(
    module: Any, cache: Cache, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    gate: EvictionGate = module.dms_gate
    formats = partial(kv_formats, module)
    where = (cache, module.layer_idx, gate.window, gate.shift)
    layer = adopt(*where, formats, hidden.device, gate.depth)
    _check_batch(module, layer, hidden.shape[0])
    layer.expected = True
    draft = handover.get("draft")
    if draft is not None:
        layer.expect_draft(draft)
    positions = _positions(hidden, kwargs, layer.get_seq_length())
    read = gate.read(args, kwargs)
    if hidden.shape[1] == 1 and isinstance(layer.slots, PagedHeadCaches):
        undecided = gate("decide_later", read, positions)
        step = LayerStep(layer, None, None, undecided, cache=cache)
    else:
        evict = gate("decide", read, positions)
        step = LayerStep(layer, None, evict, cache=cache)
    handover.put(module, step)


def drop_step(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """After it, also when it failed: nothing stays staged, and a cache's numbers are remembered.

    Raises:
        RuntimeError: the layer computed its attention in another way than `dms_attention`.
    """
    module.dms_gate.clear()
    step: LayerStep | None = handover.take(module)
    if step is None or output is None:  # None: it failed
        return
    if not step.used:
        raise RuntimeError(
            f"{layer_name(module)} did not call the attention function of its config, so nothing was evicted"
        )
    if step.layer is not None and step.cache is not None:
        usages = vars(step.cache).setdefault("dms_usages", {})
        usages[module.layer_idx] = step.layer.slots.usage
        # All layers of one cache share it: of two caches at a time, `kv_stats` shows one.
        module.dms_usages = usages


def _check_batch(module: Any, layer: DMSLayer, batch: int) -> None:
    if hasattr(layer.slots, "attend"):
        return  # a graph is being exported, for any batch
    if layer.get_seq_length() and batch != layer.slots.B:
        raise ValueError(
            f"{layer_name(module)}: {batch} sequences do not fit a cache that holds {layer.slots.B}; pass as many, or "
            "a new cache"
        )


def _begin_call(
    gated: nn.Module | None, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    handover.take("mask")
    _leave(model)  # an interrupt may have kept an earlier forward from doing it
    if hasattr(gated, "k_bmm_quantizer") and not torch.compiler.is_compiling():
        _QUANTIZED.acquire()
        handover.put((model, "alone"), True)
    asked = kwargs.get("output_attentions")
    if asked is None:
        asked = getattr(model.config, "output_attentions", False)
    if asked:
        raise ValueError(
            "output_attentions=True: a DMS model never has the attention weights as a whole; leave it False, and look "
            "at them in the model before conversion (attn_implementation='eager')"
        )
    # Whoever wants logits of the last few tokens only has drafted them, and may take them back.
    wanted = kwargs.get("logits_to_keep")
    if isinstance(wanted, int) and wanted > 1:
        handover.put("draft", min(wanted, LONGEST_DRAFT))


def _end_call(model: Any, args: tuple[Any, ...], output: Any) -> None:
    handover.take("draft")
    handover.take("mask")
    _leave(model)


def _leave(model: Any) -> None:
    if handover.take((model, "alone")):
        _QUANTIZED.release()


def _positions(hidden: Tensor, kwargs: dict[str, Any], seen: int) -> Tensor:
    """Positions [B or 1, T] of the new tokens within their document, as the model counts them."""
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim == 2:
        return positions
    return torch.arange(seen, seen + hidden.shape[1], device=hidden.device)[None]
