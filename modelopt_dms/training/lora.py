# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters of peft on the base model, for the time of a retrofit; merged into its weights afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from modelopt_dms.config.retrofit import RetrofitConfig
from modelopt_dms.modeling.convert import dms_modules

ADAPTER = "default"


class LoraError(ValueError):
    """Adapters that cannot be put on a model; the message says why."""


def check_lora(config: RetrofitConfig) -> None:
    """Refuse train='lora' where peft is missing.

    Raises:
        LoraError: it is.
    """
    if config.train == "lora" and find_spec("peft") is None:
        raise LoraError("retrofit.train='lora' needs peft; pip install peft")


@contextmanager
def adapted(model: PreTrainedModel, config: RetrofitConfig) -> Iterator[None]:
    """Inside, a model has the adapters that train='lora' asks for; then they are merged, or after an error gone.

    Raises:
        LoraError: no layer has a name from retrofit.lora_modules.
    """
    if config.train != "lora":
        yield
        return
    gradients = [(p, p.requires_grad) for p in model.parameters()]
    tuner = _inject(model, config)
    finish = tuner.unload
    try:
        yield
        finish = tuner.merge_and_unload
    finally:
        finish()
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)


def _inject(model: PreTrainedModel, config: RetrofitConfig) -> Any:
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel
    from peft.tuners.tuners_utils import cast_adapter_dtype

    modules = config.lora_modules
    targets = _of_attention(model) if modules == ["attention"] else modules
    options = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        target_modules="all-linear" if modules == ["all-linear"] else targets,
    )
    try:
        # Random initial values must not depend on what ran before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            tuner = LoraModel(model, {ADAPTER: options}, ADAPTER)
    except ValueError as error:
        raise LoraError(f"retrofit.lora_modules={modules}: {error}") from error
    # In bfloat16, most of an optimizer's steps are smaller than the distance to the next number.
    cast_adapter_dtype(tuner, ADAPTER)
    return tuner


def _of_attention(model: nn.Module) -> list[str]:
    """Names of the linear layers of attention modules with a gate."""
    return [
        f"{name}.{inner}"
        for name, module in dms_modules(model).items()
        for inner, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    ]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, a model computes with its base weights alone; outside, nothing changes for one without adapters."""
    layers: list[Any] = [x for x in model.modules() if hasattr(x, "lora_A")]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_" in name
