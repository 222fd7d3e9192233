# SPDX-License-Identifier: Apache-2.0
"""Prompts of any accepted kind of data -> the token ids that a model continues. Knows no model."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from modelopt_dms.data.chat import render_question
from modelopt_dms.data.documents import Tokens, check_ids, open_records, tokenize
from modelopt_dms.data.errors import DataError
from modelopt_dms.data.files import choose_column


def tokenize_prompts(
    prompts: Any, tokenizer: PreTrainedTokenizerBase, count: int | None
) -> list[Tokens]:
    """The token ids that each of `count` traces starts with.

    Raises:
        DataError: prompts are missing, empty or not usable; names which.
    """
    if count is not None and count < 1:
        raise DataError(f"count={count} must be at least 1")
    records, labels = open_records(prompts, "prompts")
    wanted = len(records) if count is None else count
    starts = []
    for index in range(min(wanted, len(records))):
        label = labels[index] if labels else f"prompts[{index}]"
        ids = _prompt(records[index], tokenizer, label)
        if not len(ids):
            raise DataError(f"{label} is empty; expected something to continue")
        starts.append(ids)
    return [starts[i % len(starts)] for i in range(wanted)]


def _prompt(record: Any, tokenizer: PreTrainedTokenizerBase, label: str) -> Tokens:
    column = choose_column(list(record), label) if isinstance(record, Mapping) else None
    content = record if column is None else record[column]
    if column == "messages":
        return tokenize(render_question(content, tokenizer, label), tokenizer, label, special=False)
    if isinstance(content, str):
        return tokenize(content, tokenizer, label, special=True)
    return check_ids(content, label)
