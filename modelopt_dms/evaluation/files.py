# SPDX-License-Identifier: Apache-2.0
"""A user's documents -> samples of one length, on which perplexity and fidelity are measured."""

from collections.abc import Iterable

from modelopt_dms.data.records import Tokens


def cut_documents(documents: Iterable[Tokens], length: int, count: int) -> list[list[int]]:
    """The first `count` samples of exactly `length` tokens.

    Raises:
        ValueError: no document is long enough.
    """
    samples: list[list[int]] = []
    longest = 0
    for ids in documents:
        longest = max(longest, len(ids))
        for start in range(0, len(ids) - length + 1, length):
            samples.append(ids[start : start + length].tolist())
            if len(samples) == count:
                return samples
    if not samples:
        raise ValueError(
            f"no document has {length} tokens, the longest has {longest}; choose shorter lengths"
        )
    return samples
