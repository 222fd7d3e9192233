# SPDX-License-Identifier: Apache-2.0
"""The section `quantize`: ModelOpt's own, and what to calibrate ranges with."""

from collections.abc import Mapping
from typing import Any

from modelopt.torch.quantization.config import QuantizeConfig
from pydantic import field_validator

from modelopt_dms.config.sections import QuantizeOptions


class QuantizationConfig(QuantizeOptions, QuantizeConfig):
    """ModelOpt's own section (`quant_cfg`, `algorithm`), and what calibrates it."""

    @field_validator("quant_cfg", mode="before")
    @classmethod
    def _integer_keys(cls, value: Any) -> Any:
        # JSON, and so a model's config.json, has no integer keys: block_sizes {-1: 16} comes back as {"-1": 16}.
        return _with_integer_keys(value)


def _with_integer_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            int(key)
            if isinstance(key, str) and key.lstrip("-").isdigit()
            else key: _with_integer_keys(x)
            for key, x in value.items()
        }
    return [_with_integer_keys(x) for x in value] if isinstance(value, list) else value


def quantization_to_dict(config: QuantizationConfig) -> dict[str, Any]:
    """A QuantizationConfig as plain values; single quantizers say only what they set."""
    data = config.model_dump(exclude_none=True)
    return data | config.model_dump(include={"quant_cfg"}, exclude_unset=True)
