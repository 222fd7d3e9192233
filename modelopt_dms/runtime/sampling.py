# SPDX-License-Identifier: Apache-2.0
"""Which token comes next: greedy, or drawn with a temperature from the most probable ones."""

import torch
from torch import Tensor

from modelopt_dms.runtime.manifest import EngineError


class Sampler:
    """Chooses the next tokens of the rows of a batch.

    Attributes:
        temperature: 0 is greedy.
        top_p: draw from the fewest most probable tokens that have at least this probability together.
    """

    def __init__(self, temperature: float, top_p: float, seed: int, batch: int) -> None:
        if not temperature >= 0:
            raise EngineError(f"temperature={temperature} must be 0 (greedy) or more")
        if not 0 < top_p <= 1:
            raise EngineError(f"top_p={top_p} must be more than 0 and at most 1")
        self.temperature = temperature
        self.top_p = top_p
        # One a row: a prompt draws the same tokens whatever else is in the batch. On the CPU wherever the logits
        # are: a seed means the same numbers everywhere.
        self._generators = [torch.Generator().manual_seed(seed) for _ in range(batch)]

    def choose(self, logits: Tensor, rows: list[int]) -> list[int]:
        """The next token of these rows, whose logits are [n, V]; waits for the device."""
        if self.temperature == 0:
            return logits.argmax(-1).tolist()
        numbers = [torch.rand(1, generator=self._generators[x], dtype=torch.float64) for x in rows]
        scaled = logits.double() / self.temperature
        probability, order = scaled.softmax(-1).sort(stable=True, dim=-1, descending=True)
        before = probability.cumsum(-1) - probability
        kept = torch.where(before < self.top_p, probability, 0.0)  # the first is always kept
        total = kept.cumsum(-1)
        drawn = torch.stack(numbers).to(logits.device)  # [n, 1]
        at = (total <= drawn * total[:, -1:]).sum(-1, keepdim=True)
        last = (kept > 0).sum(-1, keepdim=True) - 1
        return order.gather(-1, torch.minimum(at, last))[:, 0].tolist()
