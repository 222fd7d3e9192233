# SPDX-License-Identifier: Apache-2.0
"""Long-memory tasks: facts scattered far back among Python source and decoys, then questions.

A fact is a line `keep <key> <value>`; a decoy is a line
`skip <key> <value>` that no question ever needs, even when it names the key of a fact. Whether a
token will be needed is therefore visible when it is read, which is what an eviction gate can learn.

    recall      keep fox red
                ask fox red
    tracking    keep owl elk    keep elk ant    keep ant blue
                trace owl elk ant blue
    arithmetic  keep bat 3      keep cow 2      keep egg 1
                add bat cow egg bat 3 + cow 2 = 5 + egg 1 = 6
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from modelopt_dms.evaluation.text import Split, text_lines
from modelopt_dms.evaluation.words import DIGITS, KEYS, MARKERS, VALUES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Task = Literal["recall", "tracking", "arithmetic"]
TASKS: tuple[Task, ...] = get_args(Task)

_RECORD_TOKENS = 4  # marker, key, value, newline: one token each in the embedded tokenizer
_ADDENDS = DIGITS[:4]  # three of them add up to one digit
_FACT_SHARE = 0.11  # of the context's tokens
_DECOY_SHARE = 0.08
_SAME_KEY_SHARE = 0.25  # of the decoys name the key of a fact, with another value


@dataclass(frozen=True)
class Question:
    """One turn: what is asked, and the only right continuation (it ends with a newline)."""

    prompt_ids: list[int]
    answer_ids: list[int]


@dataclass(frozen=True)
class Episode:
    """A context of an exact length and questions that follow one after the other as turns."""

    task: str
    context_ids: list[int]
    questions: list[Question]

    def text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The whole conversation as a reader sees it."""
        ids = list(self.context_ids)
        for question in self.questions:
            ids += question.prompt_ids + question.answer_ids
        return str(tokenizer.decode(ids))


@dataclass(frozen=True)
class Document:
    """Token ids for training with the role of each token.

    Roles: "text" (Python), "record" (keep and skip lines: their keys and values are unpredictable),
    "prompt" and "answer".
    """

    ids: list[int]
    roles: list[str]

    def append(self, ids: list[int], role: str) -> None:
        """Add tokens of one role."""
        self.ids.extend(ids)
        self.roles.extend([role] * len(ids))


def make_episodes(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    count: int,
    seed: int,
    questions: int = 8,
) -> list[Episode]:
    """Build `count` episodes whose contexts are exactly `length` tokens long.

    No fact is asked for twice, so no answer can be copied from an earlier turn; a short context
    has room for fewer facts and may get fewer than `questions` questions.
    """
    if task not in TASKS:
        raise ValueError(f"task is {task!r}, must be one of {TASKS}")
    if length < 64:
        raise ValueError(f"length is {length}, must be at least 64 tokens")
    rng = random.Random(f"episodes/{task}/{length}/{seed}")
    return [_episode(task, tokenizer, length, questions, rng) for _ in range(count)]


def training_documents(
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    length: int,
    seed: int,
    text_share: float = 0.25,
    fact_share: float = 0.2,
) -> Iterator[Document]:
    """Yield `count` documents of exactly `length` tokens: plain Python, or one task each.

    Task documents ask for every fact once, many between the lines, so that one sequence teaches
    many look-ups at many distances; asking twice would teach to copy the previous turn instead.
    `fact_share` is the largest share of facts in a document.
    """
    rng = random.Random(f"training/{length}/{seed}")
    for _ in range(count):
        if rng.random() < text_share:
            ids = _text_ids(tokenizer, length, "train", rng)
            yield Document(ids, ["text"] * length)
        else:
            share = rng.uniform(_FACT_SHARE, fact_share)
            yield _task_document(rng.choice(TASKS), tokenizer, length, share, rng)


def held_out_text(
    tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int
) -> list[list[int]]:
    """`count` sequences of `length` token ids of plain Python from files never trained on."""
    rng = random.Random(f"text/held_out/{length}/{seed}")
    return [_text_ids(tokenizer, length, "held_out", rng) for _ in range(count)]


def make_facts(task: Task, count: int, rng: random.Random) -> list[list[tuple[str, str]]]:
    """About `count` (never more) key-value facts, in the groups that a question needs together.

    recall: single facts; tracking: chains of two or three, each value the next key; arithmetic:
    three keys with a digit each. No key occurs twice.
    """
    keys = rng.sample(KEYS, min(count, len(KEYS)))
    groups: list[list[tuple[str, str]]] = []
    while True:
        size = {"recall": 1, "tracking": rng.choice((2, 3)), "arithmetic": 3}[task]
        if len(keys) < size:
            return groups
        own = [keys.pop() for _ in range(size)]
        if task == "recall":
            values = [rng.choice(VALUES)]
        elif task == "tracking":
            values = own[1:] + [rng.choice(VALUES)]
        else:
            values = [rng.choice(_ADDENDS) for _ in own]
        groups.append(list(zip(own, values, strict=True)))


def question_text(task: Task, group: Sequence[tuple[str, str]]) -> tuple[str, str]:
    """Prompt and answer about one group of facts; prompt + answer is one line."""
    if task == "recall":
        return f"ask {group[0][0]}", f" {group[0][1]}\n"
    if task == "tracking":
        return f"trace {group[0][0]}", "".join(f" {value}" for _, value in group) + "\n"
    total = int(group[0][1])
    answer = f" {group[0][0]} {group[0][1]}"
    for key, value in group[1:]:
        total += int(value)
        answer += f" + {key} {value} = {total}"
    return "add" + "".join(f" {key}" for key, _ in group), answer + "\n"


