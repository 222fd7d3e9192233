# SPDX-License-Identifier: Apache-2.0
"""Data of one or several sources -> the samples of a run. Every source is packed by itself and visited by its share."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.data import DataError
from modelopt_dms.data.documents import Documents, open_documents
from modelopt_dms.data.inputs import Blend, name_of
from modelopt_dms.data.packing import HELD_OUT_SAMPLES, Samples, pack_and_split
from modelopt_dms.data.records import Tokens


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
        data: see `modelopt_dms.data.documents.ACCEPTED`.
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


@dataclass
class Tally:
    """What was read of a source.

    Attributes:
        documents: how many.
        tokens: of all of them.
        longest: tokens of the longest one.
        first: the first one [L].
    """

    documents: int = 0
    tokens: int = 0
    longest: int = 0
    first: Tokens = field(default_factory=lambda: np.zeros(0, np.int32))

    def count(self, documents: Iterable[Tokens]) -> Iterator[Tokens]:
        """The same documents, counted as they pass."""
        for document in documents:
            if not self.tokens:
                self.first = document
            self.documents += 1
            self.tokens += len(document)
            self.longest = max(self.longest, len(document))
            yield document


@dataclass(frozen=True)
class Part:
    """One source in the samples of a run.

    Attributes:
        name: of the source.
        share: of the tokens to visit.
        records: that the source has.
        samples: to train on.
        read: what was read to make them, held-out ones included.
    """

    name: str
    share: float
    records: int
    samples: int
    read: Tally


class Visits(Dataset[dict[str, Tensor]]):
    """The samples in the order in which training visits them: as often as needed, each pass in an order of its own.

    A function of the seed and the position alone, so that a resumed run goes on exactly where it stopped.

    Attributes:
        samples: of all sources, one source after the other.
        order: index of the sample of every visit [count].
    """

    def __init__(
        self,
        samples: Samples,
        count: int,
        seed: int,
        sources: Sequence[tuple[int, float]] | None = None,
    ) -> None:
        """Visit `count` samples; `sources` are number of samples and share of the tokens of each, one by default."""
        self.samples = samples
        self.order = _order(samples, count, seed, sources or [(len(samples), 1.0)])

    def __len__(self) -> int:
        """Number of visits."""
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The sample of a visit, int64 tensors [T]."""
        return self.samples.batch(self.order[index])


@dataclass(frozen=True)
class PreparedData:
    """Samples to train on, and a few never trained on, to measure on; of all parts, one after the other."""

    training: Samples
    held_out: Samples
    parts: tuple[Part, ...]

    def visits(self, count: int, seed: int) -> Visits:
        """The samples in the order of training: `count` of them, every part by its share."""
        return Visits(self.training, count, seed, [(x.samples, x.share) for x in self.parts])


def prepare_samples(
    sources: Sequence[Source], *, length: int, window: int, wanted: int, seed: int
) -> PreparedData:
    """Make the samples of a run that visits `wanted` of them; read no more documents than it visits.

    The seed fixes which documents are used and which samples are held out.

    Raises:
        DataError: a source has too few tokens for two samples, or no document longer than the window.
    """
    splits, parts = [], []
    for stream, source in enumerate(sources):
        read = Tally()
        try:
            split = pack_and_split(
                read.count(source.documents.shuffled(seed, stream)),
                length=length,
                window=window,
                wanted=math.ceil(wanted * source.share),
                seed=seed,
                stream=stream,
                held_out=math.ceil(HELD_OUT_SAMPLES * source.share),
            )
        except DataError as error:
            raise DataError(
                f"{source.name}: {error}" if len(sources) > 1 else str(error)
            ) from error
        splits.append(split)
        parts.append(
            Part(source.name, source.share, len(source.documents), len(split.training), read)
        )
    return PreparedData(
        Samples.join([x.training for x in splits]),
        Samples.join([x.held_out for x in splits]),
        tuple(parts),
    )


def _order(samples: Samples, count: int, seed: int, sources: Sequence[tuple[int, float]]) -> Tensor:
    """Next comes always the source that is furthest behind its share of the tokens; padding does not count."""
    filled = (samples.tokens_ahead >= 0).sum(1).tolist()
    starts = np.cumsum([0, *(size for size, _ in sources)])
    streams = [
        _passes(seed, stream, int(start), size)
        for stream, (start, (size, _)) in enumerate(zip(starts, sources, strict=False))
    ]
    visited = [0] * len(sources)
    order = torch.empty(count, dtype=torch.int64)
    for visit in range(count):
        stream = min(range(len(sources)), key=lambda i: visited[i] / sources[i][1])
        place = next(streams[stream])
        visited[stream] += filled[place]
        order[visit] = place
    return order


def _passes(seed: int, stream: int, start: int, size: int) -> Iterator[int]:
    number = 0
    while True:
        generator = np.random.default_rng([seed, 2, number, stream])
        yield from (start + generator.permutation(size)).tolist()
        number += 1
