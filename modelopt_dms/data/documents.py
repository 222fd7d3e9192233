# SPDX-License-Identifier: Apache-2.0
"""From what a user has (texts, chats, token ids, datasets, files) to documents of token ids. Knows no training."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, DatasetDict, IterableDataset
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What a record may hold, the most finished form first.
COLUMNS = ("input_ids", "messages", "text")
SUFFIXES = (".jsonl", ".txt", ".parquet")
ACCEPTED = (
    "a datasets.Dataset with a column input_ids, messages or text; a list of strings, of chat records "
    '{"messages": [...]} or of token-id lists; or paths of .jsonl, .txt or .parquet files'
)

Tokens = NDArray[np.int32]


class DataError(ValueError):
    """Training data that cannot be used; the message says which item and why."""


@dataclass(frozen=True)
class Documents(Sequence[Tokens]):
    """Documents of token ids, tokenized when asked for.

    Attributes:
        records: strings, mappings with one of `COLUMNS`, or sequences of token ids.
        labels: where each record came from, for messages ("notes.jsonl:17"); "data[i]" if empty.
        tokenizer: for records that are not token ids yet.
        vocabulary: rows of the model's embedding; no id may reach it.
    """

    records: Sequence[Any]
    labels: Sequence[str]
    tokenizer: PreTrainedTokenizerBase | None
    vocabulary: int

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Tokens: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tokens]: ...
    def __getitem__(self, index: int | slice) -> Tokens | list[Tokens]:
        """Token ids [L] of one document.

        Raises:
            DataError: the record is not usable; names it.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        label = self.labels[index] if self.labels else f"data[{index}]"
        ids = _token_ids(self.records[index], self.tokenizer, label)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocabulary:
            raise DataError(
                f"{label} holds token id {ids.max() if ids.max() >= self.vocabulary else ids.min()}, but the model's "
                f"embedding has {self.vocabulary} rows"
            )
        return ids


def open_documents(
    data: Any, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel
) -> Documents:
    """Documents of any accepted kind of data; reads files, tokenizes nothing yet.

    Args:
        data: see `ACCEPTED`. A .txt file is one document.
        tokenizer: needed unless the data are token ids.
        model: whose vocabulary the ids must fit.

    Raises:
        DataError: missing, empty or unreadable data, an unknown column, a tokenizer of another model.
    """
    rows = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    if tokenizer is not None and len(tokenizer) > rows:
        raise DataError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's embedding has {rows} rows: "
            "they do not belong together"
        )
    records, labels = _records(data)
    if not len(records):
        raise DataError("data is empty; expected at least one document")
    return Documents(records, labels, tokenizer, rows)


def _records(data: Any) -> tuple[Sequence[Any], list[str]]:
    """Records of any accepted kind of data, and their labels if they came from files."""
    if data is None:
        raise DataError(f"data is missing; expected {ACCEPTED}")
    if isinstance(data, Dataset):
        return data.select_columns([_column(data.column_names, "the dataset")]), []
    if isinstance(data, DatasetDict):
        raise DataError(
            f"data is a DatasetDict; pass one of its splits: {', '.join(map(str, data))}"
        )
    if isinstance(data, IterableDataset):
        raise DataError(
            "data is a streaming dataset; pass a part of it as Dataset, for example list(data.take(10000))"
        )
    if isinstance(data, str | Path):
        return _read_files([Path(data)])
    if not isinstance(data, Sequence):
        raise DataError(f"data is a {type(data).__name__}; expected {ACCEPTED}")
    if data and all(_is_path(item) for item in data):
        return _read_files([Path(item) for item in data])
    return data, []


def _column(names: Sequence[str], where: str) -> str:
    found = next((column for column in COLUMNS if column in names), None)
    if found is None:
        raise DataError(
            f"{where} has columns {', '.join(names) or '(none)'}; expected one of {', '.join(COLUMNS)}"
        )
    return found


def _is_path(item: Any) -> bool:
    return isinstance(item, Path) or (
        isinstance(item, str) and "\n" not in item and item.endswith(SUFFIXES)
    )


def _read_files(paths: list[Path]) -> tuple[list[Any], list[str]]:
    records: list[Any] = []
    labels: list[str] = []
    for path in paths:
        for record, label in _read_file(path):
            records.append(record)
            labels.append(label)
    return records, labels


def _read_file(path: Path) -> Iterator[tuple[Any, str]]:
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"{str(path)[:80]} is not a {', '.join(SUFFIXES)} file; pass texts as a list of strings"
        )
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file")
    try:
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path)
        elif path.suffix == ".parquet":
            table = pq.ParquetFile(path)
            column = _column(table.schema_arrow.names, str(path))
            values = table.read([column])[column].to_pylist()
            yield from (
                (x, f"{path} row {i}") for i, x in enumerate({column: value} for value in values)
            )
        else:
            yield path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _read_jsonl(path: Path) -> Iterator[tuple[Any, str]]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line), f"{path}:{number}"
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number} is not JSON: {error}") from error


def _token_ids(record: Any, tokenizer: PreTrainedTokenizerBase | None, label: str) -> Tokens:
    """Token ids [L] of a string, a mapping with one of `COLUMNS`, or a sequence of ids."""
    if isinstance(record, str):
        return _tokenize(record, tokenizer, label, special=True)
    if isinstance(record, Mapping):
        column = _column(list(record), label)
        value = record[column]
        if column == "messages":
            return _tokenize(_chat(value, tokenizer, label), tokenizer, label, special=False)
        if column == "text" and not isinstance(value, str):
            raise DataError(f"{label}: text is a {type(value).__name__}; expected a string")
        return _token_ids(value, tokenizer, label)
    ids = np.asarray(record) if not isinstance(record, bytes) else np.asarray(None)
    if ids.ndim == 1 and ids.size == 0:
        return ids.astype(np.int32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DataError(
            f"{label} is a {type(record).__name__} that is neither text, chat nor token ids"
        )
    return ids.astype(np.int32)


def _tokenize(
    text: str, tokenizer: PreTrainedTokenizerBase | None, label: str, *, special: bool
) -> Tokens:
    if tokenizer is None:
        raise DataError(
            f"{label} is text, but there is no tokenizer; pass tokenizer=... or token ids"
        )
    # verbose=False: longer than the model's maximum is fine, packing cuts it.
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return np.asarray(ids, dtype=np.int32)


def _chat(messages: Any, tokenizer: PreTrainedTokenizerBase | None, label: str) -> str:
    if tokenizer is None:
        raise DataError(
            f"{label} is a chat record, but there is no tokenizer; pass tokenizer=... or token ids"
        )
    if tokenizer.chat_template is None:
        raise DataError(
            f"{label} is a chat record, but the tokenizer has no chat_template; pass texts instead"
        )
    if not isinstance(messages, Sequence) or not all(
        isinstance(x, Mapping) and "role" in x for x in messages
    ):
        raise DataError(f'{label}: messages must be a list of {{"role": ..., "content": ...}}')
    return cast(str, tokenizer.apply_chat_template(list(messages), tokenize=False))
