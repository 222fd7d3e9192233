# SPDX-License-Identifier: Apache-2.0
"""What a DMS model is (`DMSConfig`), how its gates learn (`RetrofitConfig`), how it is quantized. Values only."""

from collections.abc import Mapping
from typing import Any, Literal

from modelopt.torch.opt.config import ModeloptBaseConfig, ModeloptField
from modelopt.torch.quantization.config import QuantizeConfig
from pydantic import ConfigDict, ValidationError, field_validator, model_validator

# No window, number of steps or seed that is meant needs more than 32 bits; nor a float more than this range.
LARGEST_INTEGER = 2**32 - 1
# Tokens: more than any context that a model has.
LONGEST = 2**24
SMALLEST_FLOAT, LARGEST_FLOAT = 1e-12, 1e9


class Section(ModeloptBaseConfig):
    """What users write: every number is finite, and of a size that can be computed with."""

    model_config = ConfigDict(allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*")
    @classmethod
    def _numbers_can_be_meant(cls, value: Any) -> Any:
        for x in value if isinstance(value, list) else [value]:
            if isinstance(x, int) and abs(x) > LARGEST_INTEGER:
                raise ValueError(f"must be at most {LARGEST_INTEGER}")
            if isinstance(x, float) and x and not SMALLEST_FLOAT <= abs(x) <= LARGEST_FLOAT:
                raise ValueError(
                    f"must be 0, or of a size from {SMALLEST_FLOAT:g} to {LARGEST_FLOAT:g}"
                )
        return value


def in_one_line(error: ValidationError) -> str:
    """Every field that pydantic refuses, with its value and what is accepted."""
    return "; ".join(_readable(x) for x in error.errors())


def _readable(error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    message = error["msg"].removeprefix("Value error, ")
    given = repr(error["input"])
    if isinstance(error["input"], Mapping):
        return f"{key}: {message}" if key else message
    if len(given) > 200:
        given = f"{given[:200]}..."
    return f"{key or 'value'}={given}: {message}"


class DMSConfig(Section):
    """The facts about a DMS model that its weights alone do not tell. Stored with the model."""

    target_cr: float = ModeloptField(default=4.0, ge=1.0, title="Target compression ratio")
    """Wanted ratio of logical to live tokens in the KV cache, reached at the length trained on."""
    window: int = ModeloptField(default=256, ge=1, le=LONGEST, title="Delay window in tokens")
    """A token marked for eviction stays readable until it is more than this many tokens old."""
    gate: Literal["adapter", "residual", "neuron"] = ModeloptField(
        default="adapter", title="Gate parameterisation"
    )
    """'adapter': one zero-initialised linear row per KV head on the attention's input. 'residual': the same on the
    normed residual stream (NVIDIA's checkpoints). 'neuron': one dimension of the first query head of each KV group is
    read as the eviction logit and zeroed.
    """
    granularity: Literal["head", "layer"] = ModeloptField(
        default="head", title="Granularity of decisions"
    )
    """'head': one decision per KV head. 'layer': all KV heads of a layer share one."""
    scale: float = ModeloptField(default=100.0, gt=0.0, title="Logit scale")
    """z = scale * (w . x) - offset. A large scale lets small weight changes move the gate."""
    offset: float = ModeloptField(default=5.0, title="Logit offset")
    """Subtracted from the logit, so that an untrained gate evicts nothing."""
    threshold: float = ModeloptField(default=0.0, title="Eviction threshold")
    """A token is marked for eviction when its logit is above this value."""
    decision_shift: Literal[0, 1] = ModeloptField(default=0, title="Decision shift")
    """0: a token's own logit decides about it. 1: the next token's logit does (NVIDIA's checkpoints)."""
    protect_first: int = ModeloptField(default=0, ge=0, le=LONGEST, title="Protected first tokens")
    """This many tokens at the start of every sequence are never evicted."""
    neuron_dim: int = ModeloptField(default=0, ge=0, title="Borrowed dimension")
    """Which dimension of the query head the 'neuron' gate borrows."""
    evict: bool = ModeloptField(default=True, title="Evict")
    """False: the gates are there, and nothing is evicted (NVIDIA's dms_disable_eviction)."""
    layers: list[str] = ModeloptField(default=["*"], title="Layers")
    """Wildcards of attention module names to convert; full-attention layers only."""

    @field_validator("layers")
    @classmethod
    def _at_least_one_pattern(cls, value: list[str]) -> list[str]:
        if not value:
            raise ValueError("layers must name at least one wildcard, for example ['*']")
        return value


class CalibrateConfig(Section):
    """How the gates are fitted, without training, to what future queries attend to."""

    samples: int = ModeloptField(default=64, ge=1, title="Samples")
    """Documents, or parts of them, to fit the gates to."""
    sample_length: int = ModeloptField(default=4096, ge=8, title="Tokens per sample")
    """Longer documents are cut; target_cr is met at this length."""
    batch_size: int = ModeloptField(default=1, ge=1, title="Samples per forward")
    """Shorter samples are padded."""
    held_out: int = ModeloptField(default=8, ge=1, title="Held-out samples")
    """From these come the thresholds, and the curve from compression ratio to quality."""
    budget: Literal["global", "uniform"] = ModeloptField(
        default="global", title="Who shares a budget"
    )
    """'global': all heads compete, and some keep more than others. 'uniform': every head keeps as much."""
    ridge: float = ModeloptField(default=1e-3, gt=0.0, title="Ridge")
    """Penalty on the gates' weights, relative to the mean square of what they read."""
    curve: list[float] = ModeloptField(
        default=[1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0], title="Curve"
    )
    """Compression ratios at which quality is measured; those in between are interpolated."""
    save_steps: int = ModeloptField(default=16, ge=1, title="Checkpoint interval")
    """Forwards between resumable checkpoints."""
    seed: int = ModeloptField(default=0, ge=0, title="Seed")
    """Draws the samples; same seed, same result."""

    @field_validator("curve")
    @classmethod
    def _above_one(cls, value: list[float]) -> list[float]:
        if not value or min(value) <= 1.0:
            raise ValueError("curve must list compression ratios above 1, for example [2, 4, 8]")
        return sorted(set(value))


class RetrofitConfig(Section):
    """How the gates learn: distillation from the same model with eviction off, plus a rate loss."""

    steps: int = ModeloptField(default=500, ge=1, title="Optimizer steps")
    """Length of the retrofit."""
    sequence_length: int = ModeloptField(default=4096, ge=8, title="Tokens per sample")
    """Documents are packed to this length."""
    batch_size: int = ModeloptField(default=1, ge=1, title="Samples per device and micro-step")
    """Packed samples in one forward."""
    gradient_accumulation_steps: int = ModeloptField(default=1, ge=1, title="Gradient accumulation")
    """Micro-steps per optimizer step."""
    learning_rate: float = ModeloptField(default=1e-4, gt=0.0, title="Peak learning rate")
    """AdamW learning rate after warm-up."""
    lr_scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = ModeloptField(
        default="cosine", title="Learning-rate schedule"
    )
    """After warm-up: down to 0 along a half cosine or a line, or constant ('constant' has no warm-up)."""
    warmup_steps: int = ModeloptField(default=10, ge=0, title="Warm-up steps")
    """Steps of linear learning-rate warm-up; at most half of all steps."""
    weight_decay: float = ModeloptField(default=0.0, ge=0.0, title="Weight decay")
    """AdamW weight decay."""
    max_grad_norm: float = ModeloptField(default=1.0, gt=0.0, title="Gradient clipping")
    """Largest global gradient norm."""
    ramp_fraction: float = ModeloptField(
        default=0.7, ge=0.0, le=1.0, title="Ramp of the compression ratio"
    )
    """The scheduled ratio rises linearly from 1 to target_cr over this fraction of the steps; 0 asks for all of it from
    the start, which suits calibrated gates.
    """
    rate_weight: float = ModeloptField(default=1.0, ge=0.0, title="Weight of the rate loss")
    """Loss = KL + weight * rate loss."""
    kl_direction: Literal["forward", "reverse"] = ModeloptField(
        default="forward", title="Direction of the distillation loss"
    )
    """'forward': KL(teacher || student). 'reverse': KL(student || teacher)."""
    kl_chunk_tokens: int = ModeloptField(default=1024, ge=1, title="Tokens per logits chunk")
    """Logits over the vocabulary exist for at most this many tokens at a time."""
    tau: float = ModeloptField(default=0.1, gt=0.0, title="Gumbel-sigmoid temperature")
    """alpha = sigmoid((z + logistic noise) / tau) while training."""
    noise: bool = ModeloptField(default=True, title="Logistic noise")
    """Sample the relaxed decision while training."""
    cr_range: list[float] | None = ModeloptField(default=None, title="Range of compression ratios")
    """[lowest, highest]: every step draws the ratio it trains for, and thresholds move there along the calibrated
    curve, so that one model serves the whole range. Takes the place of the ramp.
    """
    train: Literal["gates", "lora", "all"] = ModeloptField(default="gates", title="What learns")
    """'gates': the base model stays frozen. 'lora': gates and low-rank adapters, merged at the end. 'all': every weight
    learns, against a frozen copy.
    """
    lora_rank: int = ModeloptField(default=16, ge=1, title="LoRA rank")
    """Of the adapters, for train='lora'."""
    lora_alpha: float = ModeloptField(default=32.0, gt=0.0, title="LoRA alpha")
    """Adapters are scaled by alpha / rank."""
    lora_modules: list[str] = ModeloptField(default=["all-linear"], title="LoRA modules")
    """Endings of the names of linear layers that get an adapter, such as q_proj; or attention (those of attention
    layers with a gate), or all-linear.
    """
    gradient_checkpointing: bool = ModeloptField(default=False, title="Gradient checkpointing")
    """Recompute activations in the backward pass to save memory."""
    sharding: Literal["none", "fsdp2"] = ModeloptField(default="none", title="Sharding")
    """'fsdp2': the processes that torchrun or accelerate launch started hold a part of the model each. 'none': each
    holds all of it.
    """
    logging_steps: int = ModeloptField(default=10, ge=1, title="Logging interval")
    """Steps between log lines and TensorBoard points."""
    save_steps: int = ModeloptField(default=100, ge=1, title="Checkpoint interval")
    """Steps between resumable checkpoints."""
    seed: int = ModeloptField(default=0, ge=0, title="Seed")
    """Seeds data order and gate noise; same seed, same result."""

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


class ExportConfig(Section):
    """What `compress` writes besides the model itself."""

    format: Literal["hf", "onnx", "tensorrt", "trtllm"] = ModeloptField(
        default="hf", title="Export format"
    )
    """'hf': ModelOpt's unified Hugging Face checkpoint, weights packed, for serving engines. 'trtllm': the same, with
    what makes TensorRT-LLM's AutoDeploy serve it. 'onnx': graphs of a decode step and a prefill chunk. 'tensorrt':
    those, and the kernels that TensorRT engines embed.
    """
