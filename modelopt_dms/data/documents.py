# SPDX-License-Identifier: Apache-2.0
"""From what a user has (texts, chats, token ids, datasets, files) to documents of token ids."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from datasets import Dataset, DatasetDict, IterableDataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.data import DataError
from modelopt_dms.data.chat import render_chat, render_question
from modelopt_dms.data.files import choose_columns, read_files
from modelopt_dms.data.formats import convert
from modelopt_dms.data.inputs import Formatted, as_paths
from modelopt_dms.data.records import Chat, Ids, Tokens, read_record

KINDS = (
    "a datasets.Dataset with a column input_ids, messages or text; a list of strings, of chat records "
    '{"messages": [...]} or of token-id lists; or paths of .jsonl, .txt or .parquet files'
)
ACCEPTED = f"{KINDS}; `Formatted` of these if they are of another format; or a Blend"

# Characters that are tokenized together. Tokenizers take hundreds of bytes a character, and time that grows faster than
# the text.
LONGEST = 1_000_000
# Records from the start among which the first damaged one is looked for, when a later one was found to be.
_SEARCHED = 1000


@dataclass(frozen=True)
class Records:
    """What was opened, record by record.

    Attributes:
        rows: strings, mappings with one of `formats.COLUMNS`, or sequences of token ids.
        labels: where each record came from, for messages ("notes.jsonl:17"); "<name>[i]" if empty.
        format: of the rows, if it is another project's.
        name: of the whole, for messages.
    """

    rows: Sequence[Any]
    labels: Sequence[str] = ()
    format: str | None = None
    name: str = "data"

    def __len__(self) -> int:
        """Number of records."""
        return len(self.rows)

    def label(self, index: int) -> str:
        """Where a record came from."""
        return self.labels[index] if self.labels else f"{self.name}[{index}]"

    def read(self, index: int) -> Ids | str | Chat:
        """What a record holds.

        Raises:
            DataError: nothing that we know.
        """
        row, label = self.rows[index], self.label(index)
        if self.format is not None:
            row = convert(row, self.format, label)
        return read_record(row, label)


@dataclass(frozen=True)
class Documents:
    """Documents of token ids, tokenized when asked for.

    A record is one document; or several, if it is a chat whose template drops thoughts, a packed row of ids, or longer
    than `LONGEST`.

    Attributes:
        records: that the documents are made of.
        tokenizer: for records that are not token ids yet.
        vocabulary: rows of the model's embedding; no id may reach it. None if there is no model yet: then no id may
            be beyond the tokenizer's.
    """

    records: Records
    tokenizer: PreTrainedTokenizerBase | None
    vocabulary: int | None

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
            DataError: a record is not usable; names it, or the first one that is not.
        """
        for index in map(int, indices):
            try:
                yield from self._of_record(index)
            except DataError:
                # Records are read in any order, and who mends data does so from the start.
                for earlier in range(min(index, _SEARCHED)):
                    for _ in self._of_record(earlier):
                        pass
                raise

    def _of_record(self, index: int) -> Iterator[Tokens]:
        label = self.records.label(index)
        for ids in _documents(self.records.read(index), self.tokenizer, label):
            self._check(ids, label)
            yield ids

    def _check(self, ids: Tokens, label: str) -> None:
        known = None if self.tokenizer is None else len(self.tokenizer)
        limit = known if self.vocabulary is None else self.vocabulary
        if limit is None or not len(ids) or ids.max() < limit:
            return
        message = f"{label} holds token id {ids.max()}, but "
        if self.vocabulary is None:
            raise DataError(f"{message}the tokenizer has {known} tokens")
        message += f"the model's embedding has {limit} rows"
        if known is not None and known > limit:
            message += f"; the tokenizer has {known} tokens"
        raise DataError(message)


def open_documents(
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel | None,
    name: str = "data",
) -> Documents:
    """Documents of any accepted kind of data; reads files, tokenizes nothing yet.

    Args:
        data: see `KINDS`, or `Formatted`. A .txt file is one document.
        tokenizer: needed unless the data are token ids.
        model: whose vocabulary the ids must fit, if there is one yet.
        name: of the data, for messages.

    Raises:
        DataError: missing, empty or unreadable data, an unknown column, a tokenizer of another model.
    """
    rows = None
    if model is not None:
        rows = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    # Tokens that were added later may lie beyond the embedding: that is found where one is used.
    if rows is not None and tokenizer is not None and tokenizer.vocab_size > rows:
        raise DataError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's embedding has {rows} rows: "
            "they do not belong together"
        )
    return Documents(open_records(data, name), tokenizer, rows)


