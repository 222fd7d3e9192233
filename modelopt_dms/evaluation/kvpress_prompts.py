# SPDX-License-Identifier: Apache-2.0
"""Prompts as kvpress' evaluation asks them: of RULER's families made here, or of the rows of one of its data sets.

A context is read, and cut, before its question is known; the answer is generated greedily behind a begun answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelopt_dms.data import DataError
from modelopt_dms.data.files import read_table
from modelopt_dms.evaluation.names import RULER_EXACT, RULER_OPEN
from modelopt_dms.evaluation.ruler import chat_frame, encoder, make_prompts
from modelopt_dms.evaluation.ruler_open import OpenPrompt, make_open_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What RULER calls the families of `evaluation.names`; needles are those whose haystack is prose.
RULER_NAMES = {
    "needle": "niah_single_2",
    "multikey": "niah_multikey_1",
    "multivalue": "niah_multivalue",
    "multiquery": "niah_multiquery",
    **{x: x for x in RULER_OPEN if x != "multiquery"},
}
NEEDLE_TOKENS = 128  # that an answer about needles may take, of RULER
COLUMNS = ("context", "question", "answer_prefix", "answer", "task", "max_new_tokens")


@dataclass(frozen=True)
class TextPrompt:
    """A prompt, and what kvpress keeps of it.

    Attributes:
        task: RULER's name, or the data set's.
        question: text.
        answer_prefix: how the answer begins.
        prompt: the same as token ids, with the words that an answer must have.
    """

    task: str
    question: str
    answer_prefix: str
    prompt: OpenPrompt


def own_prompts(
    task: str, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int
) -> list[TextPrompt]:
    """Prompts of a family, the same that `eval` asks; answers that it checks word by word are generated here.

    Args:
        task: of RULER_EXACT or RULER_OPEN.
        tokenizer: the model's.
        length: tokens of a prompt, the answer apart.
        count: how many.
        seed: draws them.
    """
    where: Any = (task, tokenizer, length, count, seed)
    prompts = _generated(*where) if task in RULER_EXACT else make_open_prompts(*where)
    _, tail = chat_frame(tokenizer)
    found = []
    for x in prompts:
        question, _, begun = str(tokenizer.decode(x.prompt_ids)).rpartition(tail)
        found.append(TextPrompt(RULER_NAMES[task], question.removeprefix("\n"), begun, x))
    return found


def _generated(task: Any, tokenizer: PreTrainedTokenizerBase, *where: Any) -> list[OpenPrompt]:
    """Prompts whose answers `evaluation.ruler` gives word by word, to be generated."""
    found = []
    for episode in make_prompts(task, tokenizer, *where):
        wanted = (str(tokenizer.decode(x.answer_ids)).strip() for x in episode.questions)
        asked = episode.questions[0].prompt_ids
        about = (task, episode.context_ids, asked, tuple(wanted), NEEDLE_TOKENS)
        found.append(OpenPrompt(*about))
    return found


def dataset_prompts(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[TextPrompt]:
    """The rows of a .parquet or .jsonl file with kvpress' columns, in the model's chat template, without thinking.

    Raises:
        DataError: a column is missing or a row has another type; the message names it.
    """
    encode = encoder(tokenizer)
    head, tail = chat_frame(tokenizer)
    return [_of_row(row, encode, head, tail) for row in dataset_rows(path)]


def dataset_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of such a file, checked; needs no tokenizer.

    Raises:
        DataError: a column is missing or a row has another type; the message names it.
    """
    rows = read_table(path, COLUMNS)
    for number, row in enumerate(rows):
        _check_row(row, f"{path} row {number}")
    return rows


def _check_row(row: Mapping[str, Any], where: str) -> None:
    for name in ("context", "question", "answer_prefix", "task"):
        if not isinstance(row[name], str):
            raise DataError(f"{where}: {name} must be text, got {type(row[name]).__name__}")
    answers = _answers(row)
    if not answers or not all(isinstance(x, str) for x in answers):
        raise DataError(f"{where}: answer must be a text or a list of texts, got {row['answer']!r}")
    tokens = row["max_new_tokens"]
    if not isinstance(tokens, int) or tokens < 1:
        raise DataError(f"{where}: max_new_tokens must be a number of at least 1, got {tokens!r}")


def _answers(row: Mapping[str, Any]) -> list[Any]:
    return row["answer"] if isinstance(row["answer"], list) else [row["answer"]]


def _of_row(row: Mapping[str, Any], encode: Any, head: str, tail: str) -> TextPrompt:
    question, begun = row["question"], row["answer_prefix"]
    context, asked = encode(head + row["context"]), encode(question + tail + begun)
    prompt = OpenPrompt(row["task"], context, asked, tuple(_answers(row)), row["max_new_tokens"])
    return TextPrompt(row["task"], question, begun, prompt)
