# SPDX-License-Identifier: Apache-2.0
"""The kernels as `torch.library` ops, so that torch.compile and torch.export pass through them. Imports Triton.

An op takes tensors and numbers only: a pool and a layer's lists go in as their tensors, and come together again inside.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from modelopt_dms.ops import append, decode, prefill, prefill_backward, prefill_chunk
from modelopt_dms.ops.gating import Decided, GateInput, LinearGate
from modelopt_dms.ops.paged import LayerLists, PagePool, RowLayout
from modelopt_dms.ops.reference import Scoring

NAMESPACE = "modelopt_dms"
# Tensors of a pool and of a layer's lists; taking in tokens changes those with True, and Optional ones may be missing.
_POOL = {"keys": True, "values": True, "key_scales": True, "value_scales": True}
_POOL |= {"free": False, "counters": True}
_LISTS = {"table": True, "live": True, "seen": True, "ring_slot": True, "ring_evict": True}
_LISTS |= {"active": False, "scales": False}
_OPTIONAL = ("key_scales", "value_scales")
_SCORING = "float scale, float? softcap, Tensor? sinks"


def _state_schema(changed: bool) -> str:
    """The part of an op's schema that is a pool and a layer's lists, and the layout of their rows."""
    parts = []
    for index, (name, changes) in enumerate((_POOL | _LISTS).items()):
        alias = f"(a{index}!)" if changed and changes else ""
        parts.append(f"Tensor{alias}{'?' if name in _OPTIONAL else ''} {name}")
    return ", ".join([*parts, "str layout"])


def _op(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register an op, and return it."""
    name = schema.split("(")[0]
    qualified = f"{NAMESPACE}::{name}"

    def run(tensor: Tensor, /, *args: Any, **kwargs: Any) -> Any:
        # Triton launches on the current device, which need not be that of a model spread over several.
        with torch.cuda.device_of(tensor):
            return kernel(tensor, *args, **kwargs)

    torch.library.define(qualified, schema.removeprefix(name))
    torch.library.impl(qualified, "CompositeExplicitAutograd")(run)
    torch.library.register_fake(qualified)(fake)
    return getattr(getattr(torch.ops, NAMESPACE), name)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """What an op that only changes its arguments returns."""


def _state(pool: PagePool, lists: LayerLists) -> dict[str, Any]:
    """An op's arguments for a pool and a layer's lists."""
    tensors = {name: getattr(pool, name) for name in _POOL}
    tensors |= {name: getattr(lists, name) for name in _LISTS}
    rows = [
        f"{x.number}:{x.dim}:{str(x.dtype).removeprefix('torch.')}:{int(x.per_row)}"
        for x in (pool.key_layout, pool.value_layout)
    ]
    return tensors | {"layout": f"{rows[0]}|{rows[1]}|{lists.window}|{lists.shift}"}


def _together(given: dict[str, Any]) -> tuple[PagePool, LayerLists]:
    """The pool and the lists that `_state` took apart."""
    key_layout, value_layout, window, shift = _facts(given["layout"])
    pool = PagePool(key_layout, value_layout, **{name: given[name] for name in _POOL})
    # The kernels read layouts and scales; formats are the reference's.
    held = {name: given[name] for name in _LISTS}
    return pool, LayerLists(window, shift, **held, formats=(None, None))


@lru_cache
def _facts(layout: str) -> tuple[RowLayout, RowLayout, int, int]:
    keys, values, window, shift = layout.split("|")
    return _row_layout(keys), _row_layout(values), int(window), int(shift)


def _row_layout(text: str) -> RowLayout:
    number, dim, dtype, per_row = text.split(":")
    return RowLayout(number, int(dim), getattr(torch, dtype), bool(int(per_row)))  # type: ignore[arg-type]


def _scored(scoring: Scoring) -> dict[str, Any]:
    return {"scale": scoring.scale, "softcap": scoring.softcap, "sinks": scoring.sinks}


def _scoring(given: dict[str, Any]) -> Scoring:
    return Scoring(given["scale"], given["softcap"], given["sinks"])


def _run_decode(q: Tensor, **given: Any) -> Tensor:
    return decode.decode_attention(q, *_together(given), _scoring(given))


def _like_values(q: Tensor, **given: Any) -> Tensor:
    return q.new_empty(*q.shape[:2], _facts(given["layout"])[1].dim)


_decode = _op(
    f"decode(Tensor q, *, {_state_schema(False)}, {_SCORING}) -> Tensor", _run_decode, _like_values
)


def decode_attention(q: Tensor, pool: PagePool, lists: LayerLists, scoring: Scoring) -> Tensor:
    """See `decode.decode_attention`."""
    return _decode(q, **_state(pool, lists), **_scored(scoring))


def _run_latent(q: Tensor, **given: Any) -> Tensor:
    return decode.decode_latent(q, *_together(given), _scoring(given))


def _like_latents(q: Tensor, **given: Any) -> Tensor:
    return q.new_empty(*q.shape[:2], _facts(given["layout"])[0].dim)


_decode_latent = _op(
    f"decode_latent(Tensor q, *, {_state_schema(False)}, {_SCORING}) -> Tensor",
    _run_latent,
    _like_latents,
)


def decode_latent(q: Tensor, pool: PagePool, lists: LayerLists, scoring: Scoring) -> Tensor:
    """See `decode.decode_latent`."""
    return _decode_latent(q, **_state(pool, lists), **_scored(scoring))


