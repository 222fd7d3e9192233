# SPDX-License-Identifier: Apache-2.0
"""The mathematics of DMS on plain tensors. Imported by name when first used: `row_bytes` needs no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelopt_dms.kernels.importance import ResidualStream, output_change
    from modelopt_dms.kernels.reference import (
        Prompt,
        Scoring,
        assign_slots,
        hard_keep_logprob,
        masked_attention,
        merge_partials,
        partial_attention,
        prefill_attention,
        prefill_partial,
        shift_decisions,
        with_sinks,
    )

__all__ = [
    "Prompt",
    "ResidualStream",
    "Scoring",
    "assign_slots",
    "hard_keep_logprob",
    "masked_attention",
    "merge_partials",
    "output_change",
    "partial_attention",
    "prefill_attention",
    "prefill_partial",
    "shift_decisions",
    "with_sinks",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "importance" if name in ("ResidualStream", "output_change") else "reference"
    globals()[name] = found = getattr(import_module(f"{__name__}.{home}"), name)
    return found
