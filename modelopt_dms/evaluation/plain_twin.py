# SPDX-License-Identifier: Apache-2.0
"""A DMS model's weights in a plain model of transformers: what its full cache is, for comparison. Copies no weights."""

from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedModel

from modelopt_dms.gates.gate import EvictionGate, gates
from modelopt_dms.gates.kinds import NeuronGate
from modelopt_dms.modeling.convert import UnsupportedModelError, check_not_quantized, dms_modules


class NoTwinError(ValueError):
    """A model that has no plain twin; the message says why."""


def plain_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The model without gates, on the attention that it had before, sharing its weights. In eval mode.

    Args:
        model: a DMS model on one device, not quantized, whose gates borrow nothing from its weights.

    Raises:
        NoTwinError: it is not such a model.
    """
    found = gates(model)
    if not found:
        raise NoTwinError(f"{type(model).__name__} has no gates")
    if any(isinstance(gate, NeuronGate) for gate in found):
        raise NoTwinError("gates of kind 'neuron' borrow a dimension of the queries")
    try:
        check_not_quantized(model)
    except UnsupportedModelError as error:
        raise NoTwinError(
            "the model is quantized, and transformers alone does not run it"
        ) from error
    weights = _without_gates(model)
    devices = {x.device for x in weights.values()}
    if len(devices) != 1 or next(iter(devices)).type == "meta":
        raise NoTwinError(f"the weights are on {sorted(map(str, devices))}, not on one device")
    twin = _empty(model)
    result = twin.load_state_dict(weights, strict=False, assign=True)
    twin.tie_weights()
    if lost := [x for x, tensor in twin.named_parameters() if tensor.is_meta]:
        raise NoTwinError(f"{len(lost)} weights have other names there, {lost[0]} first")
    if result.unexpected_keys:
        raise NoTwinError(
            f"it has weights that transformers does not know: {result.unexpected_keys[0]}"
        )
    return twin.to(next(iter(devices))).eval().requires_grad_(False)


def _empty(model: PreTrainedModel) -> PreTrainedModel:
    """A plain model of the same config; parameters on "meta", buffers as they are computed."""
    config = type(model.config).from_dict(
        {k: v for k, v in model.config.to_dict().items() if not k.startswith("dms_")}
    )
    first: Any = next(iter(dms_modules(model).values()))
    config._attn_implementation = getattr(first, "dms_ran", "sdpa")
    plain: Any = next(x for x in type(model).__mro__ if x.__module__.startswith("transformers."))
    with init_empty_weights(include_buffers=False):
        twin: PreTrainedModel = plain._from_config(config, dtype=model.dtype)
    if model.generation_config is not None:
        twin.generation_config = model.generation_config
    return twin


def _without_gates(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights and buffers by name, the gates' apart."""
    inside = tuple(f"{name}." for name, x in model.named_modules() if isinstance(x, EvictionGate))
    return {k: v for k, v in model.state_dict().items() if not k.startswith(inside)}
