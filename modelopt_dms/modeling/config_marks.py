# SPDX-License-Identifier: Apache-2.0
"""What stands in config.json so that a DMS directory is loaded with its gates, or not at all."""

from typing import Any

# Where it is not registered, errors and warnings of transformers, lm-eval and vLLM show it.
QUANT_METHOD = "modelopt_dms (import modelopt_dms first)"
# What the error of transformers ends with.
GUARD = (
    "modelopt_dms: this model evicts from its KV cache; import modelopt_dms before loading it (if it is imported: "
    "config.json has lost its quantization_config)"
)
# What transformers reads as the attention to build a model with, whoever builds it. No function has this name, so that
# a model which is made of a DMS config, and not loaded by us, is refused: it would have no gates.
ATTENTION = "a DMS model's own: its gates are loaded by modelopt_dms.load(DIR)"
# Where another quant_method must stand, for the engines that read it.
GUARD_OF_EXPORTS = "modelopt_dms: this model evicts from its KV cache; load it by modelopt_dms.load"


def mark(config: Any) -> None:
    """Write into a model's config what makes a directory saved with it load with its gates, or not at all."""
    config.quantization_config = {"quant_method": QUANT_METHOD}
    config.fusion_config = {GUARD: True}
    config.attn_implementation = ATTENTION


def unmark(config: Any) -> None:
    """Take it out again, where we load the weights ourselves, or build the plain model on purpose."""
    for field in ("quantization_config", "fusion_config", "attn_implementation"):
        vars(config).pop(field, None)
    if getattr(config, "_attn_implementation", None) == ATTENTION:
        config._attn_implementation = None
