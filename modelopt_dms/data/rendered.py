# SPDX-License-Identifier: Apache-2.0
"""Whether a chat template renders all that a chat says.

Every text of the chat gets a mark in its middle, all at once, and one rendering shows which marks arrive. Where one
does not, the template may still have read the text (a command such as /no_think), so the text is changed alone: if the
rendering stays the same, the template ignores it.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from modelopt_dms.data import DataError
from modelopt_dms.data.records import Message
from modelopt_dms.data.template import Template

# Fields about a message or a call, not of it: a template may ignore them.
_NAMES = """
role name id type index tool_call_id message_id parent_id model created created_at timestamp
language lang source weight train country state hashed_ip header turn_identifier finish_reason
"""
_ABOUT = frozenset(_NAMES.split())
_CALLS = "tool_calls"
_ABOUT_CALLS = frozenset(("id", "type", "index"))
_TAG = re.compile(r"<[^<>]*>")
# Parts of these types need another input than token ids.
_MEDIA = re.compile(r"image|audio|video|file")

Path = tuple[str | int, ...]


class NotRendered(DataError):
    """A chat template ignores a part of a chat, or prints the structure around it."""


@dataclass(frozen=True)
class Text:
    """A text of a message.

    Attributes:
        path: to it, from the message.
        start: of the part of it that is looked for; a thought in front of it is `chat`'s.
    """

    path: Path
    start: int = 0


def check_media(messages: Sequence[Message], label: str) -> None:
    """Refuse parts that are not text.

    Raises:
        DataError: names the part.
    """
    for index, message in enumerate(messages):
        content = message.get("content")
        for number, part in enumerate(content if isinstance(content, list) else []):
            where = f"{label}: messages[{index}].content[{number}]"
            if not isinstance(part, dict):
                raise DataError(f'{where} must be {{"type": "text", "text": ...}}')
            kind = str(part.get("type"))
            if _MEDIA.search(kind):
                raise DataError(f"{where} is of type {kind}; only text can be learned from")


def check_rendered(
    messages: Sequence[Message], template: Template, thoughts: Sequence[Text | None]
) -> str:
    """The text of messages, if all that they say is in it.

    Args:
        messages: plain JSON.
        template: for them.
        thoughts: for every message, the text that holds its thought, which need not be rendered, and where what follows
            the thought begins there; None without a thought.

    Raises:
        NotRendered: the template ignores a field; names it.
        DataError: the template refuses the messages.
    """
    text = template.render(messages)
    said = json.dumps(messages, ensure_ascii=False)
    mark = f"m{hashlib.sha256(said.encode()).hexdigest()[:12]}x"
    marked = list(messages)
    places: list[tuple[int, Text, str]] = []
    for index, (message, thought) in enumerate(zip(messages, thoughts, strict=True)):
        for found in _texts(message, thought):
            name = f"{mark}{len(places)}x"
            value = _at(marked[index], found.path)
            marked[index] = _put(
                marked[index],
                found.path,
                value[: found.start] + _insert(value[found.start :], name),
            )
            places.append((index, found, name))
    try:
        shown = template.render(marked)
    except DataError:
        shown = ""
    for index, found, name in places:
        if name not in shown:
            _check_read(messages, index, found, name, template, text)
    _check_others(messages, template, text, thoughts)
    _check_structures(messages, text, template.label)
    return text


def _check_read(
    messages: Sequence[Message],
    index: int,
    found: Text,
    mark: str,
    template: Template,
    text: str,
) -> None:
    """Refuse a text on which the template's output does not depend."""
    changed = list(messages)
    if found.path[0] == _CALLS and found.path[-1] == "name":
        # A call is read if anything of it is.
        calls = [x for i, x in enumerate(messages[index][_CALLS]) if i != found.path[1]]
        changed[index] = {**messages[index], _CALLS: calls}
    else:
        value = _at(messages[index], found.path)
        changed[index] = _put(messages[index], found.path, value[: found.start] + mark)
    _compare(changed, template, text, f"messages[{index}]{_name(found.path)}")


