# SPDX-License-Identifier: Apache-2.0
"""The section `dms`: what a DMS model is. Stored with the model."""

from typing import Literal

from pydantic import Field, field_validator

from modelopt_dms.config.section import LONGEST, Section


class DMSConfig(Section):
    """What a DMS model is, as far as its weights do not tell. Stored with the model."""

    target_cr: float = Field(default=4.0, ge=1.0, title="Target compression ratio")
    """Wanted ratio of context to resident tokens in the KV cache, reached at the length trained on."""
    window: int = Field(default=256, ge=1, le=LONGEST, title="Delay window in tokens")
    """A token marked for eviction stays readable until it is more than this many tokens old."""
    gate: Literal["adapter", "residual", "neuron"] = Field(
        default="adapter", title="Gate parameterisation"
    )
    """'adapter': one zero-initialised linear row per KV head on the attention's input. 'residual': the same on the
    normed residual stream (NVIDIA's checkpoints). 'neuron': one dimension of the first query head of each KV group is
    read as the eviction logit and zeroed.
    """
    granularity: Literal["head", "layer"] = Field(default="head", title="Granularity of decisions")
    """'head': one decision per KV head. 'layer': all KV heads of a layer share one."""
    scale: float = Field(default=100.0, gt=0.0, title="Logit scale")
    """z = scale * (w . x) - offset. A large scale lets small weight changes move the gate."""
    offset: float = Field(default=5.0, title="Logit offset")
    """Subtracted from the logit, so that an untrained gate evicts nothing."""
    threshold: float = Field(default=0.0, title="Eviction threshold")
    """A token is marked for eviction when its logit is above this value."""
    decision_shift: Literal[0, 1] = Field(default=0, title="Decision shift")
    """0: a token's own logit decides about it. 1: the next token's logit does (NVIDIA's checkpoints)."""
    protect_first: int = Field(default=0, ge=0, le=LONGEST, title="Protected first tokens")
    """This many tokens at the start of every sequence are never evicted."""
    neuron_dim: int = Field(default=0, ge=0, title="Borrowed dimension")
    """Which dimension of the query head the 'neuron' gate borrows."""
    evict: bool = Field(default=True, title="Evict")
    """False: the gates are there, and nothing is evicted (NVIDIA's dms_disable_eviction)."""
    layers: list[str] = Field(default=["*"], title="Layers")
    """Wildcards of attention module names to convert; full-attention layers only."""

    @field_validator("layers")
    @classmethod
    def _at_least_one_pattern(cls, value: list[str]) -> list[str]:
        if not value:
            raise ValueError("layers must name at least one wildcard, for example ['*']")
        return value
