# SPDX-License-Identifier: Apache-2.0
"""What a report asks of a model: a text with facts, prompts and plain texts, in words that its tokenizer knows."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from modelopt_dms.data.installed_text import english, python_source
from modelopt_dms.evaluation.memories import Story, knows_records, records, story
from modelopt_dms.evaluation.ruler import make_prompts
from modelopt_dms.evaluation.tasks import Episode, held_out_text, make_episodes

QUESTIONS = 5  # about the text; of a record task, in each conversation


@dataclass(frozen=True)
class Material:
    """All that is asked.

    Attributes:
        told: the text with facts, and the questions about it.
        families: names of the tasks whose accuracy is measured.
        prompts: makes prompts of a family: (family, length, count, seed).
        texts: makes plain texts of exactly so many tokens by category: (length, seed).
    """

    told: Story
    families: tuple[str, ...]
    prompts: Callable[[str, int, int, int], list[Episode]]
    texts: Callable[[int, int], dict[str, list[int]]]


def material(tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> Material:
    """RULER's families and English; for tokenizers that know the words of our own tasks only, those."""
    if knows_records(tokenizer):
        return Material(
            records(tokenizer, length, seed, QUESTIONS),
            ("recall", "tracking"),
            lambda task, length, count, seed: make_episodes(
                _any(task), tokenizer, length, count, seed, QUESTIONS
            ),
            lambda length, seed: {"code": held_out_text(tokenizer, length, 1, seed)[0]},
        )
    return Material(
        story(tokenizer, length),
        ("needle", "multikey"),
        lambda family, *where: make_prompts(_any(family), tokenizer, *where),
        lambda length, seed: plain_texts(tokenizer, length, seed),
    )


def plain_texts(tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> dict[str, list[int]]:
    """Prose and code of so many tokens each, out of the part of Python's own text that is never calibrated on."""
    rng = random.Random(f"demo/{seed}")
    found = {}
    sources = {
        "prose": ["\n\n".join(x) for x in english("evaluation").values()],
        "code": list(python_source("evaluation").values()),
    }
    for kind, pieces in sources.items():
        rng.shuffle(pieces)
        # Characters enough for so many tokens of any tokenizer.
        ids = tokenizer("\n\n".join(pieces)[: 16 * length], verbose=False)["input_ids"]
        found[kind] = list(ids[:length])
    return found


def _any(name: str) -> Any:
    """A name that comes from `families`."""
    return name