def _encode(tokenizer: PreTrainedTokenizerBase, lines: list[str]) -> list[list[int]]:
    return tokenizer(lines, add_special_tokens=False)["input_ids"] if lines else []


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def _decoys(facts: Sequence[tuple[str, str]], count: int, rng: random.Random) -> list[str]:
    """Records that look like the facts but carry the other marker."""
    taken = {key for key, _ in facts}
    free = [key for key in KEYS if key not in taken] or list(KEYS)
    fact_keys = sorted(taken) or list(KEYS)
    values = [value for _, value in facts] or list(VALUES)
    return [
        f"skip {rng.choice(fact_keys if rng.random() < _SAME_KEY_SHARE else free)}"
        f" {rng.choice(values)}\n"
        for _ in range(count)
    ]


def _lines_up_to(
    tokenizer: PreTrainedTokenizerBase, budget: int, split: Split, rng: random.Random
) -> list[list[int]]:
    """Encoded source lines with at most `budget` tokens together, none that looks like a record."""
    # A docstring's line can begin with "keep" or "add" at the first column.
    stream = (line for line in text_lines(split, rng) if line.split(" ")[0] not in MARKERS)
    lines: list[list[int]] = []
    left = budget
    while True:
        # Several lines per call: the tokenizer's call overhead is larger than a line's cost.
        for ids in _encode(tokenizer, [next(stream) for _ in range(4 + left // 12)]):
            if len(ids) > left:
                return lines
            lines.append(ids)
            left -= len(ids)


def _text_ids(
    tokenizer: PreTrainedTokenizerBase, length: int, split: Split, rng: random.Random
) -> list[int]:
    ids = _bos(tokenizer)
    while len(ids) < length:
        for line in _lines_up_to(tokenizer, length, split, rng):
            ids += line
    return ids[:length]


def _scatter(
    text: list[list[int]], records: list[list[int]], rng: random.Random
) -> list[tuple[list[int], bool]]:
    """Put the records, in random order, at uniformly drawn token positions between the lines.

    Returns (ids of one line, whether it is a record).
    """
    total = sum(map(len, text))
    places = sorted(rng.randrange(total + 1) for _ in records)
    shuffled = rng.sample(records, len(records))
    mixed: list[tuple[list[int], bool]] = []
    position = 0
    for line in text:
        while places and places[0] <= position:
            places.pop(0)
            mixed.append((shuffled.pop(), True))
        mixed.append((line, False))
        position += len(line)
    return mixed + [(record, True) for record in shuffled]


def _context_lines(
    groups: Sequence[Sequence[tuple[str, str]]],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    split: Split,
    rng: random.Random,
) -> list[tuple[list[int], bool]]:
    """Lines, as `_scatter` returns them, of exactly `length` tokens that hold all the facts."""
    facts = [fact for group in groups for fact in group]
    decoys = _decoys(facts, int(length * _DECOY_SHARE / _RECORD_TOKENS), rng)
    records = _encode(tokenizer, [f"keep {key} {value}\n" for key, value in facts] + decoys)
    text = _lines_up_to(tokenizer, length - sum(map(len, records)), split, rng)
    # The next source line did not fit: decoys and blank lines make the length exact.
    gap = length - sum(map(len, text)) - sum(map(len, records))
    for extra in _encode(tokenizer, _decoys(facts, gap // _RECORD_TOKENS, rng)):
        if len(extra) <= gap:
            records.append(extra)
            gap -= len(extra)
    lines = _scatter(text, records, rng)
    (newline,) = _encode(tokenizer, ["\n"])
    for _ in range(gap):
        lines.insert(rng.randrange(len(lines) + 1), (newline, False))
    return lines


def _episode(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    questions: int,
    rng: random.Random,
) -> Episode:
    bos = _bos(tokenizer)
    groups = make_facts(task, max(3, int(length * _FACT_SHARE / _RECORD_TOKENS)), rng)
    lines = _context_lines(groups, tokenizer, length - len(bos), "held_out", rng)
    context = bos + [token for ids, _ in lines for token in ids]
    asked = rng.sample(groups, min(questions, len(groups)))
    texts = [text for group in asked for text in question_text(task, group)]
    ids = _encode(tokenizer, texts)
    turns = [Question(*pair) for pair in zip(ids[::2], ids[1::2], strict=True)]
    return Episode(task, context, turns)


def _task_document(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    fact_share: float,
    rng: random.Random,
) -> Document:
    """A context that is asked about each group of facts once, half between its lines."""
    bos = _bos(tokenizer)
    groups = make_facts(task, max(3, int(length * fact_share / _RECORD_TOKENS)), rng)
    texts = _encode(tokenizer, [text for group in groups for text in question_text(task, group)])
    turns = list(zip(texts[::2], texts[1::2], strict=True))
    room = length - len(bos) - sum(map(len, texts))
    lines = _context_lines(groups, tokenizer, room, "train", rng)
    # A group can be asked for after the line that holds its last fact.
    numbers = {tuple(ids): number for number, (ids, is_record) in enumerate(lines) if is_record}
    due: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        facts = _encode(tokenizer, [f"keep {key} {value}\n" for key, value in group])
        known = max(numbers[tuple(ids)] for ids in facts)
        after = rng.randrange(known, len(lines)) if rng.random() < 0.5 else len(lines) - 1
        due.setdefault(after, []).append(index)

    document = Document(list(bos), ["text"] * len(bos))
    for number, (line, is_record) in enumerate(lines):
        document.append(line, "record" if is_record else "text")
        for index in rng.sample(due.get(number, []), len(due.get(number, []))):
            document.append(turns[index][0], "prompt")
            document.append(turns[index][1], "answer")
    return document
