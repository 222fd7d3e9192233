# SPDX-License-Identifier: Apache-2.0
"""The sections of a recipe, and what must hold between them. ModelOpt's own section is checked later."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from modelopt_dms.config.calibrate import CalibrateConfig
from modelopt_dms.config.compression_ratio import check_reachable
from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.config.export import ExportConfig
from modelopt_dms.config.retrofit import RetrofitConfig
from modelopt_dms.config.section import Section


class Metadata(BaseModel):
    """What a reader of a list of recipes sees."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    description: str = Field(default="", title="Description")
    """One line: what you get."""
    recipe_type: Literal["ptq"] | None = Field(default=None, title="ModelOpt's recipe type")
    """Stands in ModelOpt's own recipes."""


class QuantizeOptions(Section):
    """What a recipe's section `quantize` has besides ModelOpt's own keys."""

    samples: int = Field(default=128, ge=1, title="Calibration samples")
    """Samples of the data from which ranges of activations, keys and values are measured."""
    sample_length: int = Field(default=512, ge=8, title="Tokens per calibration sample")
    """Longer ones are cut."""
    batch_size: int = Field(default=8, ge=1, title="Samples per forward")
    """While calibrating."""
    order: Literal["after_retrofit", "before_retrofit"] = Field(
        default="after_retrofit", title="When to quantize"
    )
    """'before_retrofit': the gates learn under fake quantization."""


class UncheckedQuantize(QuantizeOptions):
    """The section `quantize` before ModelOpt is there to check its own keys."""

    quant_cfg: Any = None
    algorithm: Any = None


class Sections(BaseModel):
    """Everything `compress` does to a model; `Recipe` checks ModelOpt's section too."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, use_attribute_docstrings=True
    )

    metadata: Metadata = Field(default=Metadata(), title="Metadata")
    """For readers."""
    dms: DMSConfig | None = Field(default=None, title="DMS")
    """What a DMS model is; stored with the model. Without it the recipe only quantizes."""
    calibrate: CalibrateConfig | None = Field(default=None, title="Calibration")
    """How the gates are fitted to what future queries attend to, in one pass and without training."""
    retrofit: RetrofitConfig | None = Field(default=None, title="Retrofit")
    """How the gates learn, from scratch or from what calibration made of them."""
    quantize: UncheckedQuantize | None = Field(default=None, title="Quantization")
    """Weights, activations and KV cache, in ModelOpt's words."""
    export: ExportConfig | None = Field(default=None, title="Export")
    """What else is written to the output directory."""

    @model_validator(mode="before")
    @classmethod
    def _dms_unless_it_only_quantizes(cls, data: Any) -> Any:
        gated = ("calibrate", "retrofit")
        if isinstance(data, Mapping) and ("quantize" not in data or any(x in data for x in gated)):
            return {"dms": {}, **data}
        return data

    @model_validator(mode="after")
    def _something_learns(self) -> "Sections":
        learns = self.calibrate is not None or self.retrofit is not None
        if learns and self.dms is not None and not self.dms.evict:
            raise ValueError(
                "dms.evict=False evicts nothing, so there is nothing to calibrate or retrofit; use dms.evict=True, or "
                "leave the sections calibrate and retrofit out"
            )
        if self.calibrate is not None and self.dms is not None and self.dms.gate == "neuron":
            raise ValueError(
                "dms.gate='neuron' has no weights of its own to calibrate; use dms.gate='adapter', or only retrofit"
            )
        if self.retrofit is None or self.dms is None:
            return self
        if self.retrofit.train != "all" and self.dms.gate == "neuron":
            raise ValueError(
                "dms.gate='neuron' has no parameters of its own to train; use retrofit.train='all'"
            )
        early = self.quantize is not None and self.quantize.order == "before_retrofit"
        if self.retrofit.train == "lora" and early:
            raise ValueError(
                "retrofit.train='lora' cannot merge into quantized weights; use quantize.order='after_retrofit'"
            )
        if self.retrofit.cr_range is not None:
            if self.calibrate is None:
                raise ValueError(
                    "retrofit.cr_range needs the thresholds of calibrated gates; add a section calibrate"
                )
            highest = max([*self.calibrate.curve, self.dms.target_cr])
            if self.retrofit.cr_range[1] > highest:
                raise ValueError(
                    f"retrofit.cr_range={self.retrofit.cr_range} goes beyond what calibrate.curve measures, {highest:g}"
                )
        return self

    def check_ratios(self) -> None:
        """Refuse compression ratios that no training can reach at the length of the samples.

        Raises:
            ValueError: names the settings.
        """
        if self.dms is None:
            return
        target, window, protected = self.dms.target_cr, self.dms.window, self.dms.protect_first
        if self.calibrate is not None:
            length = self.calibrate.sample_length
            check_reachable(target, window, length, protected, "sample_length")
        if self.retrofit is not None:
            length = self.retrofit.sequence_length
            check_reachable(target, window, length, protected)
            if self.retrofit.cr_range is not None:
                highest = self.retrofit.cr_range[1]
                check_reachable(
                    highest, window, length, protected, wanted="the highest of cr_range"
                )
