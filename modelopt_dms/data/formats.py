# SPDX-License-Identifier: Apache-2.0
"""Records of other projects' formats -> records with `COLUMNS`.

sharegpt           conversations: [{"from": "human", "value": ...}, ...], and perhaps system
alpaca             instruction, input and output
prompt-completion  prompt and completion, texts or lists of messages
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from modelopt_dms.data import DataError

# What a record may hold, the most finished form first.
COLUMNS = ("input_ids", "messages", "text")
SUFFIXES = (".jsonl", ".txt", ".parquet")

# Their value is the JSON of a call.
_CALLERS = ("function_call", "tool_call")
_SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    **dict.fromkeys(_CALLERS, "assistant"),
}


def _call(value: Any, where: str) -> dict[str, Any]:
    """A call of a tool that is written as JSON."""
    try:
        function = json.loads(value)
    except (TypeError, ValueError, RecursionError):
        function = None
    if not isinstance(function, dict) or "name" not in function:
        raise DataError(f'{where} must be the JSON of {{"name": ..., "arguments": ...}}')
    return {"type": "function", "function": function}


def _sharegpt(record: Mapping[str, Any], label: str) -> dict[str, Any]:
    turns = record["conversations"]
    if isinstance(turns, str) or not hasattr(turns, "__iter__"):
        raise DataError(f'{label}: conversations must be a list of {{"from": ..., "value": ...}}')
    messages = []
    for index, turn in enumerate(turns):
        where = f"{label}: conversations[{index}]"
        if not isinstance(turn, Mapping):
            raise DataError(f'{where} must be {{"from": ..., "value": ...}}')
        speaker = turn.get("from") or turn.get("role")
        if speaker not in _SPEAKERS:
            raise DataError(
                f"{where}.from is {speaker!r:.40}; expected one of {', '.join(_SPEAKERS)}"
            )
        rest = {k: v for k, v in turn.items() if k not in ("from", "role", "value")}
        if speaker in _CALLERS:
            rest["tool_calls"] = [_call(turn.get("value"), f"{where}.value")]
        elif turn.get("value") is not None:
            rest["content"] = turn["value"]
        messages.append({"role": _SPEAKERS[speaker], **rest})
    others = {k: v for k, v in record.items() if k not in ("conversations", "system")}
    if record.get("system"):
        messages.insert(0, {"role": "system", "content": record["system"]})
    return {**others, "messages": messages}


def _alpaca(record: Mapping[str, Any], label: str) -> dict[str, Any]:
    for name in ("instruction", "input", "output"):
        if not isinstance(record.get(name, ""), str | None):
            kind = type(record[name]).__name__
            raise DataError(f"{label}: {name} is a {kind}; expected a string")
    if not record["instruction"] or record["output"] is None:
        raise DataError(f"{label}: instruction or output is empty")
    question = record["instruction"]
    if record.get("input"):
        question = f"{question}\n\n{record['input']}"
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": record["output"]},
    ]
    if record.get("system"):
        messages.insert(0, {"role": "system", "content": record["system"]})
    return {"messages": messages}


def _prompt_completion(record: Mapping[str, Any], label: str) -> dict[str, Any]:
    prompt, completion = record["prompt"], record["completion"]
    others = {k: v for k, v in record.items() if k not in ("prompt", "completion")}
    if isinstance(prompt, str) and isinstance(completion, str):
        return {"text": prompt + completion}
    if isinstance(prompt, str | None) or isinstance(completion, str | None):
        raise DataError(
            f"{label}: prompt and completion must be two texts or two lists of messages"
        )
    return {**others, "messages": [*prompt, *completion]}


# Columns of data that have neither our names nor a format's.
_ASKED = ("prompt", "instruction", "question", "query")
_ANSWERED = ("completion", "response", "answer", "output", "chosen")
_TEXTS = ("content", "document", "article", "body", "raw_content")
# By name: the columns by which a record is known, and what reads it.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any], str], dict[str, Any]]]] = {
    "sharegpt": (("conversations",), _sharegpt),
    "alpaca": (("instruction", "output"), _alpaca),
    "prompt-completion": (("prompt", "completion"), _prompt_completion),
}


def check_format(name: str) -> str:
    """The name of a format, if it is one.

    Raises:
        DataError: it is none.
    """
    if name not in FORMATS:
        raise DataError(f"format={name!r:.40} is unknown; expected one of {', '.join(FORMATS)}")
    return name


def convert(record: Any, format: str, label: str) -> Any:
    """A record of a format as one with `COLUMNS`.

    Raises:
        DataError: it is of another format; names the record and the field.
    """
    columns, read = FORMATS[format]
    if not isinstance(record, Mapping) or not all(x in record for x in columns):
        names = ", ".join(map(str, record)) if isinstance(record, Mapping) else "no"
        raise DataError(
            f"{label} has columns {names or '(none)'}; format={format} expects {', '.join(columns)}"
        )
    return read(record, label)


def explain_columns(names: Mapping[str, Any] | list[str]) -> str:
    """Why a record or table with these columns, none of `COLUMNS` with a value, cannot be read; and what reads it."""
    empty = [x for x in COLUMNS if x in names]
    if empty:
        return f"has nothing but null in {', '.join(empty)}"
    found = f"has columns {', '.join(map(str, names)) or '(none)'}; expected one of {', '.join(COLUMNS)}"
    for name, (columns, _) in FORMATS.items():
        if all(x in names for x in columns):
            return f'{found}, or say that it is {name}: --format {name}, in Python dms.Formatted(data, "{name}")'
    asked = next((x for x in _ASKED if x in names), None)
    answered = next((x for x in _ANSWERED if x in names), None)
    if asked and answered:
        change = f"{{prompt: .{asked}, completion: .{answered}}}"
        return f"{found}; `jq -c '{change}' FILE` makes records for --format prompt-completion"
    for said, name in (("conversation", "messages"), *((x, "text") for x in _TEXTS)):
        if said in names:
            return f"{found}; `jq -c '{{{name}: .{said}}}' FILE` makes such records"
    return found
