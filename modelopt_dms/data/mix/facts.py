# SPDX-License-Identifier: Apache-2.0
"""Facts that stand somewhere in a text, and what may be asked about them later."""

import random
from dataclasses import dataclass

from modelopt_dms.data.mix.content import PHRASES, read_lines, split
from modelopt_dms.data.mix.values import Draw


@dataclass(frozen=True)
class Question:
    """What is asked, the right answer, and its parts that stand word for word in the text above.

    Attributes:
        text: the user's.
        answer: the assistant's.
        values: parts of the answer that must have been kept; none if it has to be worked out.
    """

    text: str
    answer: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fact:
    """A sentence for the text, or a block of lines, and questions that it answers."""

    text: str
    questions: tuple[Question, ...] = ()
    block: bool = False


def _statements() -> list[tuple[str, list[tuple[str, ...]]]]:
    found: list[tuple[str, list[tuple[str, ...]]]] = []
    for line in read_lines("statements"):
        if line.startswith(" "):
            found[-1][1].append(split(line))
        else:
            found.append((line, []))
    return found


_HOPS = read_lines("hops")
# A statement with pairs of question and value; two facts with a question and an answer with its parts.
PLAIN = _statements()
PAIRS = [
    (split(facts), question.strip(), split(answer))
    for facts, question, answer in zip(*(_HOPS[i::3] for i in range(3)), strict=True)
]
REPEATED = [split(line) for line in read_lines("several")]
# Questions for which "It is" is a good beginning of an answer.
_NOMINAL = ("What is the", "Which number", "What was the")


def plain(rng: random.Random, taken: set[str]) -> list[Fact]:
    """One fact, or several of the same kind with other subjects, each with its questions."""
    statement, questions = rng.choice(PLAIN)
    facts = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        draw = Draw(rng, taken)
        text = draw.fill(statement)
        asked = [_question(rng, draw.fill(ask), draw.fill(value)) for ask, value in questions]
        facts.append(Fact(text, (*asked, *_quotation(rng, text))))
    return facts


def _question(rng: random.Random, text: str, value: str) -> Question:
    kind = "nominal_answers" if text.startswith(_NOMINAL) else "short_answers"
    return Question(text, rng.choice(PHRASES[kind]).format(value), (value,))


def _quotation(rng: random.Random, text: str) -> list[Question]:
    """Now and then: have the whole sentence quoted, by a beginning that has a name or a number in it."""
    words = text.split()
    begins = next((i for i, x in enumerate(words) if i > 2 and x[0].isupper()), len(words))
    if rng.random() > 0.25 or begins > len(words) - 4:
        return []
    beginning = " ".join(words[: begins + 1]).rstrip(",;")
    ask = rng.choice(PHRASES["ask_for_sentence"])
    return [Question(ask.format(beginning), text, (text,))]


def hops(rng: random.Random, taken: set[str]) -> list[Fact]:
    """Two facts that have to be joined for the answer, which goes by the joint; in either order."""
    draw = Draw(rng, taken)
    statements, question, (answer, *values) = rng.choice(PAIRS)
    first, second = map(draw.fill, statements)
    asked = Question(draw.fill(question), draw.fill(answer), tuple(map(draw.fill, values)))
    facts = [Fact(first), Fact(second, (asked,))]
    return facts if rng.random() < 0.7 else facts[::-1]


def several(rng: random.Random, taken: set[str]) -> list[Fact]:
    """One subject with several values in several places, all asked for, in their order."""
    subject = Draw(rng, taken)
    statement, question = rng.choice(REPEATED)
    subject.fill(statement[: statement.index("}") + 1])
    texts, values = [], []
    for _ in range(rng.choice((2, 3, 4))):
        draw = Draw(rng, taken)
        draw.update(subject)
        texts.append(draw.fill(statement))
        values.append(next(value for slot, value in draw.items() if slot not in subject))
    answer = f"{', '.join(values[:-1])} and {values[-1]}{rng.choice(('', '.'))}"
    asked = Question(subject.fill(question), answer, tuple(values))
    return [*map(Fact, texts[:-1]), Fact(texts[-1], (asked,))]
