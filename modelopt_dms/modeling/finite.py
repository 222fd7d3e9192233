# SPDX-License-Identifier: Apache-2.0
"""Refuses weights with which nothing can be computed."""

import torch
from torch import Tensor, nn

# The square of a larger number is not finite in float32, and norms square what they read.
LARGEST_WEIGHT = 1e18


class WeightError(ValueError):
    """A weight that holds NaN, infinity or an absurd number; the message names it."""


def check_weights(model: nn.Module, where: str = "") -> None:
    """Refuse a model if a parameter or buffer, of a gate too, holds what no weight can be.

    Tensors that are not in memory (`meta`) are not looked at.

    Args:
        model: any.
        where: what the model is called in the message.

    Raises:
        WeightError: with the first such tensor's name, and how many there are.
    """
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    bad = [(name, found) for name, x in named.items() if (found := _worst(x)) is not None]
    if bad:
        name, value = bad[0]
        others = f" (and {len(bad) - 1} other tensors)" if len(bad) > 1 else ""
        raise WeightError(
            f"{where or type(model).__name__}: {name} holds {value:g}{others}; every weight must be a finite number of "
            f"at most {LARGEST_WEIGHT:g}"
        )


@torch.no_grad()
def _worst(x: Tensor) -> float | None:
    """A number that is not finite or too large, or None."""
    if x.is_meta or not x.is_floating_point() or not x.numel():
        return None
    # Masks and scores of a model's own may be -inf or the lowest number of their dtype; they have no rows.
    values = x.detach()
    if values.element_size() == 1:  # no order is defined on 8 bits
        values = values.float()
    low, high = (float(v) for v in torch.aminmax(values))
    for value in (low, high):
        if not abs(value) <= LARGEST_WEIGHT:  # nan compares as False
            return value
    return None
