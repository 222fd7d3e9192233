# SPDX-License-Identifier: Apache-2.0
"""How much a model evicts, and the loss that asks for more. Shapes: B batch, T tokens, K KV heads."""

from collections.abc import Mapping

import torch
from torch import Tensor


def mean_decision(decisions: Mapping[int, Tensor], counted: Tensor) -> Tensor:
    """Mean of decisions [B, K, T] over all layers, KV heads and counted tokens [B, T], float32; 0 if none count."""
    counted = counted.unsqueeze(1)  # [B, T] -> [B, 1, T]
    total = torch.stack(
        [(x.to(counted.device).float() * counted).sum() for x in decisions.values()]
    ).sum()
    heads = sum(x.shape[1] for x in decisions.values())
    return total / (counted.sum() * heads).clamp(min=1)


def rate_loss(evicted_fraction: Tensor, target: float) -> Tensor:
    """One-sided: max(0, target - evicted_fraction). Evicting more than asked for costs nothing here."""
    return (target - evicted_fraction).clamp(min=0.0)
