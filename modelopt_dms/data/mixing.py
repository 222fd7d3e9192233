# SPDX-License-Identifier: Apache-2.0
"""Sources of documents -> the samples of a run. Every source is packed by itself and visited by its share."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from modelopt_dms.data import DataError
from modelopt_dms.data.packing import HELD_OUT_SAMPLES, Samples, pack_and_split
from modelopt_dms.data.records import Tokens
from modelopt_dms.data.sources import Source
from modelopt_dms.data.visits import Visits


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
    """Make the samples of a run; read no more documents than it visits.

    Args:
        sources: as from `open_sources`.
        length: tokens per sample.
        window: delay window, for refusing documents in which no eviction can take effect.
        wanted: samples that the whole training visits.
        seed: fixes which documents are used and which samples are held out.

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
