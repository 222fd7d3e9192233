# SPDX-License-Identifier: Apache-2.0
"""Chats -> texts in which every word of the chat stands, thoughts included.

Templates drop thoughts from history: Qwen3's keeps those after the last question, DeepSeek-R1's none. A chat whose
template does that becomes several texts, each ending with a turn whose thought was dropped, just as the model saw it
when it wrote that turn: earlier thoughts gone, its own there.

Templates also differ in the shape in which they read a content (text, or a list of parts) and the arguments of a call
(a mapping, or its JSON). A chat is rendered in the first shape of which the template loses nothing.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from transformers import PreTrainedTokenizerBase

from modelopt_dms.data import DataError
from modelopt_dms.data.records import Chat, Message
from modelopt_dms.data.rendered import NotRendered, Text, check_media, check_rendered
from modelopt_dms.data.template import Refused, Template

# Fields of a message that hold a thought, in the order in which transformers takes them; else it stands in the content,
# in front of </think>.
FIELDS = ("reasoning_content", "thinking", "reasoning")
_INLINE = re.compile(r"\s*(?:<think>)?(?P<thought>.*?)</think>", re.DOTALL)
# Names by which templates that can do both are told that the model shall think.
_THINKING = {"enable_thinking": True, "thinking": True}
# In place of a thought or an answer, to see what a template does with it; no chat contains it.
_MARK = "dms\u2060mark\u2060{}\u2060"

T = TypeVar("T")


class Thought(NamedTuple):
    """What an assistant thought, the message's field in which it stands, and what it answered then."""

    text: str
    field: str
    answer: str


def render_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase | None, label: str) -> list[str]:
    """The texts of one chat, earliest first; one, unless the template drops thoughts.

    Args:
        chat: a thought stands in a field of `FIELDS`, or in the content as <think>...</think>.
        tokenizer: has the template.
        label: names the chat in messages.

    Raises:
        DataError: no template, or one that fails, or that loses anything of the chat in any shape.
    """
    template = _open(chat, tokenizer, label)
    return _first_shape(chat.messages, lambda messages: _texts(messages, template))


