# SPDX-License-Identifier: Apache-2.0
"""Perplexity on a user's own files, through the cache that `generate` uses."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.data.documents import open_documents
from modelopt_dms.data.inputs import Formatted
from modelopt_dms.data.records import Tokens
from modelopt_dms.evaluation.score import Row, perplexity


def score_files(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    files: Sequence[Path] | Formatted,
    lengths: Sequence[int],
    count: int,
) -> list[Row]:
    """Rows {task: "data", length, metric: "perplexity", value, ...}, one for each length; `count` samples each.

    Raises:
        ValueError: unusable files, or none has a document of that many tokens.
    """
    documents = open_documents(files, tokenizer, model)
    cut = {length: cut_documents(documents, length, count) for length in lengths}
    return [
        {"task": "data", "length": length, **perplexity(model, samples).row()}
        for length, samples in cut.items()
    ]


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
