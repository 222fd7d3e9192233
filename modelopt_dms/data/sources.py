# SPDX-License-Identifier: Apache-2.0
"""Blends: several sources of documents, each with its share of the tokens. Knows no packing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.data.documents import Documents, open_documents
from modelopt_dms.data.inputs import Blend, name_of
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
