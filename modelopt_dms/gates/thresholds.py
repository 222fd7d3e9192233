# SPDX-License-Identifier: Apache-2.0
"""One model, every compression ratio: thresholds move along a measured curve."""

from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from modelopt_dms.config.compression_ratio import physical_cr
from modelopt_dms.gates.curve import (
    MARGIN,
    CompressionError,
    Curve,
    CurvePoint,
    damaged,
    read_curve,
)
from modelopt_dms.gates.gate import gates


def expected_ratios(model: PreTrainedModel, length: int) -> tuple[float, float] | None:
    """The compression ratios that most texts of this length get at the model's thresholds; None without a curve."""
    if getattr(model.config, "dms_curve", None) is None:
        return None
    curve = curve_of(model)
    return curve.expected(_shift(curve, model), length)


def expected_evicted_share(model: PreTrainedModel) -> float:
    """Share of the evictable tokens that a DMS model evicts: by its curve, else by its recipe; 0 if it evicts none."""
    dms_config = model.config.dms_config
    if not dms_config.get("evict", True):
        return 0.0
    if getattr(model.config, "dms_curve", None) is None:
        return 1.0 - 1.0 / dms_config["target_cr"]
    curve = curve_of(model)
    return curve.evicted_share(_shift(curve, model))


def _shift(curve: Curve, model: PreTrainedModel) -> float:
    """How far the model's thresholds are from those of the curve's shift 0."""
    return thresholds_of(model)[0][0] - curve.thresholds[0][0]


def ratio_warning(
    model: PreTrainedModel, reached: float, length: int, asked: float | None = None
) -> str | None:
    """One line if texts got another compression ratio than was asked for, with both; None if it is as expected.

    Args:
        model: a DMS model; of others nothing is expected.
        reached: the ratio that texts got.
        length: their tokens.
        asked: by default the recipe's target_cr.
    """
    dms_config = getattr(model.config, "dms_config", None)
    if dms_config is None or not dms_config.get("evict", True):
        return None
    asked = dms_config["target_cr"] if asked is None else asked
    plain = physical_cr(
        1.0 - 1.0 / asked, length, dms_config["window"], dms_config["protect_first"]
    )
    found = expected_ratios(model, length) or ((1 - MARGIN) * plain, (1 + MARGIN) * plain)
    return missed_ratio(asked, reached, length, found)


def missed_ratio(
    asked: float, reached: float, length: int, expected: tuple[float, float] | None = None
) -> str | None:
    """One line if a ratio that was reached is out of what was expected, with the one that was asked for; else None.

    Args:
        asked: compression ratio that was asked for.
        reached: the ratio at the end.
        length: tokens of the texts that reached it.
        expected: lowest and highest; by default a quarter around what was asked for.
    """
    low, high = expected or ((1 - MARGIN) * asked, (1 + MARGIN) * asked)
    low = max(1.0, low)
    if low - 0.01 <= reached <= high + 0.01:
        return None
    return (
        f"asked for a compression ratio of {asked:g}, reached {reached:.2f} on texts of {length} tokens, where "
        f"{low:.2f} to {high:.2f} was expected: they are unlike what the thresholds were set on, or the gates have not "
        "learnt; calibrate on text of this kind, retrofit for longer, or move the thresholds with --cr"
    )


def curve_of(model: PreTrainedModel) -> Curve:
    """The curve that a model carries.

    Raises:
        CompressionError: it carries none.
    """
    stored = getattr(model.config, "dms_curve", None)
    if stored is None:
        raise CompressionError(
            f"{type(model).__name__} carries no curve from thresholds to compression ratios; compress the "
            "original model, with data, by a recipe that calibrates or retrofits"
        )
    curve = read_curve(stored)
    rows = [len(gate.threshold) for gate in gates(model)]
    if [len(x) for x in curve.thresholds] != rows:
        found = [len(x) for x in curve.thresholds]
        raise damaged(f"the model's gates have {rows} thresholds, those in the file are {found}")
    return curve


def store_curve(model: PreTrainedModel, curve: Curve) -> None:
    """Have a model carry a curve, from now on and when it is saved."""
    stored: dict[str, Any] = asdict(curve)
    stored["thresholds"] = [list(x) for x in curve.thresholds]
    stored["points"] = list(stored["points"])
    model.config.dms_curve = stored


def set_compression(model: PreTrainedModel, cr: float, *, length: int | None = None) -> CurvePoint:
    """Set a model, in place, to a compression ratio on the curve it carries. No training; holds when it is saved.

    Args:
        model: a DMS model with a curve, such as `compress` makes.
        cr: wanted ratio of context to resident tokens in the KV cache; about 1 evicts nothing.
        length: tokens of a sequence that shall have this ratio; by default the length the curve was measured at.
            Shorter sequences compress less, longer ones more.

    Returns:
        What is expected there.

    Raises:
        CompressionError: no curve, a ratio that it does not reach, or eviction is switched off.
    """
    if not (getattr(model.config, "dms_config", None) or {}).get("evict", True):
        raise CompressionError(
            f"cr={cr:g}: eviction is switched off in this model (dms_config.evict=false in its config.json)"
        )
    curve = curve_of(model)
    point = curve.at(cr, length)
    move_thresholds(model, curve.thresholds, point.shift)
    return point


@torch.no_grad()
def move_thresholds(
    model: nn.Module, thresholds: tuple[tuple[float, ...], ...], shift: float
) -> None:
    """Set every gate's threshold to one of these, by layer, plus a shift."""
    for gate, base in zip(gates(model), thresholds, strict=True):
        gate.threshold.copy_(torch.tensor(base, dtype=torch.float64) + shift)


def thresholds_of(model: nn.Module) -> tuple[tuple[float, ...], ...]:
    """Every gate's thresholds, by layer."""
    return tuple(tuple(gate.threshold.tolist()) for gate in gates(model))
