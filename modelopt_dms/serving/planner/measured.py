# SPDX-License-Identifier: Apache-2.0
"""Sequences that fit one GPU, dense and with DMS, of a model whose compression ratio was measured. For reports."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelopt_dms.serving.planner.capacity import Plan, PlanRow, plan_as
from modelopt_dms.serving.planner.hardware import gpu_of
from modelopt_dms.serving.planner.model_shape import ModelShape, PlanError, shape_of
from modelopt_dms.serving.planner.plan_recipe import planned_by_config

CONTEXTS = (4096, 8192, 32768, 131072)
LONGEST = 32768  # where a model does not say how much it can read
UTILIZATION = 0.9


def capacity(directory: Path, gpu: str, ratio: float, length: int) -> dict[str, Any]:
    """Sequences that fit, for a table: dense, DMS, and DMS with FP8 rows, by context.

    The share of tokens that was evicted is taken to be the same at every context, so the ratio grows with it.

    Args:
        directory: of a model that `compress` saved.
        gpu: of the planner's table.
        ratio: context over resident tokens that the model had.
        length: tokens of the context at which it had it.

    Raises:
        PlanError: an unknown GPU, or a build of model that the planner does not know.
    """
    shape, card = shape_of(str(directory)), gpu_of(gpu)
    planned = planned_by_config(f"{shape.name}, measured", shape.dms)
    if planned.retention is None:
        raise PlanError(f"{directory} evicts nothing")
    # Rounded down: what was reached by a hair must still be reachable.
    measured = math.floor(100 * ratio) / 100
    kept = replace(planned.retention, target_cr=measured, length=length)
    own = replace(planned, retention=kept)
    contexts = _contexts(shape, length)
    how: dict[str, Any] = {"tp": (1,), "batch": None, "memory_utilization": UTILIZATION}
    plans = [plan_as(shape, own, card, x, **how) for x in contexts]
    return {
        "gpu": card.title,
        "source": card.source,
        "memory_utilization": UTILIZATION,
        "ratio": measured,
        "length": length,
        "note": plans[0].note,
        "contexts": contexts,
        "rows": [_row(name, words, plans) for name, words in _shown(measured).items()],
    }


def _contexts(shape: ModelShape, length: int) -> list[int]:
    most = shape.max_length or LONGEST
    return [length, *(x for x in CONTEXTS if length < x <= most)]


def _shown(ratio: float) -> dict[str, str]:
    """Variants of a plan, and what a report calls them."""
    return {
        "dense": "full cache",
        f"DMS {ratio:g}x": "DMS",
        f"DMS {ratio:g}x, FP8": "DMS, FP8 rows",
    }


def _row(variant: str, words: str, plans: list[Plan]) -> dict[str, Any]:
    found: list[PlanRow] = [
        next(x for x in plan.rows if x.variant.removesuffix(" *") == variant) for plan in plans
    ]
    return {
        "variant": words,
        "sequences": [x.sequences for x in found],
        "kv_bytes": [x.kv_bytes for x in found],
        "compression_ratio": [x.compression_ratio for x in found],
    }
