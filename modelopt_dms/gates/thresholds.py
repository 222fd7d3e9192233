# SPDX-License-Identifier: Apache-2.0
"""One model, every compression ratio: thresholds move along a measured curve."""

import math
from bisect import bisect_left
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import nn
from transformers import PreTrainedModel

from modelopt_dms.config.compression_ratio import physical_cr, target_evicted_fraction
from modelopt_dms.config.section import in_one_line
from modelopt_dms.gates.gate import gates

# Stored curves are read back as they were written, or refused.
STRICT = ConfigDict(allow_inf_nan=False, extra="forbid")

# How much wider than held-out samples' the range of ratios is that is expected of other texts.
MARGIN = 0.25


class CompressionError(ValueError):
    """A compression ratio that a model cannot be set to; the message says what it can."""


@dataclass(frozen=True)
class CurvePoint:
    """What one setting of the thresholds gives, measured on held-out samples with hard decisions.

    Attributes:
        shift: what is added to every threshold; more evicts less.
        evicted_fraction: share of the tokens whose eviction takes effect.
        compression_ratio: physical, of a sequence of the curve's `length`; the mean over held-out samples.
        lowest_cr: of the held-out sample that was compressed least. Other texts are to be expected in this range.
        highest_cr: of the one that was compressed most.
        kl: KL divergence from the model with eviction off, nats per token.
    """

    shift: float
    evicted_fraction: Annotated[float, Field(ge=0.0, le=1.0)]
    compression_ratio: Annotated[float, Field(ge=1.0)]
    lowest_cr: Annotated[float, Field(ge=1.0)]
    highest_cr: Annotated[float, Field(ge=1.0)]
    kl: float

    __pydantic_config__: ClassVar[ConfigDict] = STRICT


@dataclass(frozen=True)
class Curve:
    """From thresholds to compression ratio to quality. Stored in the model's config as `dms_curve`.

    Attributes:
        length: tokens of the sequences it was measured on.
        window: delay window.
        protect_first: tokens at the start that are never evicted.
        thresholds: every layer's thresholds at shift 0.
        points: by rising evicted fraction.
    """

    length: Annotated[int, Field(ge=1)]
    window: Annotated[int, Field(ge=1)]
    protect_first: Annotated[int, Field(ge=0)]
    thresholds: tuple[tuple[float, ...], ...]
    points: tuple[CurvePoint, ...]

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    def at(self, cr: float, length: int | None = None) -> CurvePoint:
        """The point at a compression ratio, interpolated between measured ones.

        Args:
            cr: wanted ratio of context to resident tokens.
            length: tokens of the sequence that shall have it; the curve's by default.

        Raises:
            CompressionError: out of what was measured, or impossible at this length.
        """
        length = self.length if length is None else length
        always_resident = self.window + 1 + self.protect_first
        if cr < 1.0 or cr * always_resident > length:
            raise CompressionError(
                f"cr={cr:g} must be at least 1 and, as {always_resident} tokens are always resident, at most "
                f"{length / always_resident:.3g} at length={length}"
            )
        wanted = target_evicted_fraction(cr, length, self.window, self.protect_first)
        least, most = (x.evicted_fraction for x in (self.points[0], self.points[-1]))
        if not least <= wanted <= most:
            low, high = (
                physical_cr(x, length, self.window, self.protect_first) for x in (least, most)
            )
            raise CompressionError(
                f"cr={cr:g} is out of what was measured; at length={length} it can be {low:.3g} to {high:.3g}"
            )
        return replace(self.at_fraction(wanted), compression_ratio=cr)

    def at_fraction(self, wanted: float) -> CurvePoint:
        """The point at an evicted fraction within the measured ones, interpolated; at the curve's length."""
        fractions = [x.evicted_fraction for x in self.points]
        above = min(max(1, bisect_left(fractions, wanted)), len(fractions) - 1)
        a, b = self.points[above - 1], self.points[above]
        # Logits have a tail where few tokens are kept: thresholds follow the logarithm of the kept share.
        start, here, end = (_tail(x) for x in (a.evicted_fraction, wanted, b.evicted_fraction))
        part = (here - start) / max(end - start, 1e-12)

        def between(name: str) -> float:
            low, high = getattr(a, name), getattr(b, name)
            return low + part * (high - low)

        return CurvePoint(
            shift=between("shift"),
            evicted_fraction=wanted,
            compression_ratio=physical_cr(wanted, self.length, self.window, self.protect_first),
            lowest_cr=between("lowest_cr"),
            highest_cr=between("highest_cr"),
            kl=between("kl"),
        )


