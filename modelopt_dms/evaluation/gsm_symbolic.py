# SPDX-License-Identifier: Apache-2.0
"""Word problems of several steps, to be solved in writing, behind worked examples that fill the context.

Problems are GSM-Symbolic's (arXiv 2410.05229): templates of GSM8K with names and numbers drawn anew, as many as
wanted, from the package reasoning-gym, without a download. An example is a question and its worked answer, which ends
with "#### 42", as GSM8K's do. What survives of the examples shows the form of an answer; its steps are written into
the cache that forgets.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from modelopt_dms.evaluation.names import GSM_SYMBOLIC
from modelopt_dms.evaluation.ruler import chat_frame, encoder, largest_that_fits
from modelopt_dms.evaluation.ruler_open import OpenPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER_TOKENS = 256
EXAMPLE = 40  # tokens, at least, of a question and its worked answer
INTRO = "Solve each problem step by step, and end with #### and the number."
NUMBER = r"-?\$?\d[\d,]*(?:\.\d+)?"
_FINAL = re.compile(rf"####\s*({NUMBER})")
_ANY = re.compile(NUMBER)
# A model may go on with a problem of its own.
_NEXT = re.compile(r"\n\s*Question:")


@dataclass(frozen=True)
class Problem(OpenPrompt):
    """A prompt whose answer ends with one number, which is `wanted`."""

    def share(self, said: str) -> float:
        """1 if the number behind the first "####" is the right one, or without that the last number; else 0."""
        own = _NEXT.split(said, maxsplit=1)[0]
        final = _FINAL.search(own)
        found = [final[1]] if final else _ANY.findall(own)
        return float(bool(found) and _value(found[-1]) == _value(self.wanted[0]))


def make_gsm_symbolic(
    task: str, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int
) -> list[OpenPrompt]:
    """Problems behind as many worked examples as fit into `length` tokens, the answer apart.

    Args:
        task: "gsm_symbolic".
        tokenizer: its chat template is used if it has one, without thinking.
        length: tokens of context and question.
        count: problems.
        seed: draws them and their examples; examples are problems of their own.

    Raises:
        ValueError: a question alone has no room.
    """
    create = import_module("reasoning_gym").create_dataset
    rng = random.Random(f"{task}/{length}/{seed}")
    number = max(1, length // EXAMPLE)
    drawn = (
        create(GSM_SYMBOLIC, size=1 + number, seed=rng.randrange(1 << 30)) for _ in range(count)
    )
    return [_prompt(list(x), tokenizer, length) for x in drawn]


def _prompt(
    problems: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, length: int
) -> OpenPrompt:
    """The first problem behind as many of the others, worked, as fit."""
    encode = encoder(tokenizer)
    head, tail = chat_frame(tokenizer)
    asked = encode(f"Question: {_plain(problems[0])}{tail}Answer:")
    examples = [_worked(x) for x in problems[1:]]

    def context(size: int) -> list[int]:
        return encode(f"{head}{INTRO}\n\n" + "".join(examples[:size]))

    size = largest_that_fits(
        length, lambda x: len(context(x)) + len(asked), f"{GSM_SYMBOLIC} problem"
    )
    wanted = (str(problems[0]["answer"]),)
    return Problem(GSM_SYMBOLIC, context(size), asked, wanted, ANSWER_TOKENS)


def _plain(problem: dict[str, Any]) -> str:
    """A question without the words on form that the package adds."""
    return str(problem["question"]).removesuffix(
        " Give the result as your final answer. Do not include units."
    )


def _worked(problem: dict[str, Any]) -> str:
    steps = str(problem["metadata"]["answer_cot"]).strip()
    return f"Question: {_plain(problem)}\nAnswer: {steps}\n\n"


def _value(number: str) -> float:
    return float(number.replace(",", "").replace("$", ""))
