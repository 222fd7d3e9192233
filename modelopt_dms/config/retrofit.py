# SPDX-License-Identifier: Apache-2.0
"""The section `retrofit`: how gates, and weights if asked for, learn."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from modelopt_dms.config.reporting import Reporter, as_list
from modelopt_dms.config.section import Section


class RetrofitConfig(Section):
    """How the gates learn: distillation from the same model with eviction off, plus a rate loss."""

    steps: int = Field(default=500, ge=1, title="Optimizer steps")
    """Length of the retrofit."""
    sequence_length: int = Field(default=4096, ge=8, title="Tokens per sample")
    """Documents are packed to this length."""
    batch_size: int = Field(default=1, ge=1, title="Samples per device and micro-step")
    """Packed samples in one forward."""
    gradient_accumulation_steps: int = Field(default=1, ge=1, title="Gradient accumulation")
    """Micro-steps per optimizer step."""
    learning_rate: float = Field(default=1e-4, gt=0.0, title="Peak learning rate")
    """AdamW learning rate after warm-up."""
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        default="cosine", title="Learning-rate schedule"
    )
    """After warm-up: down to 0 along a half cosine or a line, or constant ('constant' has no warm-up)."""
    warmup_steps: int = Field(default=10, ge=0, title="Warm-up steps")
    """Steps of linear learning-rate warm-up; at most half of all steps."""
    weight_decay: float = Field(default=0.0, ge=0.0, title="Weight decay")
    """AdamW weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0.0, title="Gradient clipping")
    """Largest global gradient norm."""
    ramp_fraction: float = Field(default=0.7, ge=0.0, le=1.0, title="Ramp of the compression ratio")
    """The scheduled ratio rises linearly from 1 to target_cr over this fraction of the steps; 0 asks for all of it from
    the start, which suits calibrated gates.
    """
    rate_weight: float = Field(default=1.0, ge=0.0, title="Weight of the rate loss")
    """Loss = KL + weight * rate loss."""
    kl_direction: Literal["forward", "reverse"] = Field(
        default="forward", title="Direction of the distillation loss"
    )
    """'forward': KL(teacher || student). 'reverse': KL(student || teacher)."""
    kl_chunk_tokens: int = Field(default=1024, ge=1, title="Tokens per logits chunk")
    """Logits over the vocabulary exist for at most this many tokens at a time."""
    tau: float = Field(default=0.1, gt=0.0, title="Gumbel-sigmoid temperature")
    """alpha = sigmoid((z + logistic noise) / tau) while training."""
    noise: bool = Field(default=True, title="Logistic noise")
    """Sample the relaxed decision while training."""
    cr_range: list[float] | None = Field(default=None, title="Range of compression ratios")
    """[lowest, highest]: every step draws the ratio it trains for, and thresholds move there along the calibrated
    curve, so that one model serves the whole range. Takes the place of the ramp.
    """
    train: Literal["gates", "lora", "all"] = Field(default="gates", title="What learns")
    """'gates': the base model stays frozen. 'lora': gates and low-rank adapters, merged at the end. 'all': every weight
    learns, against a frozen copy.
    """
    lora_rank: int = Field(default=16, ge=1, title="LoRA rank")
    """Of the adapters, for train='lora'."""
    lora_alpha: float = Field(default=32.0, gt=0.0, title="LoRA alpha")
    """Adapters are scaled by alpha / rank."""
    lora_modules: list[str] = Field(default=["all-linear"], title="LoRA modules")
    """Endings of the names of linear layers that get an adapter, such as q_proj; or attention (those of attention
    layers with a gate), or all-linear.
    """
    gradient_checkpointing: bool = Field(default=False, title="Gradient checkpointing")
    """Recompute activations in the backward pass to save memory."""
    sharding: Literal["none", "fsdp2"] = Field(default="none", title="Sharding")
    """'fsdp2': the processes that torchrun or accelerate launch started hold a part of the model each. 'none': each
    holds all of it.
    """
    logging_steps: int = Field(default=10, ge=1, title="Logging interval")
    """Steps between rows of the log, and between what `report_to` gets."""
    report_to: list[Reporter] = Field(
        default=[], title="Report to", json_schema_extra={"type": ["array", "string"]}
    )
    """Integrations of transformers' Trainer that get the log, such as wandb or [tensorboard, mlflow]; 'all': those that
    are installed; 'none'. tensorboard writes to retrofit/logs in the output directory.
    """
    save_steps: int = Field(default=100, ge=1, title="Checkpoint interval")
    """Steps between resumable checkpoints."""
    seed: int = Field(default=0, ge=0, title="Seed")
    """Seeds data order and gate noise; same seed, same result."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _as_trainer_takes_it(cls, value: Any) -> Any:
        return as_list(value)

    @model_validator(mode="after")
    def _adapters_are_whole(self) -> "RetrofitConfig":
        if self.train == "lora" and self.sharding != "none":
            raise ValueError(
                f"train='lora' does not go with sharding={self.sharding!r}; use train='gates' or sharding='none'"
            )
        return self

    def visits(self, processes: int) -> int:
        """Samples that all processes together visit in a run."""
        return self.steps * self.batch_size * self.gradient_accumulation_steps * processes

    @field_validator("cr_range")
    @classmethod
    def _rising(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and not (len(value) == 2 and 1.0 < value[0] < value[1]):
            raise ValueError(
                "cr_range must be [lowest, highest] with 1 < lowest < highest, for example [2, 16]"
            )
        return value
