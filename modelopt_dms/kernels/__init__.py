# SPDX-License-Identifier: Apache-2.0
"""The mathematics of DMS on plain tensors."""

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
