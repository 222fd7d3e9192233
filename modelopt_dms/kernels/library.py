# SPDX-License-Identifier: Apache-2.0
"""One `torch.library` op per kernel, so that torch.compile and torch.export pass through it.

On CUDA an op runs its Triton kernel; on a CPU its PyTorch reference, or the kernel where Triton interprets. It takes
tensors and numbers only: a pool and a layer's lists go in as their tensors, and are put together inside.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from modelopt_dms.kernels import append_reference, decode_reference, prefill_reference
from modelopt_dms.kernels.gating import Decided, LinearGate
from modelopt_dms.kernels.layout import PagePool, PageTables, RowLayout
from modelopt_dms.kernels.number_formats import Fp8, Int8, Nvfp4, RowFormat
from modelopt_dms.kernels.prefill_reference import Chunk
from modelopt_dms.kernels.reference import Prompt, Scoring

NAMESPACE = "modelopt_dms"
FORMATS: dict[str, type[RowFormat]] = {x.name: x for x in (Fp8, Int8, Nvfp4)}
# Tensors of a pool and of a layer's lists; taking in tokens changes those with True, and Optional ones may be missing.
_POOL = {"keys": True, "values": True, "key_scales": True, "value_scales": True}
_POOL |= {"free": False, "counters": True}
_LISTS = {"table": True, "live": True, "seen": True, "ring_slot": True, "ring_evict": True}
_LISTS |= {"active": False, "scales": False}
_AMAX = ("key_amax", "value_amax")  # of calibrated formats, which only the reference reads
_OPTIONAL = ("key_scales", "value_scales", *_AMAX)
_SCORING = "float scale, float? softcap, Tensor? sinks"
# An append's decisions, or what they are made from: the fields of `Decided` and of `LinearGate`.
GATE = {"evict": "Tensor?", "features": "Tensor?", "weight": "Tensor?", "threshold": "Tensor?"}
GATE |= {"positions": "Tensor?", "scale": "float?", "offset": "float?", "protect": "int?"}
_PROMPT = (
    "Tensor q, Tensor k, Tensor v, Tensor keep_logprob, Tensor? starts, Tensor? sinks, int window, "
    "float scale, float? softcap"
)


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton interprets kernels in this process, so that they run without a GPU."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def kernel_function(name: str) -> Callable[..., Any]:
    """A function that launches kernels, "module.function"; Triton is imported when the first one runs."""
    module, function = name.split(".")
    return getattr(import_module(f"{__package__}.{module}"), function)


def _op(
    schema: str,
    kernel: str,
    reference: Callable[..., Any] | None,
    arguments: Callable[..., tuple[Any, ...]],
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    """Register an op, and return it.

    Args:
        schema: its name and what it takes.
        kernel: what it runs on CUDA, and on a CPU where Triton interprets; see `kernel_function`.
        reference: what it runs on a CPU otherwise, with the same arguments; None: nothing.
        arguments: from what the schema says to what kernel and reference take.
        fake: what shapes the results have.
    """

    def run_kernel(tensor: Tensor, /, *args: Any, **given: Any) -> Any:
        # Triton launches on the current device, which need not be that of a model spread over several.
        with torch.cuda.device_of(tensor):
            return kernel_function(kernel)(*arguments(tensor, *args, **given))

    def run_on_cpu(*args: Any, **given: Any) -> Any:
        if reference is None or (has_triton() and interpreting()):
            return run_kernel(*args, **given)
        return reference(*arguments(*args, **given))

    name = schema.split("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema.removeprefix(name))
    torch.library.impl(qualified, "CUDA")(run_kernel)
    torch.library.impl(qualified, "CPU")(run_on_cpu)
    torch.library.register_fake(qualified)(fake)
    return getattr(getattr(torch.ops, NAMESPACE), name)


def _state_schema(changed: bool) -> str:
    """The part of an op's schema that is a pool and a layer's lists, and the layout of their rows."""
    parts = []
    for index, (name, changes) in enumerate((_POOL | _LISTS | dict.fromkeys(_AMAX, False)).items()):
        alias = f"(a{index}!)" if changed and changes else ""
        parts.append(f"Tensor{alias}{'?' if name in _OPTIONAL else ''} {name}")
    return ", ".join([*parts, "str layout"])


def state(pool: PagePool, lists: PageTables) -> dict[str, Any]:
    """An op's arguments for a pool and a layer's lists."""
    tensors = {name: getattr(pool, name) for name in _POOL}
    tensors |= {name: getattr(lists, name) for name in _LISTS}
    for name, form in zip(_AMAX, lists.formats, strict=True):
        tensors[name] = None if form is None or pool.keys.is_cuda else form.amax
    rows = [
        f"{x.number}:{x.dim}:{str(x.dtype).removeprefix('torch.')}:{int(x.per_row)}"
        for x in (pool.key_layout, pool.value_layout)
    ]
    return tensors | {"layout": f"{rows[0]}|{rows[1]}|{lists.window}|{lists.shift}"}


def _layer(given: dict[str, Any]) -> tuple[PagePool, PageTables]:
    """The pool and the lists that `state` took apart."""
    keys, values, window, shift = _parsed(given["layout"])
    pool = PagePool(keys, values, **{name: given[name] for name in _POOL})
    formats = [
        None if x.number == "plain" else FORMATS[x.number](given[amax])
        for x, amax in zip((keys, values), _AMAX, strict=True)
    ]
    held = {name: given[name] for name in _LISTS}
    return pool, PageTables(window, shift, **held, formats=(formats[0], formats[1]))


@lru_cache
def _parsed(layout: str) -> tuple[RowLayout, RowLayout, int, int]:
    keys, values, window, shift = layout.split("|")
    return _row_layout(keys), _row_layout(values), int(window), int(shift)


def _row_layout(text: str) -> RowLayout:
    number, dim, dtype, per_row = text.split(":")
    return RowLayout(number, int(dim), getattr(torch, dtype), bool(int(per_row)))  # type: ignore[arg-type]


def scored(scoring: Scoring) -> dict[str, Any]:
    """An op's arguments for how scores become weights."""
    return {"scale": scoring.scale, "softcap": scoring.softcap, "sinks": scoring.sinks}


