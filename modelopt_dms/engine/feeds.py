# SPDX-License-Identifier: Apache-2.0
"""What the graphs take beside their state, made of batch slots. Knows nothing that runs them."""

import torch
from torch import Tensor

from modelopt_dms.engine.requests import Slot


def prefill_feeds(slot: Slot, start: int, end: int, chunk: int) -> dict[str, Tensor]:
    """For tokens start .. end of a prompt, padded on the left to a chunk."""
    padding = chunk - (end - start)
    return {
        "input_ids": torch.tensor([[0] * padding + list(slot.ids[start:end])]),
        "positions": torch.tensor([[0] * padding + list(range(start, end))]),
        "padding": torch.tensor([padding], dtype=torch.int32),
    }


def decode_feeds(slots: list[Slot], batch: int) -> dict[str, Tensor]:
    """For the next token of these batch slots; the others rest."""
    rows = [x.row for x in slots]
    ids, positions = (torch.zeros(batch, 1, dtype=torch.int64) for _ in range(2))
    active = torch.zeros(batch, dtype=torch.bool)
    ids[rows, 0] = torch.tensor([x.request.tokens[-1] for x in slots])
    positions[rows, 0] = torch.tensor([x.request.seen for x in slots])
    active[rows] = True
    return {"input_ids": ids, "positions": positions, "active": active}
