# SPDX-License-Identifier: Apache-2.0
"""What the ModelOpt mode "dms" does: apply and restore."""

from collections.abc import Mapping
from typing import Any

from modelopt.torch.opt.config import ModeloptBaseConfig
from modelopt.torch.opt.conversion import ModelLikeModule, apply_mode
from pydantic import ValidationError
from torch import nn
from transformers import PreTrainedModel

from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.config.section import in_one_line
from modelopt_dms.modeling.config_marks import mark
from modelopt_dms.modeling.convert import check_not_quantized, convert_model, is_converted
from modelopt_dms.modeling.modelopt_mode import MODE_NAME, KVSparsityModeRegistry


class DMSModeConfig(DMSConfig, ModeloptBaseConfig):
    """`DMSConfig` as ModelOpt stores the config of a mode."""


class CheckpointError(ValueError):
    """A directory that cannot be loaded as a DMS model; the message says what is missing or broken."""


def convert(model: Any, config: DMSConfig) -> tuple[nn.Module, dict[str, Any]]:
    """Put gates on a model as the config says; ModelOpt keeps the names of the layers as metadata."""
    model = model.init_modellike() if isinstance(model, ModelLikeModule) else model
    summary = convert_model(model, config)
    # Plain transformers keeps unknown config fields: the marker survives save, load and export.
    model.config.dms_config = config.model_dump()
    mark(model.config)
    _use_cache(model)
    return model, {"layers": summary.converted}


def restore(model: nn.Module, config: DMSConfig, metadata: dict[str, Any]) -> nn.Module:
    """The same for a model whose weights, and gates, come after it.

    Raises:
        CheckpointError: the gates would be on other layers.
    """
    model, found = convert(model, config)
    if found["layers"] != metadata["layers"]:
        raise CheckpointError(
            f"the checkpoint has gates on {metadata['layers']}, but this model would have them on {found['layers']}"
        )
    return model


def _use_cache(model: Any) -> None:
    """Undo `use_cache=False`, which trainings leave in a config: without a cache there is nothing to evict from."""
    for config in (model.config, model.config.get_text_config(decoder=True)):
        if getattr(config, "use_cache", True) is False:
            config.use_cache = True
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.use_cache = True


def dms_config_of(model: PreTrainedModel) -> DMSConfig:
    """The DMS config that a converted model carries.

    Raises:
        ValueError: it has no gates.
    """
    dms_config = getattr(model.config, "dms_config", None)
    if dms_config is None:
        raise ValueError(f"{type(model).__name__} has no gates; call apply_dms (or compress) first")
    return read_dms_config(dms_config, "config.json")


def read_dms_config(stored: Any, where: str) -> DMSConfig:
    """The DMS config in a `dms_config` that was read from a file.

    Raises:
        CheckpointError: a field, its value and what is accepted.
    """
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"{where}: dms_config={stored!r} must be a mapping")
    try:
        return DMSConfig(**stored)
    except ValidationError as error:
        raise CheckpointError(f"{where}: dms_config: {in_one_line(error)}") from None


def apply_dms(model: PreTrainedModel, config: DMSConfig | dict[str, Any]) -> PreTrainedModel:
    """Put untrained gates on a causal LM, in place, as a ModelOpt mode. Nothing is evicted until they have learnt.

    Args:
        model: any transformers causal LM with full-attention layers.
        config: the DMS config, or a mapping of them.

    Raises:
        UnsupportedModelError: the model cannot be converted; it was not changed.
        CheckpointError: the model is a compressed one whose gates were not loaded.
    """
    if getattr(model.config, "dms_config", None) is not None and not is_converted(model):
        raise CheckpointError(
            "the model's config says that it is a DMS model, but it was loaded without its gates; load it with "
            "modelopt_dms.load, or start from the original checkpoint"
        )
    config = config if isinstance(config, DMSConfig) else DMSConfig(**config)
    # Of quantized models, ModelOpt would say only that modes cannot follow each other.
    check_not_quantized(model)
    return apply_mode(
        model, mode=[(MODE_NAME, config.model_dump())], registry=KVSparsityModeRegistry
    )
