# SPDX-License-Identifier: Apache-2.0
"""Prompts of any accepted kind of data -> the token ids that a model continues. Knows no model."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from modelopt_dms.data import DataError
from modelopt_dms.data.chat import render_question
from modelopt_dms.data.documents import Records, open_records, tokenize
from modelopt_dms.data.records import Ids, Tokens


def tokenize_prompts(
    prompts: Any, tokenizer: PreTrainedTokenizerBase, count: int | None
) -> list[Tokens]:
    """The token ids that each of `count` traces starts with.

    Raises:
        DataError: prompts are missing, empty or not usable; names which.
    """
    if count is not None and count < 1:
        raise DataError(f"count={count} must be at least 1")
    records = open_records(prompts, "prompts")
    wanted = len(records) if count is None else count
    starts = [_prompt(records, i, tokenizer) for i in range(min(wanted, len(records)))]
    return [starts[i % len(starts)] for i in range(wanted)]


def _prompt(records: Records, index: int, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    content, label = records.read(index), records.label(index)
    if isinstance(content, Ids):
        pieces = list(content.documents)
    elif isinstance(content, str):
        pieces = list(tokenize(content, tokenizer, label, special=True))
    else:
        text = render_question(content, tokenizer, label)
        pieces = list(tokenize(text, tokenizer, label, special=False))
    if len(pieces) > 1:
        raise DataError(f"{label} is {len(pieces)} documents; expected one to continue")
    if not len(pieces[0]):
        raise DataError(f"{label} is empty; expected something to continue")
    return pieces[0]
