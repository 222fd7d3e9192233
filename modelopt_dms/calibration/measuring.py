# SPDX-License-Identifier: Apache-2.0
"""Which thresholds give which compression ratio, and what that costs: the curve of a model, measured."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modelopt_dms.compression import (
    Curve,
    CurvePoint,
    move_thresholds,
    thresholds_of,
)
from modelopt_dms.config import RetrofitConfig
from modelopt_dms.convert import dms_modules
from modelopt_dms.data import Samples
from modelopt_dms.gate import eviction_off, hidden_input
from modelopt_dms.mode import facts_of
from modelopt_dms.ops import shift_decisions
from modelopt_dms.ratio import physical_cr, target_evicted_fraction
from modelopt_dms.train.distill import Distiller
from modelopt_dms.train.head import input_device, last_hidden
from modelopt_dms.train.measure import measure

SETTLING_STEPS = 3
NEAR = 0.005


def trace_curve(
    model: PreTrainedModel,
    samples: Samples,
    ratios: Sequence[float],
    *,
    length: int,
    batch_size: int,
) -> Curve:
    """Measure what a common shift of all thresholds does, at shifts chosen for some compression ratios.

    Args:
        model: a converted model; its thresholds are the curve's shift 0, and stay.
        samples: held-out samples.
        ratios: wanted compression ratios; those out of reach at `length` are left out.
        length: tokens of a sequence that compression ratios are about.
        batch_size: samples at a time.
    """
    dms = facts_of(model)
    logits = torch.cat([x.flatten() for x in margins(model, samples, batch_size)]).sort().values
    fractions = [0.0] + [
        target_evicted_fraction(cr, length, dms.window, dms.protect_first)
        for cr in sorted(ratios)
        if cr * (dms.window + 1 + dms.protect_first) <= length
    ]
    shifts = [threshold_for(logits, fraction) for fraction in fractions]
    points = _measure(model, samples, shifts, length, batch_size)
    return Curve(length, dms.window, dms.protect_first, thresholds_of(model), points)


def settle(
    model: PreTrainedModel, samples: Samples, curve: Curve, fraction: float, *, batch_size: int
) -> Curve:
    """Move thresholds, in place, along a curve to where they evict a fraction; the curve of the model as it is then.

    What is evicted in one layer changes what gates of the next ones read, so thresholds found with nothing evicted are
    only nearly right.
    """
    for _ in range(SETTLING_STEPS):
        found = curve.at_fraction(fraction).shift
        move_thresholds(model, curve.thresholds, found)
        here = _measure(model, samples, [0.0], curve.length, batch_size)
        others = [replace(x, shift=x.shift - found) for x in curve.points if x.shift != found]
        points = _in_order([*others, *here])
        curve = replace(curve, thresholds=thresholds_of(model), points=points)
        if abs(here[0].evicted_fraction - fraction) < NEAR:
            break
    return curve


def _measure(
    model: PreTrainedModel,
    samples: Samples,
    shifts: Sequence[float],
    length: int,
    batch_size: int,
) -> tuple[CurvePoint, ...]:
    """What these shifts of the model's thresholds give."""
    dms = facts_of(model)
    base = thresholds_of(model)
    found: list[CurvePoint] = []
    with _in_eval(model):
        distiller = Distiller(model, RetrofitConfig()).eval()
        try:
            for shift in shifts:
                move_thresholds(model, base, shift)
                result = measure(distiller, samples, batch_size, soft=False)
                evicted = result["evicted_hard"]
                ratio = physical_cr(evicted, length, dms.window, dms.protect_first)
                found.append(CurvePoint(shift, evicted, ratio, max(0.0, result["kl"])))
        finally:
            move_thresholds(model, base, 0.0)
    return _in_order(found)


def _in_order(points: Sequence[CurvePoint]) -> tuple[CurvePoint, ...]:
    """By rising evicted fraction; of several that evict as much, the one with the highest thresholds."""
    unique = {x.evicted_fraction: x for x in sorted(points, key=lambda x: x.shift)}
    return tuple(unique[x] for x in sorted(unique))


def threshold_for(logits: Tensor, fraction: float) -> float:
    """The value that this share of sorted logits [N] is above."""
    if fraction <= 0.0:
        return float(logits[-1])
    return float(logits[min(len(logits) - 1, int((1.0 - fraction) * len(logits)))])


@torch.no_grad()
def margins(model: PreTrainedModel, samples: Samples, batch_size: int) -> list[Tensor]:
    """By how much eviction logits exceed their thresholds, for every layer [R, N], N tokens whose eviction counts."""
    dms = facts_of(model)
    found: dict[str, list[Tensor]] = {name: [] for name in dms_modules(model)}
    counts = torch.empty(0)

    def read(name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        gate = module.dms_gate
        z = gate.logits(hidden_input(args, kwargs))
        above = shift_decisions(z - gate.threshold[:, None], gate.shift)
        found[name].append(above.transpose(0, 1)[:, counts.to(above.device)].cpu())

    handles = []
    for name, module in dms_modules(model).items():
        hook: Any = _named(read, name)
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        with _in_eval(model), eviction_off(model):
            for start in range(0, len(samples), batch_size):
                batch = samples.batch(slice(start, start + batch_size))
                counts = (batch["tokens_ahead"] > dms.window) & (
                    batch["position_ids"] >= dms.protect_first
                )
                device = input_device(model)
                last_hidden(model, batch["input_ids"].to(device), batch["position_ids"].to(device))
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts, dim=1) for parts in found.values()]


def _named(read: Any, name: str) -> Any:
    return lambda module, args, kwargs: read(name, module, args, kwargs)


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