def _scoring(given: dict[str, Any]) -> Scoring:
    return Scoring(given["scale"], given["softcap"], given["sinks"])


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What an op that only changes its arguments returns."""


def _append_arguments(k: Tensor, v: Tensor, **given: Any) -> tuple[Any, ...]:
    if given["evict"] is not None:
        return k, v, Decided(given["evict"]), *_layer(given)
    gate = LinearGate(**{name: given[name] for name in GATE if name != "evict"})
    return k, v, gate, *_layer(given)


def _pack_arguments(*tensors: Tensor | None, **given: Any) -> tuple[Any, ...]:
    return *tensors, *_layer(given)


def _decode_arguments(q: Tensor, **given: Any) -> tuple[Any, ...]:
    return q, *_layer(given), _scoring(given)


def _like_values(q: Tensor, **given: Any) -> Tensor:
    return q.new_empty(*q.shape[:2], _parsed(given["layout"])[1].dim)


def _like_latents(q: Tensor, **given: Any) -> Tensor:
    return q.new_empty(*q.shape[:2], _parsed(given["layout"])[0].dim)


def _chunk_arguments(*tensors: Tensor, **given: Any) -> tuple[Any, ...]:
    chunk = Chunk(*tensors, **{name: given[name] for name in ("first", "starts", "expiry")})
    return chunk, *_layer(given), _scoring(given)


def _like_chunk(q: Tensor, k: Tensor, v: Tensor, *args: Any, **given: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])


def _prompt_arguments(*args: Any) -> tuple[Any, ...]:
    q, k, v, keep_logprob, starts, sinks, window, scale, softcap = args
    return Prompt(q, k, v, keep_logprob, window), starts, Scoring(scale, softcap, sinks)


def _like_prefill(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return v.new_empty(*q.shape[:3], v.shape[-1]), lse


def _backward_arguments(grad: Tensor, out: Tensor, lse: Tensor, *args: Any) -> tuple[Any, ...]:
    return grad, out, lse, *_prompt_arguments(*args)


def _like_inputs(grad: Tensor, out: Tensor, lse: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    contiguous = torch.contiguous_format
    return tuple(torch.empty_like(x, memory_format=contiguous) for x in inputs[:4])


append_token = _op(
    f"append_token(Tensor k, Tensor v, *, {_state_schema(True)}, "
    f"{', '.join(f'{kind} {name}' for name, kind in GATE.items())}) -> ()",
    "append.append_token",
    append_reference.append_token,
    _append_arguments,
    _nothing,
)
pack = _op(
    f"pack(Tensor k, Tensor v, Tensor evict, Tensor? valid, *, {_state_schema(True)}) -> ()",
    "append.pack",
    append_reference.pack,
    _pack_arguments,
    _nothing,
)
decode = _op(
    f"decode(Tensor q, *, {_state_schema(False)}, {_SCORING}) -> Tensor",
    "decode.decode_attention",
    decode_reference.decode_attention,
    _decode_arguments,
    _like_values,
)
decode_latent = _op(
    f"decode_latent(Tensor q, *, {_state_schema(False)}, {_SCORING}) -> Tensor",
    "decode.decode_latent",
    decode_reference.decode_latent,
    _decode_arguments,
    _like_latents,
)
attend_chunk = _op(
    "attend_chunk(Tensor q, Tensor k, Tensor v, Tensor evict, *, Tensor? starts, Tensor first, Tensor? expiry, "
    f"{_state_schema(False)}, {_SCORING}) -> Tensor",
    "prefill_chunk.attend_chunk",
    prefill_reference.attend_chunk,
    _chunk_arguments,
    _like_chunk,
)
# The reference of training attention is differentiable as it is, and takes any mask: it is no op.
prefill = _op(
    f"prefill({_PROMPT}) -> (Tensor, Tensor)",
    "prefill.prefill_forward",
    None,
    _prompt_arguments,
    _like_prefill,
)
prefill_backward = _op(
    f"prefill_backward(Tensor grad, Tensor out, Tensor lse, {_PROMPT}) -> (Tensor, Tensor, Tensor, Tensor)",
    "prefill_backward.prefill_backward",
    None,
    _backward_arguments,
    _like_inputs,
)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = prefill_backward(grad, *ctx.saved_tensors, ctx.window, ctx.scale, ctx.softcap)
    return (*gradients, *[None] * 5)


torch.library.register_autograd(
    f"{NAMESPACE}::prefill", _differentiate, setup_context=_keep_for_backward
)