# An append's decisions, or what they are made from: the fields of `Decided` and of `LinearGate`.
_GATE = {"evict": "Tensor?", "features": "Tensor?", "weight": "Tensor?", "threshold": "Tensor?"}
_GATE |= {"positions": "Tensor?", "scale": "float?", "offset": "float?", "protect": "int?"}
_LINEAR = tuple(name for name in _GATE if name != "evict")


def _run_append(k: Tensor, v: Tensor, **given: Any) -> None:
    gate: GateInput
    if given["evict"] is not None:
        gate = Decided(given["evict"])
    else:
        gate = LinearGate(**{name: given[name] for name in _LINEAR})
    append.append_token(k, v, gate, *_together(given))


_append_token = _op(
    f"append_token(Tensor k, Tensor v, *, {_state_schema(True)}, "
    f"{', '.join(f'{kind} {name}' for name, kind in _GATE.items())}) -> ()",
    _run_append,
    _nothing,
)


def append_token(k: Tensor, v: Tensor, gate: GateInput, pool: PagePool, lists: LayerLists) -> None:
    """See `append.append_token`."""
    given = {name: getattr(gate, name, None) for name in _GATE}
    _append_token(k, v, **_state(pool, lists), **given)


def _run_pack(k: Tensor, v: Tensor, evict: Tensor, valid: Tensor | None, **given: Any) -> None:
    append.pack(k, v, evict, valid, *_together(given))


_pack = _op(
    f"pack(Tensor k, Tensor v, Tensor evict, Tensor? valid, *, {_state_schema(True)}) -> ()",
    _run_pack,
    _nothing,
)


def pack(
    k: Tensor,
    v: Tensor,
    evict: Tensor,
    valid: Tensor | None,
    pool: PagePool,
    lists: LayerLists,
) -> None:
    """See `append.pack`."""
    _pack(k, v, evict, valid, **_state(pool, lists))


def _run_chunk(q: Tensor, k: Tensor, v: Tensor, evict: Tensor, **given: Any) -> Tensor:
    starts, first, expiry = (given[name] for name in ("starts", "first", "expiry"))
    state = _together(given)
    return prefill_chunk.attend_chunk(
        q, k, v, evict, starts, first, expiry, *state, _scoring(given)
    )


def _like_chunk(q: Tensor, k: Tensor, v: Tensor, *args: Any, **given: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])


_attend_chunk = _op(
    "attend_chunk(Tensor q, Tensor k, Tensor v, Tensor evict, *, Tensor? starts, Tensor first, Tensor? expiry, "
    f"{_state_schema(False)}, {_SCORING}) -> Tensor",
    _run_chunk,
    _like_chunk,
)


def attend_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    evict: Tensor,
    starts: Tensor | None,
    first: Tensor,
    expiry: Tensor | None,
    pool: PagePool,
    lists: LayerLists,
    scoring: Scoring,
) -> Tensor:
    """See `prefill_chunk.attend_chunk`."""
    others = {"starts": starts, "first": first, "expiry": expiry}
    return _attend_chunk(q, k, v, evict, **others, **_state(pool, lists), **_scored(scoring))


_TRAINING = (
    "Tensor q, Tensor k, Tensor v, Tensor keep_logprob, Tensor? starts, Tensor? sinks, int window, "
    "float scale, float? softcap"
)


def _run_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep_logprob: Tensor,
    starts: Tensor | None,
    sinks: Tensor | None,
    window: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    scoring = Scoring(scale, softcap, sinks)
    return prefill.prefill_forward(q, k, v, keep_logprob, window, starts, scoring)


def _like_prefill(q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    return v.new_empty(*q.shape[:3], v.shape[-1]), lse


_prefill = _op(f"prefill({_TRAINING}) -> (Tensor, Tensor)", _run_prefill, _like_prefill)


def _run_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep_logprob: Tensor,
    starts: Tensor | None,
    sinks: Tensor | None,
    window: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scoring = Scoring(scale, softcap, sinks)
    return prefill_backward.prefill_backward(
        grad, q, k, v, keep_logprob, window, starts, out, lse, scoring
    )


def _like_inputs(grad: Tensor, out: Tensor, lse: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in inputs[:4])


_backward = _op(
    f"prefill_backward(Tensor grad, Tensor out, Tensor lse, {_TRAINING}) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _like_inputs,
)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.window, ctx.scale, ctx.softcap = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = _backward(grad, *ctx.saved_tensors, ctx.window, ctx.scale, ctx.softcap)
    return (*found, *[None] * 5)


torch.library.register_autograd(
    f"{NAMESPACE}::prefill", _differentiate, setup_context=_keep_for_backward
)


def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep_logprob: Tensor,
    window: int,
    starts: Tensor | None,
    scoring: Scoring,
) -> Tensor:
    """Attention among T tokens, differentiable in q, k, v and keep_logprob.

    Args:
        q: queries [B, H, T, D].
        k: keys [B, K, T, D].
        v: values [B, K, T, Dv].
        keep_logprob: log(1 - alpha) [B, K, T] float32, of the token each value governs.
        window: tokens a marked key stays readable.
        starts: the first position [B, T] int32 that each query may see: the start of its document; of padding, its own
            position. None: 0 for all.
        scoring: scale, softcap and sinks.

    Returns:
        Output [B, H, T, Dv].

    Raises:
        ValueError: the sinks want a gradient, which is not computed.
    """
    if torch.is_grad_enabled() and scoring.sinks is not None and scoring.sinks.requires_grad:
        raise ValueError(
            "the prefill kernel has no gradient of sinks; freeze them or use impl='reference'"
        )
    scored = (scoring.scale, scoring.softcap)
    return _prefill(q, k, v, keep_logprob, starts, scoring.sinks, window, *scored)[0]
