# SPDX-License-Identifier: Apache-2.0
"""Problems that small models solve step by step: running sums after worked examples, or the embedded model's task."""

import random
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from modelopt_dms.evaluation.memories import knows_records
from modelopt_dms.evaluation.ruler import encoder
from modelopt_dms.evaluation.tasks import Episode, make_episodes

CONTEXTS = 3  # of worked examples
TERMS = 3
TOP = 10  # terms are below it
STEP_TOKENS = 12  # of a step, generously
_ANSWER = re.compile(r"answer is (\d+)")


@dataclass(frozen=True)
class Problem:
    """A context that is read once, and a question that several chains answer.

    Attributes:
        context: read, and cut, before the question is known.
        question: prompt ids.
        right: the answer.
        limit: tokens that a chain may take; it ends with a line.
        final: the answer of a chain's text; "" if it gives none.
    """

    context: Episode
    question: list[int]
    right: str
    limit: int
    final: Callable[[str], str]


def make_problems(tokenizer: Any, length: int, count: int, seed: int) -> list[Problem]:
    """Problems with contexts of about `length` tokens, in words that the tokenizer knows; sums share some contexts."""
    if not knows_records(tokenizer):
        rng = random.Random(f"sums/{length}/{seed}")
        contexts = [_examples(tokenizer, length, rng) for _ in range(min(CONTEXTS, count))]
        found = [_sum(tokenizer, contexts[i % len(contexts)], rng) for i in range(count)]
        # Those of one context stand together: it is read once.
        return sorted(found, key=lambda x: contexts.index(x.context))
    found = []
    for episode in make_episodes("arithmetic", tokenizer, length, count, seed, 1):
        (question,) = episode.questions
        right = str(tokenizer.decode(question.answer_ids)).split()[-1]
        limit = len(question.answer_ids) + 4
        found.append(Problem(episode, question.prompt_ids, right, limit, _last_word))
    return found


def task_name(tokenizer: Any) -> str:
    """What the problems are called."""
    return "arithmetic" if knows_records(tokenizer) else "worked sums"


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


def _examples(tokenizer: Any, length: int, rng: random.Random) -> Episode:
    """As many worked sums as fit."""
    encode = encoder(tokenizer)
    shown = []
    for _ in range(length // 16):
        text, steps, total = running_sum(rng)
        shown.append(f"Question: What is {text}?\nAnswer: {steps} The answer is {total}.\n\n")

    def context(n: int) -> list[int]:
        return encode("".join(shown[:n]))

    n = bisect_right(range(len(shown)), length, key=lambda n: len(context(n))) - 1
    return Episode("sums", context(n), [])


def _sum(tokenizer: Any, context: Episode, rng: random.Random) -> Problem:
    text, _, total = running_sum(rng)
    question = encoder(tokenizer)(f"Question: What is {text}?\nAnswer:")
    return Problem(context, question, str(total), STEP_TOKENS * TERMS + 16, _stated)


def _last_word(said: str) -> str:
    return (said.split() or [""])[-1]


def _stated(said: str) -> str:
    match = _ANSWER.search(said)
    return match[1] if match else ""
