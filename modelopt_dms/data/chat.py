# SPDX-License-Identifier: Apache-2.0
"""Chats -> texts in which every thought of the assistant stands. Knows templates only as functions from chats to text.

Templates drop thoughts from history: Qwen3's keeps those after the last question, DeepSeek-R1's none. A chat whose
template does that becomes several texts, each ending with a turn whose thought was dropped, just as the model saw it
when it wrote that turn: earlier thoughts gone, its own there.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from modelopt_dms.data.errors import DataError

# Fields of a message that hold a thought; else it stands in the content, in front of </think>.
FIELDS = ("reasoning_content", "thinking")
_INLINE = re.compile(r"\s*(?:<think>)?(?P<thought>.*?)</think>", re.DOTALL)
# Names by which templates that can do both are told that the model shall think.
_THINKING = {"enable_thinking": True, "thinking": True}
# In place of a thought or an answer, to see what a template does with it; no chat contains it.
_MARK = "dms\u2060mark\u2060{}\u2060"

Chat = list[dict[str, Any]]


class Thought(NamedTuple):
    """What an assistant thought, the message's field in which it stands, and what it answered then."""

    text: str
    field: str
    answer: str


def render_chat(messages: Any, tokenizer: PreTrainedTokenizerBase | None, label: str) -> list[str]:
    """The texts of one chat, earliest first; one, unless the template drops thoughts.

    Args:
        messages: [{"role": ..., "content": ...}, ...]; a thought stands in a field of `FIELDS`, or in the content as
            <think>...</think>.
        tokenizer: has the template.
        label: names the chat in messages.

    Raises:
        DataError: no chat, no template, or one that fails or loses a thought in any case.
    """
    tokenizer, chat = _check(messages, tokenizer, label)
    lost = _lost(chat, tokenizer, label)
    texts = []
    if not lost or lost[-1] + 1 < len(chat):
        texts.append(_apply(chat, tokenizer, label))
    while lost:
        beginning = chat[: lost[-1] + 1]
        lost = _lost(beginning, tokenizer, label)
        if lost and lost[-1] + 1 == len(beginning):
            texts.append(_as_written(beginning, tokenizer, label))
            lost.pop()
        else:
            texts.append(_apply(beginning, tokenizer, label))
    return texts[::-1]


def render_question(messages: Any, tokenizer: PreTrainedTokenizerBase | None, label: str) -> str:
    """A chat up to where the assistant's next turn begins; turns of the assistant at its end are left out.

    Raises:
        DataError: as `render_chat`, or nobody but the assistant speaks.
    """
    tokenizer, chat = _check(messages, tokenizer, label)
    while chat and chat[-1]["role"] == "assistant":
        chat.pop()
    if not chat:
        raise DataError(f"{label}: messages hold nothing that could be answered")
    return _apply(chat, tokenizer, label, ask=True)


def _check(
    messages: Any, tokenizer: PreTrainedTokenizerBase | None, label: str
) -> tuple[PreTrainedTokenizerBase, Chat]:
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
    return tokenizer, [dict(message) for message in messages]


def _apply(
    chat: Chat,
    tokenizer: PreTrainedTokenizerBase,
    label: str,
    *,
    ask: bool = False,
    **variables: Any,
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=ask, **variables
        )
    # A template is a program that comes with the model; it may raise anything.
    except Exception as error:
        raise DataError(f"{label}: the tokenizer's chat_template refuses it: {error}") from error
    return cast(str, text)


def _thought(message: Mapping[str, Any]) -> Thought | None:
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


def _lost(chat: Chat, tokenizer: PreTrainedTokenizerBase, label: str) -> list[int]:
    """Indices of the turns whose thoughts the template drops."""
    thoughts = {i: x for i, x in enumerate(map(_thought, chat)) if x is not None}
    if not thoughts:
        return []
    marked = list(chat)
    for index, thought in thoughts.items():
        mark = _MARK.format(index)
        inline = f"<think>\n{mark}\n</think>{thought.answer}"
        marked[index] = {
            **chat[index],
            thought.field: inline if thought.field == "content" else mark,
        }
    text = _apply(marked, tokenizer, label)
    return [index for index in thoughts if _MARK.format(index) not in text]


def _as_written(chat: Chat, tokenizer: PreTrainedTokenizerBase, label: str) -> str:
    """A chat as its last turn was written: what was asked, the thought, the answer, the template's end of a turn."""
    *before, last = chat
    thought = _thought(last)
    assert thought is not None
    if "</think>" not in str(tokenizer.chat_template):
        raise DataError(
            f"{label}: the tokenizer's chat_template drops the {thought.field} of messages[{len(before)}] and knows no "
            "</think>; put the thinking into the content as the model writes it, or pass texts"
        )
    mark = _MARK.format("answer")
    marked = _apply([*before, {"role": "assistant", "content": mark}], tokenizer, label)
    _, there, end = marked.rpartition(mark)
    prompt = _apply(before, tokenizer, label, ask=True, **_THINKING)
    if not there or last.get("tool_calls") or prompt.rstrip().endswith("</think>"):
        raise DataError(
            f"{label}: the tokenizer's chat_template drops the thinking of messages[{len(before)}], and what it makes "
            "of the rest of that turn cannot be told apart; pass the whole text, or token ids"
        )
    # Some templates open the thought themselves.
    opened = prompt.rstrip().endswith("<think>")
    start = "" if opened and prompt.endswith("\n") else "\n" if opened else "<think>\n"
    return f"{prompt}{start}{thought.text}\n</think>\n\n{thought.answer.strip()}{end}"
