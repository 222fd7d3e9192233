# SPDX-License-Identifier: Apache-2.0
"""RULER's families (arXiv 2404.06654) whose answers have no order of their own: they are generated, then searched.

    multiquery  four needles with different keys, all asked for
    vt          a chain of five variables, "VAR ABCDE = 12345 ... VAR FGHIJ = VAR ABCDE", all asked for
    cwe         a numbered list in which ten words stand more often than the others
    fwe         coded words in a Zeta distribution, of which the three most frequent are asked for
    qa_1        who is asked about stands in one of many documents
    qa_2        the answer of one document leads to another document

Wording, begun answers, counts and scoring are RULER's: the share of the words asked for that stand in what greedy
generation says, and of qa whether the answer does. Prompts of vt and cwe begin with an example, as RULER's do. RULER's
qa takes SQuAD and HotpotQA; here documents are about people of invented names, filled up with sentences of the
haystack, so that nothing is downloaded and nothing can be known beforehand.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modelopt_dms.evaluation.names import RULER_OPEN
from modelopt_dms.evaluation.prose import reference_sentences
from modelopt_dms.evaluation.ruler import KEYS, chat_frame, encoder, largest_that_fits, prose_from

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAIN = 5  # variables of a chain
COMMON = 10  # words of cwe that are asked for
FREQUENT = 3  # words of fwe that are asked for
ZETA = 2.0  # of fwe; its first word is dots, which a question says to ignore
SHORT = 4096  # below, RULER repeats the words of cwe less often
# Of RULER: tokens that an answer may take.
ANSWER_TOKENS = {"multiquery": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}


@dataclass(frozen=True)
class OpenPrompt:
    """A context, a question behind it, and what a generated answer must contain.

    Attributes:
        task: of RULER_OPEN.
        context_ids: read, and cut, before the question is known.
        prompt_ids: the question and the begun answer.
        wanted: words to find in what is generated, whatever their case.
        tokens: that are generated.
    """

    task: str
    context_ids: list[int]
    prompt_ids: list[int]
    wanted: tuple[str, ...]
    tokens: int

    def share(self, said: str) -> float:
        """Share of the wanted words that an answer has."""
        return sum(x.casefold() in said.casefold() for x in self.wanted) / len(self.wanted)


@dataclass(frozen=True)
class _Draft:
    """A prompt as text: `context` makes it of any size, from 0 on.

    Attributes:
        context: text for a size: sentences, words or documents.
        question: that follows, with the chat's turn between it and the begun answer.
        begun: the begun answer.
        wanted: see OpenPrompt.
    """

    context: Callable[[int], str]
    question: str
    begun: str
    wanted: tuple[str, ...]


def make_open_prompts(
    family: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    seed: int,
    haystack: Sequence[str] | None = None,
) -> list[OpenPrompt]:
    """Prompts of at most `length` tokens, the answer apart; one more sentence, word or document would not fit.

    Args:
        family: one of RULER_OPEN.
        tokenizer: its chat template is used if it has one, without thinking.
        length: tokens of context, question and begun answer.
        count: how many.
        seed: draws facts, depths and where in the haystack a prompt begins.
        haystack: sentences, repeated where they are too few; by default those of Python's language reference.

    Raises:
        ValueError: an unknown family, or a prompt has no room.
    """
    if family not in RULER_OPEN:
        raise ValueError(f"family is {family!r}, must be one of {RULER_OPEN}")
    rng = random.Random(f"ruler/{family}/{length}/{seed}")
    sentences = reference_sentences() if haystack is None else haystack
    return [_prompt(family, tokenizer, length, sentences, rng) for _ in range(count)]


def _prompt(
    family: str,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    sentences: Sequence[str],
    rng: random.Random,
) -> OpenPrompt:
    encode = encoder(tokenizer)
    draft = _MAKE[family](rng, prose_from(sentences, length, rng), length)
    head, tail = chat_frame(tokenizer)
    asked = encode(f"\n{draft.question}{tail}{draft.begun}")

    def used(size: int) -> int:
        return len(encode(head + draft.context(size))) + len(asked)

    size = largest_that_fits(length, used, f"{family} prompt")
    context = encode(head + draft.context(size))
    return OpenPrompt(family, context, asked, draft.wanted, ANSWER_TOKENS[family])


def _scattered(facts: Sequence[str], prose: Sequence[str], depths: Sequence[float], n: int) -> str:
    """Facts at their depths between the first n sentences."""
    text = list(prose[:n])
    for fact, depth in reversed(list(zip(facts, depths, strict=True))):
        text.insert(round(depth * n), fact)
    return " ".join(text)


def _multiquery(rng: random.Random, prose: Sequence[str], length: int) -> _Draft:
    keys = rng.sample(KEYS, 4)
    values = tuple(str(rng.randrange(1_000_000, 10_000_000)) for _ in keys)
    facts = [
        f"One of the special magic numbers for {key} is: {value}."
        for key, value in zip(keys, values, strict=True)
    ]
    depths = sorted(rng.random() for _ in facts)
    about = f"special magic numbers for {', '.join(keys[:-1])}, and {keys[-1]} mentioned in the provided text"
    intro = (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards."
    )
    return _Draft(
        lambda n: f"{intro}\n{_scattered(facts, prose, depths, n)}",
        f"What are all the {about}?",
        f"The {about} are",
        values,
    )


def _chain(rng: random.Random) -> tuple[str, list[str], list[str]]:
    """Value, names and assignments of a chain."""
    names: list[str] = []
    while len(names) < CHAIN:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        names += [] if name in names else [name]
    value = str(rng.randrange(10_000, 100_000))
    facts = [f"VAR {names[0]} = {value}."]
    facts += [f"VAR {b} = VAR {a}." for a, b in zip(names, names[1:], strict=False)]
    return value, names, facts


def _vt(rng: random.Random, prose: Sequence[str], length: int) -> _Draft:
    task = "Memorize and track the chain(s) of variable assignment hidden in the following text."

    def question(value: str) -> str:
        return (
            f"Question: Find all variables that are assigned the value {value} in the text above."
        )

    def begun(value: str) -> str:
        return (
            "Answer: According to the chain(s) of variable assignment in the text above, "
            f"{CHAIN} variables are assigned the value {value}, they are:"
        )

    old, shown, example = _chain(rng)
    first = _scattered(example, prose[-4:], sorted(rng.random() for _ in example), 4)
    value, names, facts = _chain(rng)
    depths = sorted(rng.random() for _ in facts)
    intro = f"{task}\n\n{first}\n{question(old)} {begun(old)} {' '.join(shown)}\n\n{task}\n\n"
    return _Draft(
        lambda n: intro + _scattered(facts, prose, depths, n),
        question(value),
        begun(value),
        tuple(names),
    )


def _coded(rng: random.Random, count: int) -> list[str]:
    """Words of six letters that no language has, all different."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    return list(found)


