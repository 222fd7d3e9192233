# SPDX-License-Identifier: Apache-2.0
"""From what a user has (texts, chats, token ids, datasets, files) to documents of token ids. Knows no training."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.data.chat import render_chat
from modelopt_dms.data.errors import DataError
from modelopt_dms.data.files import SUFFIXES, choose_column, read_files

KINDS = (
    "a datasets.Dataset with a column input_ids, messages or text; a list of strings, of chat records "
    '{"messages": [...]} or of token-id lists; or paths of .jsonl, .txt or .parquet files'
)
ACCEPTED = f"{KINDS}; or a Blend of these"

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Documents:
    """Documents of token ids, tokenized when asked for. A record is one document, or several if it is a chat.

    Attributes:
        records: strings, mappings with one of `files.COLUMNS`, or sequences of token ids.
        labels: where each record came from, for messages ("notes.jsonl:17"); "<name>[i]" if empty.
        tokenizer: for records that are not token ids yet.
        vocabulary: rows of the model's embedding; no id may reach it. None if there is no model yet.
        name: of the whole, for messages.
    """

    records: Sequence[Any]
    labels: Sequence[str]
    tokenizer: PreTrainedTokenizerBase | None
    vocabulary: int | None
    name: str = "data"

    def __len__(self) -> int:
        """Number of records."""
        return len(self.records)

    def __iter__(self) -> Iterator[Tokens]:
        """All documents in the order of the records."""
        return self.of(range(len(self)))

    def shuffled(self, seed: int, stream: int = 0) -> Iterator[Tokens]:
        """All documents, records in an order fixed by the seed and the number of a stream."""
        return self.of(np.random.default_rng([seed, 0, 0, stream]).permutation(len(self)))

    def of(self, indices: Iterable[Any]) -> Iterator[Tokens]:
        """The documents, token ids [L] each, of records at these indices.

        Raises:
            DataError: a record is not usable; names it.
        """
        for index in map(int, indices):
            label = self.labels[index] if self.labels else f"{self.name}[{index}]"
            for ids in _documents(self.records[index], self.tokenizer, label):
                self._check(ids, label)
                yield ids

    def _check(self, ids: Tokens, label: str) -> None:
        if not len(ids):
            return
        if ids.min() < 0:
            raise DataError(f"{label} holds token id {ids.min()}; expected 0 or more")
        if self.vocabulary is not None and ids.max() >= self.vocabulary:
            raise DataError(
                f"{label} holds token id {ids.max()}, but the model's embedding has {self.vocabulary} rows"
            )


def open_documents(
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel | None,
    name: str = "data",
) -> Documents:
    """Documents of any accepted kind of data; reads files, tokenizes nothing yet.

    Args:
        data: see `KINDS`. A .txt file is one document.
        tokenizer: needed unless the data are token ids.
        model: whose vocabulary the ids must fit, if there is one yet.
        name: of the data, for messages.

    Raises:
        DataError: missing, empty or unreadable data, an unknown column, a tokenizer of another model.
    """
    rows = None
    if model is not None:
        rows = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    if rows is not None and tokenizer is not None and len(tokenizer) > rows:
        raise DataError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's embedding has {rows} rows: "
            "they do not belong together"
        )
    records, labels = open_records(data, name)
    return Documents(records, labels, tokenizer, rows, name)


def open_records(data: Any, name: str = "data") -> tuple[Sequence[Any], list[str]]:
    """Records of any accepted kind of data, at least one, and their labels if they came from files.

    Raises:
        DataError: missing, empty or unreadable data, an unknown column.
    """
    records, labels = _records(data, name)
    if not len(records):
        raise DataError(f"{name} is empty; expected at least one document")
    return records, labels


def _records(data: Any, name: str) -> tuple[Sequence[Any], list[str]]:
    if data is None:
        raise DataError(f"{name} is missing; expected {KINDS}")
    if isinstance(data, Dataset):
        return data.select_columns([choose_column(data.column_names, "the dataset")]), []
    if isinstance(data, DatasetDict):
        raise DataError(
            f"{name} is a DatasetDict; pass one of its splits: {', '.join(map(str, data))}"
        )
    if isinstance(data, IterableDataset):
        raise DataError(
            f"{name} is a streaming dataset; pass a part of it as Dataset, for example list(data.take(10000))"
        )
    paths = as_paths(data)
    if paths:
        return read_files(paths)
    if not isinstance(data, Sequence):
        raise DataError(f"{name} is a {type(data).__name__}; expected {KINDS}")
    return data, []


def as_paths(data: Any) -> list[Path]:
    """The files that data are, if they are files and not yet texts."""
    if isinstance(data, str | Path):
        return [Path(data)]
    if isinstance(data, Sequence) and data and all(_is_path(item) for item in data):
        return [Path(item) for item in data]
    return []


def _is_path(item: Any) -> bool:
    return isinstance(item, Path) or (
        isinstance(item, str) and "\n" not in item and item.endswith(SUFFIXES)
    )


def _documents(
    record: Any, tokenizer: PreTrainedTokenizerBase | None, label: str
) -> Iterator[Tokens]:
    """Token ids [L] of a string, a mapping with one of `COLUMNS`, or a sequence of ids; one a text for a chat."""
    column = choose_column(list(record), label) if isinstance(record, Mapping) else None
    if column == "messages":
        for text in render_chat(record[column], tokenizer, label):
            yield tokenize(text, tokenizer, label, special=False)
        return
    content = record if column is None else record[column]
    if column == "text" and not isinstance(content, str):
        raise DataError(f"{label}: text is a {type(content).__name__}; expected a string")
    if isinstance(content, str):
        yield tokenize(content, tokenizer, label, special=True)
    else:
        yield check_ids(content, label)


def check_ids(values: Any, label: str) -> Tokens:
    """Token ids [L] from a sequence of integers.

    Raises:
        DataError: it is something else.
    """
    ids = np.asarray(values) if not isinstance(values, bytes) else np.asarray(None)
    if ids.ndim == 1 and ids.size == 0:
        return ids.astype(np.int32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DataError(
            f"{label} is a {type(values).__name__} that is neither text, chat nor token ids"
        )
    return ids.astype(np.int32)


def tokenize(
    text: str, tokenizer: PreTrainedTokenizerBase | None, label: str, *, special: bool
) -> Tokens:
    """Token ids [L] of a text.

    Args:
        text: of any length.
        tokenizer: the model's.
        label: names the text in messages.
        special: whether the tokenizer adds its special tokens; a rendered chat has them already.

    Raises:
        DataError: there is no tokenizer.
    """
    if tokenizer is None:
        raise DataError(
            f"{label} is text, but there is no tokenizer; pass tokenizer=... or token ids"
        )
    # verbose=False: longer than the model's maximum is fine, packing cuts it.
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int32)
