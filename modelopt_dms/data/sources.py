# SPDX-License-Identifier: Apache-2.0
"""Blends: several sources of documents, each with its share of the tokens. Knows no packing."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.data.documents import Documents, as_paths, open_documents
from modelopt_dms.data.errors import DataError
from modelopt_dms.data.records import Tokens


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
class Source:
    """Documents and their share of the tokens.

    Attributes:
        name: its files, or its place in the data.
        share: between 0 and 1; those of all sources sum to 1.
        documents: tokenized when asked for.
    """

    name: str
    share: float
    documents: Documents


def open_sources(
    data: Any, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel | None
) -> list[Source]:
    """The sources of a blend, or one for data of any other kind; reads files, tokenizes nothing yet.

    Args:
        data: see `modelopt_dms.data.ACCEPTED`.
        tokenizer: needed unless the data are token ids.
        model: whose vocabulary the ids must fit, if there is one yet.

    Raises:
        DataError: missing, empty or unreadable data, an unknown column, a tokenizer of another model.
    """
    if not isinstance(data, Blend):
        return [Source(name_of(data, "data"), 1.0, open_documents(data, tokenizer, model))]
    total = sum(weight for _, weight in data.parts)
    return [
        Source(
            name_of(source, f"parts[{index}]"),
            weight / total,
            open_documents(source, tokenizer, model, f"parts[{index}]"),
        )
        for index, (source, weight) in enumerate(data.parts)
    ]


def name_of(source: Any, otherwise: str) -> str:
    """The names of a source's files, or what to call it if it has none."""
    return ", ".join(path.name for path in as_paths(source)) or otherwise


def read_once(sources: Sequence[Source], seed: int | None) -> Iterator[Tokens]:
    """Every document once; those of several sources in turns that keep to the shares while all of them last.

    Args:
        sources: as from `open_sources`.
        seed: fixes the order in which records are read; None is that of the data.
    """
    streams = {
        number: iter(x.documents) if seed is None else x.documents.shuffled(seed, number)
        for number, x in enumerate(sources)
    }
    tokens = [0] * len(sources)
    while streams:
        number = min(streams, key=lambda i: tokens[i] / sources[i].share)
        document = next(streams[number], None)
        if document is None:
            del streams[number]
            continue
        tokens[number] += len(document)
        yield document


def parse_data(arguments: Sequence[str]) -> Blend | list[Path]:
    """Data as the command line writes them: "math.jsonl:0.7" has a weight, "code.parquet" has none.

    Without any weight, files are read as one. Files without a weight beside others that have one are one source, with
    what the weights leave of 1.

    Raises:
        DataError: a weight that is not above 0, or leaves nothing to files without one.
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
    if not parts:
        return plain
    rest = 1 - sum(weight for _, weight in parts)
    if plain and rest < 1e-9:
        raise DataError(
            f"--data {plain[0]} has no weight, and the others' sum to {1 - rest:g}; expected less than 1, "
            "so that it gets the rest, or a weight for each file"
        )
    return Blend([*parts, (plain, rest)] if plain else parts)


def _split_weight(argument: str) -> tuple[Path, float | None]:
    path, colon, number = argument.rpartition(":")
    try:
        weight = float(number)
    except ValueError:
        weight = None
    if not colon or weight is None:
        return Path(argument), None
    return Path(path), weight
