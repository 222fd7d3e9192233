# SPDX-License-Identifier: Apache-2.0
"""How data are named: files, their formats, and blends of several sources. Imports nothing heavy; opens nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelopt_dms.data import DataError
from modelopt_dms.data.formats import SUFFIXES, check_format


@dataclass(frozen=True)
class Blend:
    """Data from several sources: `Blend([("math.jsonl", 0.7), (texts, 0.3)])`.

    Attributes:
        parts: (source, weight). A source is any data we accept, but a blend. Weights are above 0 and relative to each
            other: the shares of the tokens that training visits. A source that runs out is visited again.
    """

    parts: Sequence[tuple[Any, float]]

    def __post_init__(self) -> None:
        if isinstance(self.parts, str) or not isinstance(self.parts, Sequence) or not self.parts:
            raise DataError(
                f'parts={self.parts!r:.80} must be a list of (source, weight), for example [("math.jsonl", 0.7)]'
            )
        for index, part in enumerate(self.parts):
            if not isinstance(part, tuple | list) or len(part) != 2:
                raise DataError(f"parts[{index}] is {part!r:.80}; expected (source, weight)")
            source, weight = part
            name = name_of(source, f"parts[{index}]")
            if isinstance(source, Blend):
                raise DataError(f"{name} is a Blend; put its sources into the outer one")
            if not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise DataError(f"{name} has weight {weight!r}; expected a number above 0")


@dataclass(frozen=True)
class Formatted:
    """Data whose records are of another project's format: `Formatted("chats.jsonl", "sharegpt")`.

    Attributes:
        data: of any kind that we accept but a blend; its records are converted when they are read.
        format: "sharegpt", "alpaca" or "prompt-completion", see `data.formats`.
    """

    data: Any
    format: str

    def __post_init__(self) -> None:
        check_format(self.format)
        if isinstance(self.data, Blend | Formatted):
            raise DataError(f"data of a format cannot be a {type(self.data).__name__}")


def as_paths(data: Any) -> list[Path]:
    """The files that data are, if they are files and not yet texts."""
    if isinstance(data, Formatted):
        return as_paths(data.data)
    if isinstance(data, str | Path):
        return [Path(data)]
    if isinstance(data, Sequence) and data and all(_is_path(item) for item in data):
        return [Path(item) for item in data]
    return []


def _is_path(item: Any) -> bool:
    return isinstance(item, Path) or (
        isinstance(item, str) and "\n" not in item and item.endswith(SUFFIXES)
    )


def name_of(source: Any, otherwise: str) -> str:
    """The names of a source's files, or what to call it if it has none."""
    return ", ".join(path.name for path in as_paths(source)) or otherwise


def parse_data(
    arguments: Sequence[str], format: str | None = None
) -> Blend | Formatted | list[Path]:
    """Data as the command line writes them: "math.jsonl:0.7" has a weight, "code.parquet" has none.

    Without any weight, files are read as one. Files without a weight beside others that have one are one source, with
    what the weights leave of 1.

    Args:
        arguments: files, perhaps with a weight.
        format: of the records of all of them, see `Formatted`; None is our own.

    Raises:
        DataError: a weight that is not above 0, or leaves nothing to files without one; an unknown format.
    """
    parts: list[tuple[Any, float]] = []
    plain: list[Path] = []
    for argument in arguments:
        path, weight = _split_weight(argument)
        if weight is None:
            plain.append(path)
        elif 0 < weight < math.inf:
            parts.append((path, weight))
        else:
            raise DataError(f"--data {argument} has weight {weight:g}; expected a number above 0")
    read: Any = (lambda x: x) if format is None else (lambda x: Formatted(x, check_format(format)))
    if not parts:
        return read(plain) if plain else plain
    parts = [(read(path), weight) for path, weight in parts]
    rest = 1 - sum(weight for _, weight in parts)
    if plain and rest < 1e-9:
        raise DataError(
            f"--data {plain[0]} has no weight, and the others' sum to {1 - rest:g}; expected less than 1, "
            "so that it gets the rest, or a weight for each file"
        )
    return Blend([*parts, (read(plain), rest)] if plain else parts)


def _split_weight(argument: str) -> tuple[Path, float | None]:
    path, colon, number = argument.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        weight = None
    if not colon or weight is None:
        return Path(argument), None
    return Path(path), weight