_CURVE = TypeAdapter(Curve)


def expected_ratios(model: PreTrainedModel, length: int) -> tuple[float, float] | None:
    """The compression ratios that most texts of this many tokens get at the model's thresholds; None without a curve.

    From the held-out sample that was compressed least to the one that was compressed most, a quarter wider on both
    sides: samples are few, and texts are of more kinds (benchmarks/results/real_model_log.md).
    """
    if getattr(model.config, "dms_curve", None) is None:
        return None
    curve = curve_of(model)
    a, b, part = _points_around(curve, model)
    window, protected = curve.window, curve.protect_first

    def ratio(low: float, high: float, factor: float) -> float:
        """At another length, from the ratio at the curve's."""
        share = target_evicted_fraction(low + part * (high - low), curve.length, window, protected)
        return max(1.0, factor * physical_cr(share, length, window, protected))

    return ratio(a.lowest_cr, b.lowest_cr, 1 - MARGIN), ratio(
        a.highest_cr, b.highest_cr, 1 + MARGIN
    )


def expected_evicted_share(model: PreTrainedModel) -> float:
    """Share of the evictable tokens that a DMS model evicts: by its curve, else by its recipe; 0 if it evicts none."""
    dms_config = model.config.dms_config
    if not dms_config.get("evict", True):
        return 0.0
    if getattr(model.config, "dms_curve", None) is None:
        return 1.0 - 1.0 / dms_config["target_cr"]
    a, b, part = _points_around(curve_of(model), model)
    low, high = (
        _tail(a.evicted_fraction),
        _tail(b.evicted_fraction),
    )  # as `Curve.at_fraction` has it
    return 1.0 - math.exp(-(low + part * (high - low)))


def _points_around(curve: Curve, model: PreTrainedModel) -> tuple[CurvePoint, CurvePoint, float]:
    """Two measured points, and how far between them (0 to 1) the model's thresholds are."""
    here = thresholds_of(model)[0][0] - curve.thresholds[0][0]
    points = sorted(curve.points, key=lambda x: x.shift)
    above = min(max(1, bisect_left([x.shift for x in points], here)), len(points) - 1)
    a, b = points[above - 1], points[above]
    return a, b, min(max((here - a.shift) / max(b.shift - a.shift, 1e-12), 0.0), 1.0)


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


def _tail(evicted_fraction: float) -> float:
    return -math.log(max(1.0 - evicted_fraction, 1e-4))


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
    try:
        curve = _CURVE.validate_python(stored)
    except ValidationError as error:
        raise _damaged(in_one_line(error)) from error
    fractions = [x.evicted_fraction for x in curve.points]
    if len(fractions) < 2 or fractions != sorted(set(fractions)):
        raise _damaged(f"points must be two or more, by rising evicted_fraction, not {fractions}")
    rows = [len(gate.threshold) for gate in gates(model)]
    if [len(x) for x in curve.thresholds] != rows:
        found = [len(x) for x in curve.thresholds]
        raise _damaged(f"the model's gates have {rows} thresholds, those in the file are {found}")
    return curve


def _damaged(why: str) -> CompressionError:
    return CompressionError(
        f"dms_curve is damaged or of another version ({why}); compress the original model again"
    )


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
