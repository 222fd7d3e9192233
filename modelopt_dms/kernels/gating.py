# SPDX-License-Identifier: Apache-2.0
"""Where the eviction decisions about one new token of every sequence come from. Tensors only.

Shapes: B sequences, K KV heads, C features.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Decided:
    """Decisions that somebody has made.

    Attributes:
        evict: [B, K] bool.
    """

    evict: Tensor

    def decide(self, heads: int) -> Tensor:
        """The decisions [B, K]."""
        return self.evict


@dataclass(frozen=True)
class LinearGate:
    """What it takes to decide in the same kernel that stores the token; see `gates.gate.EvictionGate.decide`.

    Attributes:
        features: what the logits are linear in [B, C], of any float dtype.
        weight: [K or 1, C] float32; one row is one decision for all KV heads.
        threshold: [K or 1] float32; above it, a token is evicted.
        positions: of the tokens [B or 1] int64.
        scale: of the logits.
        offset: of the logits.
        protect: tokens at positions below it decide for nothing: protect_first + decision_shift.
    """

    features: Tensor
    weight: Tensor
    threshold: Tensor
    positions: Tensor
    scale: float
    offset: float
    protect: int

    def decide(self, heads: int) -> Tensor:
        """The decisions [B, K] bool."""
        z = self.scale * F.linear(self.features.float(), self.weight.float()) - self.offset
        evict = (z > self.threshold) & (self.positions >= self.protect)[:, None]
        return evict.expand(-1, heads)


GateInput = Decided | LinearGate
