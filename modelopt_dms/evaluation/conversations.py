# SPDX-License-Identifier: Apache-2.0
"""Conversations whose early turns must survive: rules of a system prompt, and facts told turn by turn.

    system  a system prompt with four rules, a long text in the user's turn, then questions about two of the rules
    turns   facts that the user tells in turns of their own, prose between them, then questions about four of them

What follows a question is judged as `evaluation.score.score_task` does it: exactly.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from modelopt_dms.data.records import Chat
from modelopt_dms.data.template import Template
from modelopt_dms.evaluation.names import CHATS
from modelopt_dms.evaluation.prose import reference_sentences
from modelopt_dms.evaluation.ruler import KEYS, encode_turns, encoder, largest_that_fits, prose_from
from modelopt_dms.evaluation.tasks import Episode, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FACTS = 6  # told in turns
ASKED = 4  # of them
_CUT = "\u241e"  # where a rendered chat is cut; no text has it
Message = dict[str, str]
# The messages before the first question, with so many sentences.
Told = Callable[[int], list[Message]]
# Question and begun answer; the answer follows.
Pair = tuple[str, str, str]


def make_conversations(
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    seed: int,
    haystack: Sequence[str] | None = None,
) -> list[Episode]:
    """Conversations whose context, first question and its begun answer have at most `length` tokens.

    Args:
        kind: "system" or "turns".
        tokenizer: its chat template is used if it has one; else turns are "User: " and "Assistant: ".
        length: tokens.
        count: how many.
        seed: draws facts and prose.
        haystack: sentences; by default those of Python's language reference.

    Raises:
        ValueError: an unknown kind, a chat template without a system role, or no room.
    """
    if kind not in CHATS:
        raise ValueError(f"kind is {kind!r}, must be one of {CHATS}")
    rng = random.Random(f"chats/{kind}/{length}/{seed}")
    sentences = reference_sentences() if haystack is None else haystack
    return [_episode(kind, tokenizer, length, sentences, rng) for _ in range(count)]


def _episode(
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    sentences: Sequence[str],
    rng: random.Random,
) -> Episode:
    prose = prose_from(sentences, length, rng)
    told, pairs = (_system if kind == "system" else _turns)(rng, prose)
    encode = encoder(tokenizer)

    def parts(size: int) -> list[str]:
        return _render(tokenizer, told(size), pairs)

    def used(size: int) -> int:
        context, asked, *_ = parts(size)
        return len(encode(context)) + len(encode(asked))

    size = largest_that_fits(length, used, f"{kind} conversation")
    context, *turns = parts(size)
    ids = list(encode_turns(encode, turns))
    questions = [Question(*x) for x in zip(ids[::2], ids[1::2], strict=True)]
    return Episode(kind, encode(context), questions)


def _render(
    tokenizer: PreTrainedTokenizerBase, told: list[Message], pairs: Sequence[Pair]
) -> list[str]:
    """Text of the context, then question and answer in turn; the context ends where the first question begins."""
    messages = list(told)
    for question, begun, answer in pairs:
        messages.append({"role": "user", "content": f"{_CUT}{question}"})
        said = f"{begun}{_CUT}{answer}{_CUT}."
        messages.append({"role": "assistant", "content": said})
    if tokenizer.chat_template is None:
        names = {"system": "", "user": "User: ", "assistant": "Assistant: "}
        lines = (f"{names[x['role']]}{x['content']}\n" for x in messages)
        text = str(tokenizer.bos_token or "") + "".join(lines)
    else:
        template = Template(tokenizer, Chat([], {}), "chat_template")
        text = template.render(messages, ask=False, enable_thinking=False)
    # context | question, begun | answer | rest, that is: . and the next turn's beginning | question ...
    context, *pieces = text.split(_CUT)
    if len(pieces) != 3 * len(pairs):
        raise ValueError(
            "the chat template leaves out or repeats messages, so that no conversation can be made of it"
        )
    found, carried = [context], ""
    for question, answer, rest in zip(pieces[::3], pieces[1::3], pieces[2::3], strict=True):
        found += [carried + question, answer]
        carried = rest
    return found


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10_000, 100_000))


def _system(rng: random.Random, prose: Sequence[str]) -> tuple[Told, list[Pair]]:
    code, line = _number(rng), _number(rng)
    word, name = (x.capitalize() for x in rng.sample(KEYS, 2))
    rules = [
        f"Your name is {name}.",
        f"When the user asks for the reference code, say {code}.",
        f"When the user asks for the support line, say {line}.",
        f"When the user asks for the password, say {word}.",
    ]
    rng.shuffle(rules)
    pairs = [
        ("What is the reference code?", "The reference code is", f" {code}"),
        ("What is the support line?", "The support line is", f" {line}"),
        ("What is the password?", "The password is", f" {word}"),
        ("What is your name?", "My name is", f" {name}"),
    ]

    def told(size: int) -> list[Message]:
        text = " ".join(prose[:size])
        return [
            {"role": "system", "content": " ".join(rules)},
            {"role": "user", "content": f"Read this text. {text}"},
            {"role": "assistant", "content": "I have read it."},
        ]

    return told, rng.sample(pairs, 2)


def _turns(rng: random.Random, prose: Sequence[str]) -> tuple[Told, list[Pair]]:
    keys = rng.sample(KEYS, FACTS)
    numbers = [_number(rng) for _ in keys]
    asked = rng.sample(range(FACTS), ASKED)
    pairs = [
        (
            f"What is the number of the {keys[i]}?",
            f"The number of the {keys[i]} is",
            f" {numbers[i]}",
        )
        for i in asked
    ]

    def told(size: int) -> list[Message]:
        messages = []
        share = size / FACTS
        for i, (key, number) in enumerate(zip(keys, numbers, strict=True)):
            text = " ".join(prose[round(i * share) : round((i + 1) * share)])
            fact = f"The number of the {key} is {number}. {text}".strip()
            messages.append({"role": "user", "content": fact})
            messages.append({"role": "assistant", "content": "I will remember it."})
        return messages

    return told, pairs
