# SPDX-License-Identifier: Apache-2.0
"""Files of .jsonl, .txt and .parquet -> records, each with a label that says where it stood. Knows no tokenizers."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from modelopt_dms.data.errors import DataError

# What a record may hold, the most finished form first.
COLUMNS = ("input_ids", "messages", "text")
SUFFIXES = (".jsonl", ".txt", ".parquet")


def choose_column(names: Sequence[str], where: str) -> str:
    """The most finished of the columns that a record or a table has.

    Raises:
        DataError: it has none that we know.
    """
    found = next((column for column in COLUMNS if column in names), None)
    if found is None:
        raise DataError(
            f"{where} has columns {', '.join(names) or '(none)'}; expected one of {', '.join(COLUMNS)}"
        )
    return found


def read_files(paths: Sequence[Path]) -> tuple[list[Any], list[str]]:
    """Records of all files, and their labels ("notes.jsonl:17").

    Raises:
        DataError: a file is missing, of another kind, or damaged.
    """
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
            column = choose_column(table.schema_arrow.names, str(path))
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
