# SPDX-License-Identifier: Apache-2.0
"""Prompts of RULER's families (arXiv 2404.06654) for any tokenizer.

    needle      one fact, "One of the special magic numbers for castle is: 48213.", somewhere in prose
    multikey    four such facts with different keys, one of them asked for
    multivalue  one key with two to four values, all asked for; every value counts by itself
    tracking    "VAR castle = 48213." and "VAR river = VAR castle.", in that order, beside another such chain: which
                variable river is assigned, and what value; both count by themselves

RULER's own tracking (name all variables of a chain of five), and the families whose answers have no order, are in
`evaluation.ruler_open`.

Wording and begun answers of the others are RULER's. The context ends where the text ends, so that it can be compressed
before a question is known; the question and the begun answer are the prompt of the first turn.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, get_args

from modelopt_dms.data.records import Chat
from modelopt_dms.data.template import Template
from modelopt_dms.evaluation.prose import reference_sentences
from modelopt_dms.evaluation.tasks import Episode, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Family = Literal["needle", "multikey", "multivalue", "tracking"]
FAMILIES: tuple[Family, ...] = get_args(Family)

_WORDS = """
apple river castle violin planet garden rocket silver forest button candle dragon island jacket
kettle lemon magnet needle orange pepper quartz ribbon saddle turtle umbrella velvet walnut yellow
zebra anchor basket copper desert engine falcon guitar hammer
"""
KEYS: tuple[str, ...] = tuple(_WORDS.split())

Encode = Callable[[str], list[int]]


def make_prompts(
    family: Family,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    seed: int,
    haystack: Sequence[str] | None = None,
) -> list[Episode]:
    """Prompts whose context, question and begun answer have at most `length` tokens; one more sentence would not fit.

    Args:
        family: one of FAMILIES.
        tokenizer: its chat template is used if it has one, without thinking.
        length: tokens of a prompt, the answer apart.
        count: how many.
        seed: draws facts, depths and where in the haystack a prompt begins.
        haystack: sentences, repeated where they are too few; by default those of Python's language reference.

    Raises:
        ValueError: an unknown family, or a prompt has no room for its facts.
    """
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}, must be one of {FAMILIES}")
    rng = random.Random(f"ruler/{family}/{length}/{seed}")
    sentences = reference_sentences() if haystack is None else haystack
    return [_prompt(family, tokenizer, length, sentences, rng) for _ in range(count)]


def _prompt(
    family: Family,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    sentences: Sequence[str],
    rng: random.Random,
) -> Episode:
    encode = encoder(tokenizer)
    head, tail = chat_frame(tokenizer)
    make = _tracking if family == "tracking" else _needles
    intro, facts, question, turns = make(family, rng)
    asked, *rest = encode_turns(encode, [f"\n{question}{tail}{turns[0]}", *turns[1:]])
    depths = sorted(rng.random() for _ in facts)
    prose = prose_from(sentences, length, rng)

    def context(number: int) -> list[int]:
        text = prose[:number]
        for fact, depth in reversed(list(zip(facts, depths, strict=True))):
            text.insert(round(depth * number), fact)
        return encode(f"{head}{intro}\n" + " ".join(text))

    def used(number: int) -> int:
        return len(context(number)) + len(asked)

    number = largest_that_fits(length, used, f"{family} prompt")
    ids = [asked, *rest]
    pairs = zip(ids[::2], ids[1::2], strict=True)
    return Episode(family, context(number), [Question(*pair) for pair in pairs])


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Token ids of a text, without special tokens."""
    return lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def prose_from(sentences: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """So many sentences from a random one on, again from the first after the last."""
    start = rng.randrange(len(sentences))
    return [sentences[(start + i) % len(sentences)] for i in range(count)]


def largest_that_fits(length: int, used: Callable[[int], int], what: str) -> int:
    """The largest size, below `length`, of which no more than `length` tokens are used.

    Raises:
        ValueError: not even size 0 fits.
    """
    size = bisect_right(range(length), length, key=used) - 1
    if size < 0:
        raise ValueError(f"length={length} has no room for a {what} of {used(0)} tokens")
    return size


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What a chat template puts before and after a user's message; just a first token if there is no template."""
    if tokenizer.chat_template is None:
        return str(tokenizer.bos_token or ""), "\n"
    message = {"role": "user", "content": "MESSAGE"}
    template = Template(tokenizer, Chat([], {}), "chat_template")
    head, tail = template.render([message], ask=True, enable_thinking=False).split("MESSAGE")
    return head, tail


def encode_turns(encode: Encode, texts: Sequence[str]) -> Iterator[list[int]]:
    """Token ids [T] of consecutive texts, as in one text: a tokenizer may treat the start of a text differently."""
    text, ids = "", list[int]()
    for part in texts:
        text += part
        whole = encode(text)
        if whole[: len(ids)] != ids:
            raise ValueError(f"the tokenizer joins {part!r} with the text before it")
        yield whole[len(ids) :]
        ids = whole


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10_000, 100_000))


# Introduction, facts in the order of the text, question, and turns: what is given, what must follow, and so on.
Made = tuple[str, list[str], str, list[str]]


def _needles(family: Family, rng: random.Random) -> Made:
    """One key and value, four keys, or one key with several values."""
    keys = rng.sample(KEYS, 4 if family == "multikey" else 1)
    if family == "multivalue":
        keys *= rng.randint(2, 4)
    values = [_number(rng) for _ in keys]
    facts = [
        f"One of the special magic numbers for {key} is: {value}."
        for key, value in zip(keys, values, strict=True)
    ]
    number = rng.randrange(len(keys))
    if family == "multivalue":
        about = f"special magic numbers for {keys[0]} mentioned in the provided text"
        question, begun = f"What are all the {about}?", f"The {about} are"
        turns = [begun, f" {values[0]}"]
        for value in values[1:-1]:
            turns += [",", f" {value}"]
        turns += [" and", f" {values[-1]}"]
    else:
        about = f"special magic number for {keys[number]} mentioned in the provided text"
        question, begun = f"What is the {about}?", f"The {about} is"
        turns = [begun, f" {values[number]}"]
    intro = (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
        if family == "needle"
        else "Some special magic numbers are hidden within the following text. Make sure to memorize them. "
        "I will quiz you about the numbers afterwards."
    )
    return intro, facts, question, turns


def _tracking(family: Family, rng: random.Random) -> Made:
    """Two chains of two variables; one of them is followed to its value."""
    names, values = rng.sample(KEYS, 4), [_number(rng), _number(rng)]
    facts = []
    for a, b, value in zip(names[::2], names[1::2], values, strict=True):
        facts += [f"VAR {a} = {value}.", f"VAR {b} = VAR {a}."]
    a, b, value = names[0], names[1], values[0]
    intro = (
        "Some assignments of variables are hidden within the following text. Make sure to memorize them. "
        "I will quiz you about the variables afterwards."
    )
    question = f"Which variable is {b} assigned, and what value?"
    return intro, facts, question, [f"VAR {b} = VAR", f" {a}", f". VAR {a} =", f" {value}"]
