# SPDX-License-Identifier: Apache-2.0
"""The section `quantize`: ModelOpt's own, and what to calibrate ranges with."""

from collections.abc import Mapping
from typing import Any, Literal

from modelopt.torch.opt.config import ModeloptField
from modelopt.torch.quantization.config import QuantizeConfig
from pydantic import field_validator

from modelopt_dms.config.section import Section


class QuantizationConfig(Section, QuantizeConfig):
    """ModelOpt's own section (`quant_cfg`, `algorithm`), and what calibrates it."""

    samples: int = ModeloptField(default=128, ge=1, title="Calibration samples")
    """Samples of the data from which ranges of activations, keys and values are measured."""
    sample_length: int = ModeloptField(default=512, ge=8, title="Tokens per calibration sample")
    """Longer ones are cut."""
    batch_size: int = ModeloptField(default=8, ge=1, title="Samples per forward")
    """While calibrating."""
    order: Literal["after_retrofit", "before_retrofit"] = ModeloptField(
        default="after_retrofit", title="When to quantize"
    )
    """'before_retrofit': the gates learn under fake quantization."""

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