def _check_others(
    messages: Sequence[Message], template: Template, text: str, thoughts: Sequence[Text | None]
) -> None:
    """Refuse fields without any text in them, such as lists of numbers, that the template ignores."""
    for index, (message, thought) in enumerate(zip(messages, thoughts, strict=True)):
        seen = {x.path[0] for x in _texts(message, thought)}
        for name, value in message.items():
            own = thought is not None and thought.path[0] == name
            plain = isinstance(value, str | bool | int | float) or not value
            if name in _ABOUT or name in seen or own or plain:
                continue
            changed = list(messages)
            changed[index] = {k: v for k, v in message.items() if k != name}
            _compare(changed, template, text, f"messages[{index}].{name}")


def _compare(changed: Sequence[Message], template: Template, text: str, where: str) -> None:
    try:
        same = template.render(changed) == text
    except DataError:
        same = False
    if same:
        raise NotRendered(
            f"{template.label}: the tokenizer's chat_template ignores {where}; put it where the template reads it, "
            "or remove it"
        )


def _check_structures(messages: Sequence[Message], text: str, label: str) -> None:
    """Refuse a list or mapping that stands in the text as Python prints it, or parts of a content as JSON."""
    for index, message in enumerate(messages):
        content = message.get("content")
        values = [] if isinstance(content, str) else [(content, ".content")]
        for number, call in enumerate(_calls(message)):
            function = call.get("function", call)
            if isinstance(function, dict):
                where = f".{_CALLS}[{number}].function.arguments"
                values.append((function.get("arguments"), where))
        for value, where in values:
            printed = [str(value)] if isinstance(value, list | dict) and value else []
            if isinstance(value, list):
                printed += [f(x) for x in value if isinstance(x, dict) for f in (str, _json)]
            if any(x in text and (x != _json(value)) for x in printed):
                raise NotRendered(
                    f"{label}: the tokenizer's chat_template prints messages[{index}]{where} as a "
                    f"{type(value).__name__}; pass it as text"
                )


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _calls(message: Message) -> list[Any]:
    calls = message.get(_CALLS)
    return [x for x in calls if isinstance(x, dict)] if isinstance(calls, list) else []


def _texts(message: Message, thought: Text | None) -> Iterator[Text]:
    """The texts of a message that a template has to render."""
    for name, value in message.items():
        if name in _ABOUT:
            continue
        if thought is not None and thought.path == (name,):
            if name == "content" and value[thought.start :].strip():
                yield thought
            continue
        # Some data have the same thought under several names.
        if thought is not None and name != "content" and value == _at(message, thought.path):
            continue
        skipped = _ABOUT_CALLS if name == _CALLS else frozenset(("type",))
        yield from (Text((name, *path)) for path in _leaves(value, skipped))


def _leaves(value: Any, skipped: frozenset[str]) -> Iterator[Path]:
    """Paths of the texts in a value that are more than spaces."""
    if isinstance(value, str):
        if value.strip():
            yield ()
        return
    items: Iterator[tuple[str | int, Any]] = iter(())
    if isinstance(value, dict):
        items = ((k, x) for k, x in value.items() if k not in skipped)
    elif isinstance(value, list):
        items = iter(enumerate(value))
    for key, inner in items:
        yield from ((key, *path) for path in _leaves(inner, skipped))


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def _put(value: Any, path: Path, new: str) -> Any:
    """A copy of a value with another text at a path."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = _put(value[path[0]], path[1:], new)
    return copy


def _insert(text: str, mark: str) -> str:
    """A text with a mark inside, where it is least likely to break a tag or a word that a template looks for."""
    start, end = 0, len(text)
    borders = [(x.start(), x.end()) for x in _TAG.finditer(text)]
    gaps = zip([0, *(x[1] for x in borders)], [*(x[0] for x in borders), len(text)], strict=True)
    start, end = max(gaps, key=lambda x: len(text[x[0] : x[1]].strip()))
    middle = (start + end) // 2
    space = text.find(" ", middle, end)
    place = middle if space < 0 else space
    return text[:place] + mark + text[place:]


def _name(path: Path) -> str:
    """A path as people write it; a call for its name."""
    if path[0] == _CALLS and path[-1] == "name":
        path = path[:2]
    return "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in path)
