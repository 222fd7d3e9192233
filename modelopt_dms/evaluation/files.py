# SPDX-License-Identifier: Apache-2.0
"""A user's documents -> samples of one length, on which perplexity and fidelity are measured."""

from collections.abc import Iterable, Sequence

from modelopt_dms.data.records import Tokens

Samples = list[list[int]]


def cut_documents(documents: Iterable[Tokens], length: int, count: int) -> Samples:
    """The first `count` samples of exactly `length` tokens.

    Raises:
        ValueError: no document is long enough.
    """
    return cut_files([("", documents)], length, count)[0]


def cut_files(
    files: Sequence[tuple[str, Iterable[Tokens]]], length: int, count: int
) -> tuple[Samples, dict[str, str]]:
    """The first `count` samples of exactly `length` tokens of several files, and which files have none, and why.

    Args:
        files: names and documents.
        length: tokens of a sample.
        count: samples, at most.

    Raises:
        ValueError: no document of any is long enough.
    """
    samples: Samples = []
    unused: dict[str, str] = {}
    longest = 0
    for name, documents in files:
        if len(samples) == count:
            unused[name] = f"all {count} samples were found before it"
            continue
        found, most = _cut(documents, length, count - len(samples))
        samples += found
        longest = max(longest, most)
        if not found:
            unused[name] = f"its longest document has {most} tokens"
    if not samples:
        names = ", ".join(name for name, _ in files if name)
        of = f" of {names}" if names else ""
        raise ValueError(
            f"no document{of} has {length} tokens, the longest has {longest}; choose shorter lengths"
        )
    return samples, unused


def _cut(documents: Iterable[Tokens], length: int, count: int) -> tuple[Samples, int]:
    """At most `count` samples, and the tokens of the longest document that was looked at."""
    samples: Samples = []
    longest = 0
    for ids in documents:
        longest = max(longest, len(ids))
        for start in range(0, len(ids) - length + 1, length):
            samples.append(ids[start : start + length].tolist())
            if len(samples) == count:
                return samples, longest
    return samples, longest
