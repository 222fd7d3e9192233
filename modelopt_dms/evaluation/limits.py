# SPDX-License-Identifier: Apache-2.0
"""Limits a user sets on results, "kl>0.05", and which rows break them. Checked before work: imports nothing."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FIDELITY = "fidelity"
# Figures of rows that a limit may name; those that only --fidelity measures come first.
DISTANCES = ("kl", "kl_p95", "kl_p99", "kl_max", "top1")
FIGURES = (*DISTANCES, "accuracy", "perplexity", "compression_ratio", "resident_tokens", "kv_bytes")
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
}
_LIMIT = re.compile(r"\s*(?:([\w.-]+)\.)?(\w+)\s*(<=|>=|<|>)\s*([-+.\deE]+)\s*")


@dataclass(frozen=True)
class Limit:
    """Results that break it fail.

    Attributes:
        text: as the user wrote it.
        about: a task or a category of text; None is all of them.
        figure: one of FIGURES.
        sign: a key of _COMPARE.
        bound: on the right of it.
    """

    text: str
    about: str | None
    figure: str
    sign: str
    bound: float

    def value(self, row: Mapping[str, Any]) -> float | None:
        """The figure in a row that the limit is about; None if it has none."""
        if self.about not in (None, row["task"], row.get("category")):
            return None
        found = row.get(self.figure, row["value"] if row["metric"] == self.figure else None)
        return None if found is None else float(found)


def parse_limits(
    texts: Sequence[str], fidelity: bool, measured: Sequence[str] | None = None
) -> list[Limit]:
    """Limits such as "kl>0.05", "needle.accuracy<0.9", "prose.top1<0.97": a result fails if it holds.

    Args:
        texts: as given on the command line.
        fidelity: whether distances from the full cache will be measured.
        measured: tasks and categories of text that will be; None if that is not known.

    Raises:
        ValueError: one cannot be read, or is about what will not be measured.
    """
    found = []
    for text in texts:
        match = _LIMIT.fullmatch(text)
        if match is None or match[2] not in FIGURES or not _is_number(match[4]):
            raise ValueError(
                f"--fail-if {text!r} must be [TASK.]FIGURE, one of < > <= >=, and a number, such as kl>0.05; "
                f"figures are {', '.join(FIGURES)}"
            )
        if match[2] in DISTANCES and not fidelity:
            raise ValueError(f"--fail-if {text!r} is about what only --fidelity measures")
        if measured is not None and match[1] not in (None, *measured):
            raise ValueError(
                f"--fail-if {text!r}: {match[1]} will not be measured, only {', '.join(measured)}"
            )
        found.append(Limit(text, match[1], match[2], match[3], float(match[4])))
    return found


def broken(limits: Sequence[Limit], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line for every row that breaks a limit, and for every limit that no row is about."""
    lines = []
    for limit in limits:
        values = [(row, x) for row in rows if (x := limit.value(row)) is not None]
        if not values:
            lines.append(f"{limit.text}: no result has this figure")
        for row, x in values:
            # Not a number breaks every limit.
            if x != x or _COMPARE[limit.sign](x, limit.bound):
                where = row.get("category") or row["task"]
                lines.append(
                    f"{limit.text}: {where} at {row['length']} tokens has {limit.figure} {x:.6g}"
                )
    return lines


def _is_number(text: str) -> bool:
    try:
        return float(text) == float(text)
    except ValueError:
        return False
