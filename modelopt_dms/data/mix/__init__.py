# SPDX-License-Identifier: Apache-2.0
"""Text to calibrate and retrofit on that the package makes itself: offline, the same for a seed, for any tokenizer.

    chat    questions about facts that stand far above, in the tokenizer's chat template
    prose   essays, stories, reports, letters and handbooks in `prose/`, written for this; and docstrings
    code    Python's standard library
    repeat  a passage, other text, and the passage again

What is not ours comes with Python (PSF-2.0), less what is set apart for evaluation, see `installed_text`;
other versions of Python give other documents.
"""

import random
from collections.abc import Callable, Iterator, Mapping

from transformers import PreTrainedTokenizerBase

from modelopt_dms.data import DataError
from modelopt_dms.data.mix.chats import chat
from modelopt_dms.data.mix.passages import code, prose, repeat
from modelopt_dms.data.mix.writing import SHORTEST, Asked, Document, Writer

__all__ = [
    "KINDS",
    "SHARES",
    "SHORTEST",
    "Asked",
    "Document",
    "calibration_documents",
    "calibration_mix",
]

KINDS: dict[str, Callable[[Writer], Document]] = {
    "chat": chat,
    "prose": prose,
    "code": code,
    "repeat": repeat,
}
SHARES: Mapping[str, float] = {"chat": 0.3, "prose": 0.45, "code": 0.15, "repeat": 0.1}


def calibration_mix(
    count: int,
    length: int,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    kinds: Mapping[str, float] = SHARES,
) -> list[list[int]]:
    """Documents of token ids for `compress(model, recipe, data=...)`.

    Args:
        count: how many.
        length: tokens of a document, about and at most.
        tokenizer: the model's; without a chat template, chats are plain "User:" and "Assistant:".
        seed: fixes every document, together with the tokenizer and Python's minor version.
        kinds: shares by kind, see `KINDS`; {"chat": 1} gives chats only.

    Raises:
        DataError: unknown kinds, shares that are not above 0, or a length below 32.
    """
    return [x.ids for x in calibration_documents(count, length, tokenizer, seed, kinds)]


def calibration_documents(
    count: int,
    length: int,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    kinds: Mapping[str, float] = SHARES,
) -> Iterator[Document]:
    """The same documents, one after the other, with their text and what is asked in it."""
    if length < SHORTEST:
        raise DataError(f"length is {length}, must be {SHORTEST} or more")
    unknown = [x for x in kinds if x not in KINDS]
    if unknown or not kinds:
        raise DataError(f"kinds are {list(kinds)}, must be some of {list(KINDS)}")
    if min(kinds.values()) <= 0:
        raise DataError(f"kinds are {dict(kinds)}; every share must be above 0")
    made = dict.fromkeys(kinds, 0)
    for _ in range(count):
        kind = min(kinds, key=lambda x: (made[x] + 1) / kinds[x])
        rng = random.Random(f"mix/{seed}/{kind}/{made[kind]}/{length}")
        made[kind] += 1
        yield KINDS[kind](Writer(tokenizer, rng, length))
