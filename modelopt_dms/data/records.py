# SPDX-License-Identifier: Apache-2.0
"""One record -> what it holds: token ids, a text, or a chat.

A null is the same as no key: Arrow gives every row the keys of all rows, so that a parquet file and a JSONL file of the
same rows differ in their nulls.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelopt_dms.data import DataError
from modelopt_dms.data.formats import COLUMNS, explain_columns

Tokens = NDArray[np.int32]
Message = dict[str, Any]

# Nothing that people write by hand or that a model calls is deeper.
_DEEPEST = 100


@dataclass(frozen=True)
class Chat:
    """A chat and what else its record says.

    Attributes:
        messages: [{"role": ..., "content": ...}, ...], plain JSON without nulls.
        columns: the record's other columns that are not null, as they came.
    """

    messages: list[Message]
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class Ids:
    """Token ids of a record, one array [L] a document."""

    documents: tuple[Tokens, ...]


def read_record(record: Any, label: str) -> Ids | str | Chat:
    """What a record holds: a string, a sequence of ids, or a mapping with one of `COLUMNS` that is not null.

    Raises:
        DataError: it holds nothing that we know; names the record and the field.
    """
    if isinstance(record, str):
        return plain(record, label)
    if not isinstance(record, Mapping):
        return Ids((check_ids(record, label),))
    held = {name: value for name, value in record.items() if value is not None}
    column = next((name for name in COLUMNS if name in held), None)
    if column is None:
        raise DataError(f"{label} {explain_columns(record)}")
    content = held.pop(column)
    if column == "input_ids":
        return Ids(tuple(_documents(check_ids(content, f"{label}: input_ids"), held, label)))
    if column == "text":
        if not isinstance(content, str):
            raise DataError(f"{label}: text is a {type(content).__name__}; expected a string")
        return str(plain(content, f"{label}: text"))
    return Chat(_messages(content, label), held)


def check_ids(values: Any, label: str) -> Tokens:
    """Token ids [L] from a sequence of integers, each from 0 to 2**31 - 1.

    Raises:
        DataError: it is something else.
    """
    # Among integers, numpy takes True for 1.
    if isinstance(values, list | tuple) and {bool, np.bool_} & set(map(type, values)):
        index, value = next((i, x) for i, x in enumerate(values) if isinstance(x, bool | np.bool_))
        raise DataError(f"{label}[{index}] is {str(value).lower()}; expected a token id")
    if isinstance(values, str | bytes | Mapping):
        ids = np.asarray(None)
    else:
        try:
            ids = np.asarray(values)
        except (ValueError, TypeError, RuntimeError):
            ids = np.asarray(None)
    if ids.ndim == 1 and ids.size == 0:
        return ids.astype(np.int32)
    if ids.ndim == 1 and ids.dtype.kind in "Of":
        for index, value in enumerate(ids.tolist()):
            if value is None or (isinstance(value, int) and not -(2**63) <= value < 2**63):
                raise DataError(f"{label}[{index}] is {value}; expected a token id")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DataError(
            f"{label} is a {type(values).__name__} that is neither text, chat nor token ids"
        )
    if ids.min() < 0:
        raise DataError(f"{label} holds token id {ids.min()}; expected 0 or more")
    if ids.max() >= 2**31:
        raise DataError(f"{label} holds token id {ids.max()}; expected less than 2**31")
    return ids.astype(np.int32)


def plain(value: Any, where: str, depth: int = 0) -> Any:
    """A value as plain JSON without nulls: texts, numbers, lists, and mappings, which lose keys whose value is null.

    Raises:
        DataError: it holds anything else, or text that is not Unicode; names where.
    """
    if depth > _DEEPEST:
        raise DataError(f"{where[:120]} is nested deeper than {_DEEPEST}")
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where} holds half of a character, \\u{ord(value[error.start]):04x} at {error.start}: it was cut "
                "inside a surrogate pair; remove it"
            ) from error
        return value
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {
            plain(str(key), where, depth): plain(x, f"{where}.{key}", depth + 1)
            for key, x in value.items()
            if x is not None
        }
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [plain(x, f"{where}[{i}]", depth + 1) for i, x in enumerate(value)]
    raise DataError(
        f"{where} is a {type(value).__name__}; expected text, numbers, lists or mappings"
    )


def from_json(value: Any, where: str) -> Any:
    """The same, of a value that may be written as JSON in a string, as in columns of parquet files.

    Raises:
        DataError: a string that is not JSON of a list or mapping.
    """
    if not isinstance(value, str):
        return plain(value, where)
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list | dict):
        raise DataError(f"{where} is the string {value!r:.60}; expected a list or a mapping")
    return plain(found, where)


def _messages(content: Any, label: str) -> list[Message]:
    where = f"{label}: messages"
    messages = from_json(content, where)
    if not isinstance(messages, list) or not all(
        isinstance(x, dict) and isinstance(x.get("role"), str) for x in messages
    ):
        hint = ""
        if isinstance(messages, list) and all(
            isinstance(x, dict) and {"from", "value"} <= x.keys() for x in messages
        ):
            change = "`jq -c '{conversations: .messages}' FILE`"
            hint = f"; these are ShareGPT's: {change} makes records for --format sharegpt"
        raise DataError(f'{where} must be a list of {{"role": ..., "content": ...}}{hint}')
    if not messages:
        raise DataError(f"{where} is empty; expected at least one message")
    for index, message in enumerate(messages):
        if len(message.keys() - {"role", "name", "id"}) == 0:
            raise DataError(f"{where}[{index}] has no content; expected text, or leave it out")
        if not isinstance(message.get("content", ""), str | list | dict):
            kind = type(message["content"]).__name__
            raise DataError(
                f"{where}[{index}].content is a {kind}; expected text or a list of parts"
            )
    return messages


def _documents(ids: Tokens, columns: Mapping[str, Any], label: str) -> list[Tokens]:
    """The documents of a row of ids: without padding, and apart if the row says that it is packed."""
    kept = np.ones(len(ids), bool)
    if "attention_mask" in columns:
        kept = _mask(columns["attention_mask"], len(ids), f"{label}: attention_mask")
    starts: list[int] = [0]
    if "seq_lengths" in columns:
        lengths = check_ids(columns["seq_lengths"], f"{label}: seq_lengths")
        if int(lengths.sum()) != len(ids):
            raise DataError(
                f"{label}: seq_lengths sum to {lengths.sum()}, but there are {len(ids)} input_ids"
            )
        starts = [0, *np.cumsum(lengths)[:-1].tolist()]
    elif "position_ids" in columns:
        starts = _starts(columns["position_ids"], kept, f"{label}: position_ids")
    pieces = zip(np.split(ids, starts[1:]), np.split(kept, starts[1:]), strict=True)
    return [piece[mask] for piece, mask in pieces]


def _mask(values: Any, length: int, label: str) -> NDArray[np.bool_]:
    mask = np.asarray(values)
    if mask.shape != (length,) or not np.isin(mask, (0, 1)).all():
        raise DataError(
            f"{label} must be {length} zeros and ones, as many as there are input_ids"
            + ("" if mask.shape == (length,) else f"; it has shape {list(mask.shape)}")
        )
    seen = np.flatnonzero(mask)
    if len(seen) and seen[-1] - seen[0] + 1 != len(seen):
        hole = seen[0] + int(np.argmin(mask[seen[0] :]))
        raise DataError(f"{label}[{hole}] is 0 between ones; expected padding at the ends only")
    return mask.astype(bool)


def _starts(values: Any, kept: NDArray[np.bool_], label: str) -> list[int]:
    """Where documents begin by position_ids, which count up in each of them; those of padding do not matter."""
    positions = check_ids(values, label)
    if len(positions) != len(kept):
        raise DataError(f"{label} are {len(positions)}, but there are {len(kept)} input_ids")
    seen = np.flatnonzero(kept)
    inner = seen[1:]
    breaks = inner[positions[inner] != positions[inner - 1] + 1]
    for place in breaks:
        if positions[place] != 0:
            raise DataError(
                f"{label}[{place}] is {positions[place]} after {positions[place - 1]}; expected counts from 0 in "
                "every document"
            )
    return [0, *breaks.tolist()]
