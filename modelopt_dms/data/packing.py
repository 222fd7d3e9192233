# SPDX-License-Identifier: Apache-2.0
"""Documents of token ids -> samples of one length, without crossing documents.

A sample holds whole documents, one after the other; only documents longer than a sample are cut, into pieces that
count as documents of their own. `position_ids` restart at each document: transformers takes that for packed sequences
(no attention mask, no cache) and lets no token see another document. What stays free at a sample's end is padding, a
document that nobody counts.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modelopt_dms.data import DataError
from modelopt_dms.data.records import Tokens

HELD_OUT_SAMPLES = 8


@dataclass(frozen=True)
class Samples:
    """Packed samples, all [N, T] int32.

    Attributes:
        input_ids: token ids; 0 where padded.
        position_ids: position of a token within its document.
        tokens_ahead: how many tokens of the same document follow; -1 where padded. A decision about a token takes
            effect only if more than `window` follow.
    """

    input_ids: Tensor
    position_ids: Tensor
    tokens_ahead: Tensor

    def __len__(self) -> int:
        """Number of samples N."""
        return len(self.input_ids)

    def batch(self, index: Tensor | slice) -> dict[str, Tensor]:
        """Some samples as int64 tensors [n, T], by the names of this class."""
        return {
            name: getattr(self, name)[index].long()
            for name in ("input_ids", "position_ids", "tokens_ahead")
        }

    def select(self, index: Tensor) -> "Samples":
        """The samples at these indices [n]."""
        return Samples(self.input_ids[index], self.position_ids[index], self.tokens_ahead[index])

    @staticmethod
    def join(parts: Sequence["Samples"]) -> "Samples":
        """The samples of all parts, one part after the other."""
        names = ("input_ids", "position_ids", "tokens_ahead")
        return Samples(*(torch.cat([getattr(x, name) for x in parts]) for name in names))

    def digest(self) -> str:
        """A fingerprint of the contents."""
        parts = (self.input_ids, self.position_ids)
        return hashlib.sha256(b"".join(x.numpy().tobytes() for x in parts)).hexdigest()[:16]


@dataclass(frozen=True)
class Split:
    """Samples to train on, and a few never trained on, to measure on."""

    training: Samples
    held_out: Samples


def pack(documents: Iterable[Tokens], length: int) -> Samples:
    """Pack documents into samples of `length` tokens: best fit, longest first.

    At most one sample is less than half full; it is left out where there are others to learn from.
    """
    pieces = [
        document[i : i + length] for document in documents for i in range(0, len(document), length)
    ]
    bins: list[list[Tokens]] = []
    free: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for piece in sorted(pieces, key=len, reverse=True):
        fit = bisect_left(free, (len(piece), -1))
        if fit == len(free):
            space, place = length, len(bins)
            bins.append([])
        else:
            space, place = free.pop(fit)
        bins[place].append(piece)
        if space > len(piece):
            insort(free, (space - len(piece), place))
    if len(bins) > 2:
        bins = [x for x in bins if 2 * sum(map(len, x)) >= length]
    return _stack([_sample(pieces, length) for pieces in bins], length)


def pad(pieces: Sequence[Tokens], length: int) -> Samples:
    """One piece of at most `length` tokens a sample, padded on the right."""
    return _stack([_sample([piece], length) for piece in pieces], length)


def _sample(pieces: list[Tokens], length: int) -> tuple[Tokens, Tokens, Tokens]:
    padding = length - sum(map(len, pieces))
    lengths = [len(piece) for piece in pieces]
    ids = np.concatenate([*pieces, np.zeros(padding, np.int32)])
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in (*lengths, padding)])
    ahead = np.concatenate(
        [np.arange(n - 1, -1, -1, dtype=np.int32) for n in lengths]
        + [np.full(padding, -1, np.int32)]
    )
    return ids, positions, ahead


def _stack(rows: list[tuple[Tokens, Tokens, Tokens]], length: int) -> Samples:
    columns = zip(*rows, strict=True) if rows else ([], [], [])
    ids, positions, ahead = (
        torch.from_numpy(np.array(x, np.int32).reshape(-1, length)) for x in columns
    )
    return Samples(ids, positions, ahead)


def pack_and_split(
    documents: Iterable[Tokens],
    *,
    length: int,
    window: int,
    wanted: int,
    seed: int,
    stream: int = 0,
    held_out: int = HELD_OUT_SAMPLES,
) -> Split:
    """Make samples for a training that visits `wanted` of them, and hold out `held_out` at most, chosen by the seed.

    Documents are read only until there are enough. `stream` is the number of their source among others.

    Raises:
        DataError: too few tokens for two samples, or no document longer than the window.
    """
    budget = (wanted + held_out) * length
    used: list[Tokens] = []
    total = 0
    for document in documents:
        used.append(document)
        total += len(document)
        if total >= budget:
            break
    if total == 0:
        raise DataError(f"all {len(used)} documents are empty")
    samples = pack(used, length)
    if total < length or len(samples) < 2:
        raise DataError(
            f"data is too short: {len(used)} documents with {total} tokens do not fill two samples of "
            f"sequence_length={length} (one to train on, one to measure on)"
        )
    can_evict = (samples.tokens_ahead > window).any(dim=1)
    if can_evict.sum() < 2:
        raise DataError(
            f"nothing to learn: the longest document has {max(map(len, used))} tokens, but eviction takes effect only "
            f"after window + 1 = {window + 1}; at least two samples need a longer one (sequence_length={length})"
        )
    # Held-out samples must have something to measure.
    usable = torch.from_numpy(
        np.random.default_rng([seed, 1, 0, stream]).permutation(
            can_evict.nonzero().squeeze(1).numpy()
        )
    )
    held = usable[: max(1, min(held_out, len(usable) // 20))]
    training = torch.ones(len(samples), dtype=torch.bool).scatter_(0, held, False)
    return Split(samples.select(training.nonzero().squeeze(1)), samples.select(held.sort().values))