def open_records(data: Any, name: str = "data") -> Records:
    """Records of any accepted kind of data, at least one.

    Raises:
        DataError: missing, empty or unreadable data, an unknown column.
    """
    format = None
    if isinstance(data, Formatted):
        data, format = data.data, data.format
    records = _records(data, name, format)
    if not len(records):
        raise DataError(f"{name} is empty; expected at least one document")
    return records


def _records(data: Any, name: str, format: str | None) -> Records:
    if data is None:
        raise DataError(f"{name} is missing; expected {KINDS}")
    if isinstance(data, Dataset):
        columns = choose_columns(data.column_names, "the dataset", format)
        return Records(data.select_columns(columns), (), format, name)
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
        rows, labels = read_files(paths, format)
        return Records(rows, labels, format, name)
    if not isinstance(data, Sequence):
        raise DataError(f"{name} is a {type(data).__name__}; expected {KINDS}")
    return Records(data, (), format, name)


def _documents(
    content: Ids | str | Chat, tokenizer: PreTrainedTokenizerBase | None, label: str
) -> Iterator[Tokens]:
    """Token ids [L] of what a record holds."""
    if isinstance(content, Ids):
        yield from content.documents
        return
    if isinstance(content, str):
        yield from tokenize(content, tokenizer, label, special=True)
        return
    for text in render_chat(content, tokenizer, label):
        yield from tokenize(text, tokenizer, label, special=False)


def tokenize_prompts(
    prompts: Any, tokenizer: PreTrainedTokenizerBase, count: int | None
) -> list[Tokens]:
    """The token ids that each of `count` traces starts with.

    Raises:
        DataError: prompts are missing, empty or not usable; names which.
    """
    if count is not None and count < 1:
        raise DataError(f"count={count} must be at least 1")
    records = open_records(prompts, "prompts")
    wanted = len(records) if count is None else count
    starts = [_prompt(records, i, tokenizer) for i in range(min(wanted, len(records)))]
    return [starts[i % len(starts)] for i in range(wanted)]


def _prompt(records: Records, index: int, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    content, label = records.read(index), records.label(index)
    if isinstance(content, Ids):
        pieces = list(content.documents)
    elif isinstance(content, str):
        pieces = list(tokenize(content, tokenizer, label, special=True))
    else:
        text = render_question(content, tokenizer, label)
        pieces = list(tokenize(text, tokenizer, label, special=False))
    if len(pieces) > 1:
        raise DataError(f"{label} is {len(pieces)} documents; expected one to continue")
    if not len(pieces[0]):
        raise DataError(f"{label} is empty; expected something to continue")
    return pieces[0]


def tokenize(
    text: str, tokenizer: PreTrainedTokenizerBase | None, label: str, *, special: bool
) -> Iterator[Tokens]:
    """Token ids [L] of a text; of each part of it, if it is longer than `LONGEST`.

    A rendered chat has its `special` tokens already; to others the tokenizer adds them.

    Raises:
        DataError: there is no tokenizer.
    """
    if tokenizer is None:
        raise DataError(
            f"{label} is text, but there is no tokenizer; pass tokenizer=... or token ids"
        )
    for part in _parts(text):
        # verbose=False: longer than the model's maximum is fine, packing cuts it.
        ids = tokenizer(part, add_special_tokens=special, verbose=False)["input_ids"]
        yield np.asarray(ids, dtype=np.int32)


def _parts(text: str) -> Iterator[str]:
    """A text in parts of at most `LONGEST` characters, cut behind a line if there is one, else behind a space."""
    start = 0
    while len(text) - start > LONGEST:
        end = start + LONGEST
        middle = start + LONGEST // 2
        cut = text.rfind("\n", middle, end) + 1 or text.rfind(" ", middle, end) + 1 or end
        yield text[start:cut]
        start = cut
    yield text[start:]