def render_question(chat: Chat, tokenizer: PreTrainedTokenizerBase | None, label: str) -> str:
    """A chat up to where the assistant's next turn begins; turns of the assistant at its end are left out.

    Raises:
        DataError: as `render_chat`, or nobody but the assistant speaks.
    """
    template = _open(chat, tokenizer, label)
    messages = list(chat.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise DataError(f"{label}: messages hold nothing that could be answered")

    def ask(messages: list[Message]) -> str:
        _check(messages, template)
        return template.render(messages, ask=True)

    return _first_shape(messages, ask)


def _open(chat: Chat, tokenizer: PreTrainedTokenizerBase | None, label: str) -> Template:
    if tokenizer is None:
        raise DataError(
            f"{label} is a chat record, but there is no tokenizer; pass tokenizer=... or token ids"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{label} is a chat record, but the tokenizer has no chat_template; pass texts instead"
        )
    check_media(chat.messages, label)
    return Template(tokenizer, chat, label)


def _first_shape(messages: list[Message], render: Callable[[list[Message]], T]) -> T:
    """What comes of the first shape that is not refused; if all are, the error of the one that came furthest."""
    errors: list[DataError] = []
    for shape in _shapes(messages):
        try:
            return render(shape)
        except DataError as error:
            errors.append(error)
    raise max(errors, key=_progress)


def _progress(error: DataError) -> int:
    """How far a shape came: a template refused it, lost something of it, or all is there but a thought or a column."""
    return 0 if isinstance(error, Refused) else 1 if isinstance(error, NotRendered) else 2


def _shapes(messages: list[Message]) -> Iterator[list[Message]]:
    """The same chat in every shape that templates read: as it is, as texts, as parts; calls as mappings, then JSON.

    A call without a content is tried with an empty one too.
    """
    tried: list[list[Message]] = []
    for content in (lambda x: x, _with_content, _as_text, _as_parts):
        for arguments in (_as_mapping, _as_json):
            shape = [_with_arguments(content(x), arguments) for x in messages]
            if shape not in tried:
                tried.append(shape)
                yield shape


def _with_content(message: Message) -> Message:
    return {"content": "", **message}


def _as_text(message: Message) -> Message:
    message = _with_content(message)
    content = message["content"]
    if isinstance(content, dict):
        return {**message, "content": json.dumps(content, ensure_ascii=False)}
    if not isinstance(content, list):
        return message
    texts, thoughts = [], []
    for part in content:
        thought = part.get("thinking") or part.get("reasoning")
        # Parts of other kinds than text and thoughts have no text of their own.
        if part.keys() - {"type", "text", "thinking", "reasoning", "signature"}:
            return message
        if thought is not None:
            thoughts.append(_plain(thought))
        elif "text" in part:
            texts.append(part["text"])
    found = {**message, "content": "".join(map(str, texts))}
    if thoughts and not any(message.get(x) for x in FIELDS):
        found[FIELDS[0]] = "\n".join(thoughts)
    return found


def _plain(thought: Any) -> str:
    """A thought, which may be a list of parts itself."""
    if isinstance(thought, list):
        return "".join(str(x.get("text", "")) if isinstance(x, dict) else str(x) for x in thought)
    return str(thought)


def _as_parts(message: Message) -> Message:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    return {"content": [], **message}


def _as_mapping(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _as_json(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _with_arguments(message: Message, change: Callable[[Any], Any]) -> Message:
    """A message whose calls have changed arguments."""
    if not isinstance(message.get("tool_calls"), list):
        return message
    calls = []
    for call in message["tool_calls"]:
        inner = call.get("function") if isinstance(call, dict) else None
        if isinstance(inner, dict) and "arguments" in inner:
            call = {**call, "function": {**inner, "arguments": change(inner["arguments"])}}
        elif isinstance(call, dict) and "arguments" in call:
            call = {**call, "arguments": change(call["arguments"])}
        calls.append(call)
    return {**message, "tool_calls": calls}


def _check(messages: list[Message], template: Template) -> str:
    """The text of messages, if nothing but thoughts is missing in it."""
    held: list[Text | None] = []
    for message in messages:
        thought = _thought(message)
        start = 0
        if thought is not None and thought.field == "content":
            start = len(message["content"]) - len(thought.answer)
        held.append(None if thought is None else Text((thought.field,), start))
    text = check_rendered(messages, template, held)
    for index, (message, place) in enumerate(zip(messages, held, strict=True)):
        _check_ends(message, place, text, f"{template.label}: messages[{index}].content")
    template.check_columns(messages, text)
    return text


def _check_ends(message: Message, thought: Text | None, text: str, where: str) -> None:
    """Refuse what a template that cuts a content at </think> takes away beside the one thought that we look for."""
    content = message.get("content")
    start = thought.start if thought is not None and thought.path == ("content",) else 0
    if isinstance(content, list):
        said = [str(x.get("text", "")) for x in content if isinstance(x, dict)]
    else:
        said = [str(content or "")[start:]]
    for part in (x for own in said if "</think>" in own for x in own.split("</think>")):
        if part.replace("<think>", "").strip() not in text:
            raise DataError(
                f"{where} has a </think>, and the tokenizer's chat_template cuts away what stands in front of it; "
                "pass the content as text with one </think>, or pass texts"
            )


def _texts(messages: list[Message], template: Template) -> list[str]:
    whole = _check(messages, template)
    lost = _lost(messages, template)
    texts = []
    if not lost or lost[-1] + 1 < len(messages):
        texts.append(whole)
    while lost:
        beginning = messages[: lost[-1] + 1]
        lost = _lost(beginning, template)
        if lost and lost[-1] + 1 == len(beginning):
            texts.append(_as_written(beginning, template))
            lost.pop()
        else:
            texts.append(template.render(beginning))
    return texts[::-1]


def _thought(message: Message) -> Thought | None:
    if message["role"] != "assistant":
        return None
    content = message.get("content")
    content = content if isinstance(content, str) else ""
    for name in FIELDS:
        if isinstance(message.get(name), str) and message[name].strip():
            return Thought(message[name].strip(), name, content)
    found = _INLINE.match(content)
    if found is None or not found["thought"].strip():
        return None
    return Thought(found["thought"].strip(), "content", content[found.end() :])


def _lost(messages: list[Message], template: Template) -> list[int]:
    """Indices of the turns whose thoughts the template drops."""
    thoughts = {i: x for i, x in enumerate(map(_thought, messages)) if x is not None}
    if not thoughts:
        return []
    marked = list(messages)
    for index, thought in thoughts.items():
        mark = _MARK.format(index)
        inline = f"<think>\n{mark}\n</think>{thought.answer}"
        marked[index] = {
            **messages[index],
            thought.field: inline if thought.field == "content" else mark,
        }
    text = template.render(marked)
    return [index for index in thoughts if _MARK.format(index) not in text]


def _as_written(messages: list[Message], template: Template) -> str:
    """A chat as its last turn was written: what was asked, the thought, the answer, the template's end of a turn."""
    *before, last = messages
    thought = _thought(last)
    assert thought is not None
    where = f"messages[{len(before)}]"
    if "</think>" not in template.source:
        raise DataError(
            f"{template.label}: the tokenizer's chat_template drops the {thought.field} of {where} and knows no "
            "</think>; put the thinking into the content as the model writes it, or pass texts"
        )
    mark = _MARK.format("answer")
    marked = template.render([*before, {"role": "assistant", "content": mark}])
    _, there, end = marked.rpartition(mark)
    prompt = template.render(before, ask=True, **_THINKING)
    if not there or last.get("tool_calls") or prompt.rstrip().endswith("</think>"):
        raise DataError(
            f"{template.label}: the tokenizer's chat_template drops the thinking of {where}, and what it makes "
            "of the rest of that turn cannot be told apart; pass the whole text, or token ids"
        )
    # Some templates open the thought themselves.
    opened = prompt.rstrip().endswith("<think>")
    start = "" if opened and prompt.endswith("\n") else "\n" if opened else "<think>\n"
    return f"{prompt}{start}{thought.text}\n</think>\n\n{thought.answer.strip()}{end}"
