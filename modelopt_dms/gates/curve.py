# SPDX-License-Identifier: Apache-2.0
"""A measured curve: from thresholds to compression ratio to KL. Knows no model, and imports no torch."""

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from modelopt_dms.config.compression_ratio import (
    physical_cr,
    rounded_down,
    rounded_up,
    target_evicted_fraction,
)
from modelopt_dms.config.section import in_one_line

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
                f"{rounded_down(length / always_resident)} at length={length}"
            )
        wanted = target_evicted_fraction(cr, length, self.window, self.protect_first)
        least, most = (x.evicted_fraction for x in (self.points[0], self.points[-1]))
        if not least <= wanted <= most:
            low, high = (
                physical_cr(x, length, self.window, self.protect_first) for x in (least, most)
            )
            raise CompressionError(
                f"cr={cr:g} is out of what was measured; at length={length} it can be "
                f"{rounded_up(low)} to {rounded_down(high)}"
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

    def evicted_share(self, shift: float) -> float:
        """Share of the evictable tokens that is evicted with thresholds moved by `shift`, interpolated."""
        a, b, part = self._around(shift)
        low, high = _tail(a.evicted_fraction), _tail(b.evicted_fraction)  # as `at_fraction` has it
        return 1.0 - math.exp(-(low + part * (high - low)))

    def expected(self, shift: float, length: int) -> tuple[float, float]:
        """The compression ratios that most texts of `length` tokens get with thresholds moved by `shift`.

        From the held-out sample that was compressed least to the one that was compressed most, a quarter wider on both
        sides: samples are few, and texts are of more kinds (benchmarks/results/real_model_log.md).
        """
        a, b, part = self._around(shift)

        def ratio(low: float, high: float, factor: float) -> float:
            """At another length, from the ratio at the curve's."""
            cr = low + part * (high - low)
            share = target_evicted_fraction(cr, self.length, self.window, self.protect_first)
            return max(1.0, factor * physical_cr(share, length, self.window, self.protect_first))

        return (
            ratio(a.lowest_cr, b.lowest_cr, 1 - MARGIN),
            ratio(a.highest_cr, b.highest_cr, 1 + MARGIN),
        )

    def _around(self, shift: float) -> tuple[CurvePoint, CurvePoint, float]:
        """Two measured points, and how far between them (0 to 1) thresholds moved by `shift` are."""
        points = sorted(self.points, key=lambda x: x.shift)
        above = min(max(1, bisect_left([x.shift for x in points], shift)), len(points) - 1)
        a, b = points[above - 1], points[above]
        return a, b, min(max((shift - a.shift) / max(b.shift - a.shift, 1e-12), 0.0), 1.0)


_CURVE = TypeAdapter(Curve)


def read_curve(stored: Any) -> Curve:
    """A curve as a model's config stores it (`dms_curve`).

    Raises:
        CompressionError: it is damaged.
    """
    try:
        curve = _CURVE.validate_python(stored)
    except ValidationError as error:
        raise damaged(in_one_line(error)) from error
    fractions = [x.evicted_fraction for x in curve.points]
    if len(fractions) < 2 or fractions != sorted(set(fractions)):
        raise damaged(f"points must be two or more, by rising evicted_fraction, not {fractions}")
    return curve


def damaged(why: str) -> CompressionError:
    """The error of a stored curve that cannot be used."""
    return CompressionError(
        f"dms_curve is damaged or of another version ({why}); compress the original model again"
    )


def _tail(evicted_fraction: float) -> float:
    return -math.log(max(1.0 - evicted_fraction, 1e-4))
