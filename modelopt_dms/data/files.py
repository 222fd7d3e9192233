# SPDX-License-Identifier: Apache-2.0
"""Files of .jsonl, .txt and .parquet -> records, each with a label that says where it stood."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelopt_dms.data import DataError
from modelopt_dms.data.formats import COLUMNS, FORMATS, SUFFIXES, convert, explain_columns
from modelopt_dms.data.records import read_record

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

# Columns that a record of ids or texts is read with; a chat's template may take any.
_BESIDE = ("attention_mask", "position_ids", "seq_lengths")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_GZIP = b"\x1f\x8b"
# Records that are read before anything else happens.
_CHECKED = 100


def choose_columns(names: Sequence[str], where: str, format: str | None = None) -> list[str]:
    """The columns of a table that are read; `where` names the table in messages, `format` is one of `FORMATS`.

    Raises:
        DataError: it has none that we know.
    """
    wanted = COLUMNS if format is None else FORMATS[format][0]
    found = [x for x in wanted if x in names]
    if format is not None and len(found) < len(wanted):
        raise DataError(
            f"{where} has columns {', '.join(names)}; format={format} expects {', '.join(wanted)}"
        )
    if not found:
        raise DataError(f"{where} {explain_columns(list(names))}")
    if format is not None or "messages" in found:
        return list(names)
    return [*found, *(x for x in _BESIDE if x in names)]


def read_files(paths: Sequence[Path], format: str | None = None) -> tuple[list[Any], list[str]]:
    """Records of all files, and their labels ("notes.jsonl:17").

    Raises:
        DataError: a file is missing, of another kind, or damaged.
    """
    records: list[Any] = []
    labels: list[str] = []
    for path in paths:
        for record, label in _read_file(path, format):
            records.append(record)
            labels.append(label)
    return records, labels


def check_start(path: Path, format: str | None = None) -> None:
    """Refuse a file whose beginning cannot be read; for the command line, which asks before it loads a model.

    Raises:
        DataError: names the file, the record and the field.
    """
    if path.suffix == ".parquet" and path.is_file():
        _open_table(path, format)
        return
    for (record, label), _ in zip(_read_file(path, format), range(_CHECKED), strict=False):
        read_record(record if format is None else convert(record, format, label), label)


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a .parquet or .jsonl file, which must have these columns; others are left out.

    Raises:
        DataError: a column is missing, or the file is of another kind, or damaged.
    """
    if path.suffix not in (".parquet", ".jsonl"):
        raise DataError(f"{path} is not a .parquet or .jsonl file")
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file")
    if path.suffix == ".parquet":
        found = [row for row, _ in _rows(_parquet(path), list(columns), str(path))]
    else:
        found = [row for row, _ in _read_jsonl(path)]
    for number, row in enumerate(found):
        missing = [x for x in columns if not isinstance(row, dict) or x not in row]
        if missing:
            raise DataError(
                f"{path} row {number} has no {', '.join(missing)}; expects {', '.join(columns)}"
            )
    if not found:
        raise DataError(f"{path} has no rows")
    return [{name: row[name] for name in columns} for row in found]


def _read_file(path: Path, format: str | None) -> Iterator[tuple[Any, str]]:
    if path.suffix == ".json":
        raise DataError(
            f"{path} is not JSON lines; `jq -c '.[]' {path}` makes a .jsonl file of a list"
        )
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"{str(path)[:80]} is not a {', '.join(SUFFIXES)} file; from Python, texts may be a list of strings"
        )
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file")
    try:
        with path.open("rb") as file:
            start = file.read(2)
            if start == _GZIP:
                raise DataError(f"{path} is compressed by gzip; unpack it first")
            if start in _UTF16:
                raise DataError(
                    f"{path} is UTF-16; `iconv -f UTF-16 -t UTF-8 {path}` makes it UTF-8"
                )
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path)
        elif path.suffix == ".parquet":
            yield from _read_table(path, format)
        else:
            # utf-8-sig leaves out the mark that editors of Windows put in front.
            yield path.read_text(encoding="utf-8-sig"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _parquet(path: Path) -> "ParquetFile":
    # Imported late: pyarrow takes longer than all the rest.
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except (OSError, ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _open_table(path: Path, format: str | None) -> tuple["ParquetFile", list[str]]:
    """A parquet file, and the columns of it that are read."""
    file = _parquet(path)
    return file, choose_columns(file.schema_arrow.names, str(path), format)


def _read_table(path: Path, format: str | None) -> Iterator[tuple[Any, str]]:
    yield from _rows(*_open_table(path, format), str(path))


def _rows(file: "ParquetFile", columns: list[str], path: str) -> Iterator[tuple[Any, str]]:
    from pyarrow import ArrowException

    try:
        rows = file.read(columns).to_pylist(maps_as_pydicts="strict")
    except (OSError, ArrowException, KeyError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    for number, row in enumerate(rows):
        yield row, f"{path} row {number}"


def _read_jsonl(path: Path) -> Iterator[tuple[Any, str]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line, object_pairs_hook=_unique)
                if (
                    number == 1
                    and isinstance(record, list)
                    and isinstance((record or [0])[0], dict)
                ):
                    raise DataError(
                        f"holds a list of records; `jq -c '.[]' {path}` makes one record a line of it"
                    )
                yield record, f"{path}:{number}"
            except RecursionError:
                raise DataError(f"{path}:{number} is nested too deeply") from None
            except DataError as error:
                raise DataError(f"{path}:{number} {error}") from None
            # Not only JSONDecodeError: Python refuses numbers of thousands of digits with a plain one.
            except ValueError as error:
                raise DataError(f"{path}:{number} is not JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [x for x, _ in pairs]
        twice = next(x for x in names if names.count(x) > 1)
        raise DataError(f"has the key {twice!r:.40} twice in one mapping")
    return found
