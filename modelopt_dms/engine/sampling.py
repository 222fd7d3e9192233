# SPDX-License-Identifier: Apache-2.0
"""Which token comes next: greedy, or drawn with a temperature from the most probable ones. Knows logits only."""

from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_dms.engine.errors import EngineError


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are chosen.

    Attributes:
        temperature: 0 is greedy.
        top_p: draw from the fewest most probable tokens that have at least this probability together.
        seed: the same seed draws the same tokens, whatever else is generated at the same time.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise EngineError(f"temperature={self.temperature} must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise EngineError(f"top_p={self.top_p} must be more than 0 and at most 1")


class Sampler:
    """A request's choices, one after the other."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        # On the CPU wherever the logits are: a seed means the same numbers everywhere.
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def draw(self) -> float:
        """The next number in [0, 1)."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


def choose(logits: Tensor, samplers: list[Sampler]) -> list[int]:
    """The next token of each row of logits [n, V]; waits for the device."""
    chosen: list[int] = logits.argmax(-1).tolist()
    drawn = [i for i, x in enumerate(samplers) if x.sampling.temperature > 0]
    if drawn:
        tokens = _sample(logits[drawn], [samplers[i] for i in drawn]).tolist()
        for i, token in zip(drawn, tokens, strict=True):
            chosen[i] = token
    return chosen


def _sample(logits: Tensor, samplers: list[Sampler]) -> Tensor:
    """Tokens [n] drawn from logits [n, V]."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

    temperature = column([x.sampling.temperature for x in samplers])
    top_p = column([x.sampling.top_p for x in samplers])
    probability, order = (
        (logits.double() / temperature).softmax(-1).sort(stable=True, dim=-1, descending=True)
    )
    before = probability.cumsum(-1) - probability
    kept = torch.where(before < top_p, probability, 0.0)  # the first is always kept
    total = kept.cumsum(-1)
    at = (total <= column([x.draw() for x in samplers]) * total[:, -1:]).sum(-1, keepdim=True)
    last = (kept > 0).sum(-1, keepdim=True) - 1
    return order.gather(-1, torch.minimum(at, last))[:, 0]
