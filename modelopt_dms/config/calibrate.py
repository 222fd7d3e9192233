# SPDX-License-Identifier: Apache-2.0
"""The section `calibrate`: how gates are fitted in closed form."""

from typing import Literal

from pydantic import Field, field_validator

from modelopt_dms.config.section import Section


class CalibrateConfig(Section):
    """How the gates are fitted, without training, to what future queries attend to."""

    samples: int = Field(default=64, ge=1, title="Samples")
    """Documents, or parts of them, to fit the gates to."""
    sample_length: int = Field(default=4096, ge=8, title="Tokens per sample")
    """Longer documents are cut; target_cr is met at this length."""
    batch_size: int = Field(default=1, ge=1, title="Samples per forward")
    """Shorter samples are padded."""
    held_out: int = Field(default=8, ge=1, title="Held-out samples")
    """From these come the thresholds, and the curve from compression ratio to quality."""
    budget: Literal["global", "uniform"] = Field(default="global", title="Who shares a budget")
    """'global': all heads compete, and some keep more than others. 'uniform': every head keeps as much."""
    ridge: float = Field(default=1e-3, gt=0.0, title="Ridge")
    """Penalty on the gates' weights, relative to the mean square of what they read."""
    curve: list[float] = Field(default=[1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0], title="Curve")
    """Compression ratios at which quality is measured; those in between are interpolated."""
    save_steps: int = Field(default=16, ge=1, title="Checkpoint interval")
    """Forwards between resumable checkpoints."""
    seed: int = Field(default=0, ge=0, title="Seed")
    """Draws the samples; same seed, same result."""

    @field_validator("curve")
    @classmethod
    def _above_one(cls, value: list[float]) -> list[float]:
        if not value or min(value) <= 1.0:
            raise ValueError("curve must list compression ratios above 1, for example [2, 4, 8]")
        return sorted(set(value))
