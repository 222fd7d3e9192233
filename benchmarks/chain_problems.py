# SPDX-License-Identifier: Apache-2.0
"""Problems for parallel chains, several of one context each, so that a context is read once.

lookup      eight numbers with names somewhere in prose, as RULER's needles; one of them is asked for
sums        "What is 7 + 5 - 3?" behind worked examples, to be answered step by step
arithmetic  the embedded model's own task, in the words that its tokenizer knows: adding up facts that stand far above
"""

import random
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from modelopt_dms.evaluation.prose import reference_sentences
from modelopt_dms.evaluation.ruler import (
    KEYS,
    chat_frame,
    encoder,
    largest_that_fits,
    prose_from,
)
from modelopt_dms.evaluation.tasks import Episode, make_episodes

TASKS = ("lookup", "sums", "arithmetic")
ASKED = 8  # of one context
TERMS, TOP = 3, 10  # of a sum: how many, and what they are below
_STATED = re.compile(r"answer is (\d+)")
_NUMBER = re.compile(r"(\d+)\D")


@dataclass(frozen=True)
class Problem:
    """A context that is read once, and a question that several chains answer.

    Attributes:
        context: read, and cut, before the question is known.
        question: prompt ids.
        right: the answer.
        limit: tokens that a chain may take.
        final: the answer of what a chain has written so far; None while it goes on, "" if it ended without one.
    """

    context: Episode
    question: list[int]
    right: str
    limit: int
    final: Callable[[str], str | None]


def make_problems(
    task: str, tokenizer: Any, length: int, count: int, seed: int
) -> Iterator[Problem]:
    """So many problems with contexts of about `length` tokens; those of one context stand together."""
    rng = random.Random(f"{task}/{length}/{seed}")
    if task == "arithmetic":
        yield from _arithmetic(tokenizer, length, count, seed)
        return
    make = _lookups if task == "lookup" else _sums
    for start in range(0, count, ASKED):
        yield from make(tokenizer, length, rng)[: count - start]


def _arithmetic(tokenizer: Any, length: int, count: int, seed: int) -> Iterator[Problem]:
    for episode in make_episodes("arithmetic", tokenizer, length, count, seed, 1):
        (question,) = episode.questions
        right = str(tokenizer.decode(question.answer_ids)).split()[-1]
        yield Problem(episode, question.prompt_ids, right, len(question.answer_ids) + 4, last_word)


def _lookups(tokenizer: Any, length: int, rng: random.Random) -> list[Problem]:
    encode = encoder(tokenizer)
    head, tail = chat_frame(tokenizer)
    keys = rng.sample(KEYS, ASKED)
    values = [str(rng.randrange(10_000, 100_000)) for _ in keys]
    facts = [
        f"One of the special magic numbers for {key} is: {value}."
        for key, value in zip(keys, values, strict=True)
    ]
    depths = sorted(rng.random() for _ in facts)
    prose = prose_from(reference_sentences(), length, rng)
    intro = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
        "I will quiz you about the numbers afterwards."
    )

    def context(n: int) -> list[int]:
        text = prose[:n]
        for fact, depth in reversed(list(zip(facts, depths, strict=True))):
            text.insert(round(depth * n), fact)
        return encode(f"{head}{intro}\n" + " ".join(text))

    n = largest_that_fits(length, lambda n: len(context(n)), "lookup context")
    episode = Episode("lookup", context(n), [])
    found = []
    for key, value in zip(keys, values, strict=True):
        about = f"special magic number for {key} mentioned in the provided text"
        asked = encode(f"\nWhat is the {about}?{tail}The {about} is")
        found.append(Problem(episode, asked, value, 12, number))
    return found


def running_sum(rng: random.Random) -> tuple[str, str, int]:
    """A sum that never falls below 0, its steps, and the result: ("7 + 5 - 3", "7 + 5 = 12. 12 - 3 = 9.", 9)."""
    total = rng.randrange(2, TOP)
    text, steps = str(total), []
    for _ in range(TERMS - 1):
        sign, term = rng.choice("+-"), rng.randrange(1, TOP)
        sign = "+" if term > total else sign
        result = total + term if sign == "+" else total - term
        steps.append(f"{total} {sign} {term} = {result}.")
        text += f" {sign} {term}"
        total = result
    return text, " ".join(steps), total


def _sums(tokenizer: Any, length: int, rng: random.Random) -> list[Problem]:
    encode = encoder(tokenizer)
    shown = []
    for _ in range(length // 16):
        text, steps, total = running_sum(rng)
        shown.append(f"Question: What is {text}?\nAnswer: {steps} The answer is {total}.\n\n")

    def context(n: int) -> list[int]:
        return encode("".join(shown[:n]))

    n = bisect_right(range(len(shown)), length, key=lambda n: len(context(n))) - 1
    episode = Episode("sums", context(n), [])
    found = []
    for _ in range(ASKED):
        text, _, total = running_sum(rng)
        asked = encode(f"Question: What is {text}?\nAnswer:")
        found.append(Problem(episode, asked, str(total), 12 * TERMS + 16, stated))
    return found


def last_word(said: str) -> str | None:
    """The last word of a line."""
    line, end, _ = said.partition("\n")
    return (line.split() or [""])[-1] if end else None


def stated(said: str) -> str | None:
    """What a line says that the answer is."""
    line, end, _ = said.partition("\n")
    if not end:
        return None
    match = _STATED.search(line)
    return match[1] if match else ""


def number(said: str) -> str | None:
    """The first number, once it has ended."""
    match = _NUMBER.search(said)
    if match is None:
        return "" if "\n" in said else None
    return match[1]
