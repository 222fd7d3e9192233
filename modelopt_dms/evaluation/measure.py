# SPDX-License-Identifier: Apache-2.0
"""Tasks by name: what a model is asked, and what it answers, in parts that can be measured one by one."""

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.evaluation.conversations import make_conversations
from modelopt_dms.evaluation.gsm_symbolic import make_gsm_symbolic
from modelopt_dms.evaluation.names import (
    CHATS,
    GSM_SYMBOLIC,
    RULER_EXACT,
    RULER_OPEN,
    TEXT,
    check_tasks,
)
from modelopt_dms.evaluation.ruler import make_prompts
from modelopt_dms.evaluation.ruler_open import OpenPrompt, make_open_prompts
from modelopt_dms.evaluation.score import (
    ACCURACY,
    BATCH,
    PERPLEXITY,
    Part,
    Score,
    add_up,
    batches_of,
    exact_part,
    open_part,
    text_part,
    texts_of,
)
from modelopt_dms.evaluation.tasks import held_out_text, make_episodes

QUESTIONS = (
    24  # in a conversation, if its context has facts for so many: reading costs more than asking
)


def metric_of(task: str) -> str:
    """How a task is scored: "perplexity" of "text", else "accuracy"."""
    return PERPLEXITY if task == TEXT else ACCURACY


def parts_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    length: int,
    count: int,
    seed: int,
) -> list[Callable[[], Part]]:
    """What measures one task at one length, a few samples at a time: exact answers, generated ones, or loss.

    Raises:
        ValueError: an unknown task, or a length that has no room for it.
    """
    asked = material_of(tokenizer, task, length, count, seed)
    if task == TEXT:
        return [partial(text_part, model, batch) for batch in texts_of(asked)]
    if task in (*RULER_OPEN, GSM_SYMBOLIC):
        return [partial(_open, model, tokenizer, prompt) for prompt in asked]
    return [partial(exact_part, model, batch) for batch in batches_of(asked, BATCH)]


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    length: int,
    count: int,
    seed: int,
) -> Score:
    """The score of one task at one length.

    Args:
        model: a causal LM in eval mode; plain ones report a dense cache.
        tokenizer: the model's.
        task: one of `evaluation.names.EVALUATIONS`.
        length: context tokens.
        count: conversations, prompts or texts.
        seed: draws them.

    Raises:
        ValueError: an unknown task, no samples, or a length that has no room for it.
    """
    parts = parts_of(model, tokenizer, task, length, count, seed)
    return add_up(metric_of(task), [part() for part in parts])


def material_of(
    tokenizer: PreTrainedTokenizerBase, task: str, length: int, count: int, seed: int
) -> Any:
    """What a model is asked in a task: texts, prompts or episodes.

    Raises:
        ValueError: an unknown task, or a length that has no room for it.
    """
    (task,) = check_tasks([task])
    where: Any = (tokenizer, length, count, seed)
    if task == TEXT:
        return held_out_text(*where)
    make: dict[str, Any] = {GSM_SYMBOLIC: make_gsm_symbolic}
    make |= dict.fromkeys(RULER_OPEN, make_open_prompts)
    make |= dict.fromkeys(CHATS, make_conversations)
    make |= dict.fromkeys(RULER_EXACT, make_prompts)
    if task in make:
        return make[task](task, *where)
    return make_episodes(_name(task), tokenizer, length, count, seed, QUESTIONS)


def _open(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: OpenPrompt) -> Part:
    return open_part(model, tokenizer, prompt)[0]


def _name(task: str) -> Any:
    """A checked name, for functions that take a literal."""
    return task
