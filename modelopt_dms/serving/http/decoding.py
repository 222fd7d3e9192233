# SPDX-License-Identifier: Apache-2.0
"""What OpenAI's fields do to decoding that transformers has no setting for. Knows nothing about HTTP."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria

# Tokens that may stand in an answer without a byte of text, or hold a part of a character.
_SLACK = 16


@dataclass(frozen=True)
class Asked:
    """Fields of a request that are not fields of a GenerationConfig.

    Attributes:
        seed: of its sampling.
        stop: strings that end the answer, and are not part of it.
        presence_penalty: taken from the logits of every token that the answer has.
        frequency_penalty: likewise, as often as the answer has it.
        include_usage: whether a stream ends with a count of tokens.
    """

    seed: int | None = None
    stop: tuple[str, ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    include_usage: bool = False


class CountPenalties(LogitsProcessor):
    """OpenAI's penalties: logit - count * frequency_penalty - (count > 0) * presence_penalty.

    Counts are of the answer so far, not of the prompt (https://platform.openai.com/docs/api-reference/chat/create).
    """

    def __init__(self, prompt_length: int, asked: Asked) -> None:
        """Take the length of the prompt in tokens, and the penalties."""
        self.prompt_length = prompt_length
        self.presence, self.frequency = asked.presence_penalty, asked.frequency_penalty

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V] of the token behind `input_ids` [B, T], with penalties."""
        answer = input_ids[:, self.prompt_length :]
        ones = torch.ones_like(answer, dtype=scores.dtype)
        counts = torch.zeros_like(scores).scatter_add_(1, answer, ones)
        return scores - self.frequency * counts - self.presence * (counts > 0)


class StopInAnswer(StoppingCriteria):
    """Ends an answer that holds a stop string; transformers' criterion also looks at the end of the prompt."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_length: int, stop: tuple[str, ...]
    ) -> None:
        """Take the length of the prompt in tokens, and the strings."""
        self.tokenizer, self.prompt_length, self.stop = tokenizer, prompt_length, stop
        # Every token is a byte at least; what is further back has been looked at before.
        self.window = max(len(x.encode()) for x in stop) + _SLACK
        self.hit = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether the sequence [1, T] ends: bool [1]."""
        answer = input_ids[0, self.prompt_length :][-self.window :]
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        self.hit = any(x in text for x in self.stop)
        return torch.tensor([self.hit], device=input_ids.device)


class StopCut:
    """Lets a text through piece by piece up to the first stop string, and holds back what may be the start of one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        """Take the strings."""
        self.stop, self.held, self.ended = stop, "", False

    def feed(self, piece: str) -> str:
        """What may be shown once this piece has come."""
        if self.ended:
            return ""
        self.held += piece
        found = [at for x in self.stop if (at := self.held.find(x)) >= 0]
        if found:
            shown, self.held, self.ended = self.held[: min(found)], "", True
            return shown
        kept = max((_overlap(self.held, x) for x in self.stop), default=0)
        shown, self.held = self.held[: len(self.held) - kept], self.held[len(self.held) - kept :]
        return shown

    def rest(self) -> str:
        """What was held back, once nothing more comes."""
        shown, self.held = self.held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that a stop string begins with."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