def _plain_words(prose: Sequence[str]) -> list[str]:
    """Lower-case words of the haystack, each once, in the order of the text."""
    words = (x.strip(".,;:()'`").lower() for sentence in prose for x in sentence.split())
    return list(dict.fromkeys(x for x in words if x.isalpha() and len(x) > 3))


def _numbered(rng: random.Random, words: Sequence[str], often: int, seldom: int) -> str:
    """A numbered list in which the first COMMON words stand `often` times, and the others `seldom` times."""
    listed = [*words[:COMMON]] * often + [*words[COMMON:]] * seldom
    rng.shuffle(listed)
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))


def _cwe(rng: random.Random, prose: Sequence[str], length: int) -> _Draft:
    words = _plain_words(prose)
    rng.shuffle(words)
    # A haystack has words for some ten thousand tokens.
    words += _coded(rng, max(4 * COMMON, length // 8) - len(words))
    task = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often."
    )
    question = f"Question: What are the {COMMON} most common words in the above list?"
    begun = f"Answer: The top {COMMON} words that appear most often in the list are:"
    example, words = words[: 2 * COMMON], words[2 * COMMON :]
    often, seldom = (6, 1) if length < SHORT else (30, 3)
    shown = ", ".join(f"{i}. {word}" for i, word in enumerate(example[:COMMON], 1))
    intro = f"{task}\n{_numbered(rng, example, 3, 1)}\n{question} {begun} {shown}\n\n{task}\n"
    order = rng.random()

    def context(n: int) -> str:
        chosen = words[: COMMON + n]
        return intro + _numbered(random.Random(order), chosen, often, seldom)

    return _Draft(context, question, begun, tuple(words[:COMMON]))


def _fwe(rng: random.Random, prose: Sequence[str], length: int) -> _Draft:
    words = ["....", *_coded(rng, max(30, length // 50))]
    weights = [(k + 1) ** -ZETA for k in range(len(words))]
    shares = [x / sum(weights) for x in weights]
    order = rng.random()

    def context(n: int) -> str:
        # Not fewer than what tells the third from the fourth.
        total = n + 100
        listed = [
            word for word, x in zip(words, shares, strict=True) for _ in range(round(total * x))
        ]
        random.Random(order).shuffle(listed)
        return (
            "Read the following coded text and track the frequency of each coded word. "
            f"Find the three most frequently appeared coded words. {' '.join(listed)}"
        )

    return _Draft(
        context,
        "Question: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?",
        "Answer: According to the coded text above, the three most frequently appeared words are:",
        tuple(words[1 : 1 + FREQUENT]),
    )


_SYLLABLES = tuple(
    """
    ba de fo ga hin jor ka lem mi nu os pel quo ras sim tor ul vek wen yar zo
    """.split()  # noqa: SIM905
)
_WORK = (
    "baker", "plumber", "pilot", "painter", "surgeon", "gardener", "tailor", "printer", "judge",
    "miner", "potter", "barber", "glazier", "farmer", "dentist", "sculptor",
)  # fmt: skip


def _name(rng: random.Random, taken: set[str]) -> str:
    while True:
        name = "".join(rng.sample(_SYLLABLES, 3)).capitalize()
        if name not in taken:
            taken.add(name)
            return name


def _documents(
    rng: random.Random, facts: Sequence[str], needed: Sequence[int], prose: Sequence[str], n: int
) -> str:
    """Documents "Document 1:" with a fact and two sentences each: those that are needed and n others, shuffled."""
    others = [i for i in range(len(facts)) if i not in needed][:n]
    chosen = [*needed, *others]
    rng.shuffle(chosen)
    return "\n\n".join(
        f"Document {place}:\n{facts[i]} {prose[2 * i % len(prose)]} {prose[(2 * i + 1) % len(prose)]}"
        for place, i in enumerate(chosen, 1)
    )


def _questions(rng: random.Random, prose: Sequence[str], length: int, hops: int) -> _Draft:
    """People, their work and towns; one hop asks for someone's work, two for the river of someone's town."""
    taken: set[str] = set()
    count = max(2, length // 40)
    people = [f"{_name(rng, taken)} {_name(rng, taken)}" for _ in range(count)]
    towns = [_name(rng, taken) for _ in range(count)]
    rivers = [_name(rng, taken) for _ in range(count)]
    work = [rng.choice(_WORK) for _ in range(count)]
    living = zip(people, work, towns, strict=True)
    lives = [f"{x} works as a {job} and lives in {town}." for x, job, town in living]
    flows = [f"The town of {x} lies on the river {y}." for x, y in zip(towns, rivers, strict=True)]
    if hops == 1:
        facts, needed = lives, [0]
        asked, answer = f"What does {people[0]} work as?", work[0]
    else:
        facts, needed = [x for pair in zip(lives, flows, strict=True) for x in pair], [0, 1]
        asked, answer = f"On which river lies the town that {people[0]} lives in?", rivers[0]
    order = rng.random()
    task = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other "
        "words."
    )

    def context(n: int) -> str:
        found = _documents(random.Random(order), facts, needed, prose, n)
        return f"{task}\n\nThe following are given documents.\n\n{found}"

    return _Draft(context, f"\n{task}\n\nQuestion: {asked}", "Answer:", (answer,))


_MAKE: dict[str, Callable[[random.Random, Sequence[str], int], _Draft]] = {
    "multiquery": _multiquery,
    "vt": _vt,
    "cwe": _cwe,
    "fwe": _fwe,
    "qa_1": lambda rng, prose, length: _questions(rng, prose, length, 1),
    "qa_2": lambda rng, prose, length: _questions(rng, prose, length, 2),
}
