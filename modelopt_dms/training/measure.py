# SPDX-License-Identifier: Apache-2.0
"""What gates do to samples they never saw: how much they evict, and what that costs."""

from typing import Any

import torch
from torch import Tensor

from modelopt_dms.data.packing import Samples
from modelopt_dms.training.distill import Distiller, noise_seed


@torch.no_grad()
def measure(
    distiller: Distiller, held_out: Samples, batch_size: int, *, soft: bool = True
) -> dict[str, Any]:
    """Means over held-out samples, weighted by the tokens they are taken over, of relaxed decisions too if `soft`.

    The distiller is left in eval mode, or in training mode if `soft`; batch_size changes results only by rounding.

    Returns:
        kl, evicted_hard, evicted_by_layer with hard decisions; kl_soft, evicted_soft with relaxed ones.
    """
    sums: dict[str, Tensor] = {}
    valid = counted = 0
    for start in range(0, len(held_out), batch_size):
        batch = held_out.batch(slice(start, start + batch_size))
        n_valid = int((batch["tokens_ahead"] >= 0).sum())
        n_counted = int(distiller.counted(batch["position_ids"], batch["tokens_ahead"]).sum())
        hard = distiller.eval()(**batch, target=0.0, noise_seed=None)
        found = {"kl": hard["kl"] * n_valid}
        found |= {name: hard[name] * n_counted for name in ("evicted_hard", "evicted_by_layer")}
        if soft:
            relaxed = distiller.train()(**batch, target=0.0, noise_seed=_seed(distiller, start))
            found |= {
                "kl_soft": relaxed["kl"] * n_valid,
                "evicted_soft": relaxed["evicted_soft"] * n_counted,
            }
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value.double().cpu()
        valid, counted = valid + n_valid, counted + n_counted
    return {name: (x / (valid if "kl" in name else counted)).tolist() for name, x in sums.items()}


def _seed(distiller: Distiller, start: int) -> int | None:
    config = distiller.retrofit
    return noise_seed(config.seed, 0, config.steps, start) if config.noise else None
