# SPDX-License-Identifier: Apache-2.0
"""The mathematics of DMS on plain tensors. Knows neither transformers nor modelopt."""

from modelopt_dms.ops.importance import output_change
from modelopt_dms.ops.reference import (
    Scoring,
    assign_slots,
    decode_attention,
    merge_partials,
    partial_attention,
    past_bias,
    prefill_attention,
    prefill_partial,
    shift_decisions,
    with_sinks,
)

__all__ = [
    "Scoring",
    "assign_slots",
    "decode_attention",
    "merge_partials",
    "output_change",
    "partial_attention",
    "past_bias",
    "prefill_attention",
    "prefill_partial",
    "shift_decisions",
    "with_sinks",
]
