# SPDX-License-Identifier: Apache-2.0
"""Which packed sample training visits when, so that every source gets its share of the tokens. Knows no documents."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from modelopt_dms.data.packing import Samples


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
        """Visit `count` samples.

        Args:
            samples: of all sources, one source after the other.
            count: number of visits.
            seed: fixes the order.
            sources: number of samples, and share of the tokens, of every source; one by default.
        """
        self.samples = samples
        self.order = _order(samples, count, seed, sources or [(len(samples), 1.0)])

    def __len__(self) -> int:
        """Number of visits."""
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The sample of a visit, int64 tensors [T]."""
        return self.samples.batch(self.order[index])


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
