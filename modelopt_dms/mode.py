# SPDX-License-Identifier: Apache-2.0
"""DMS as a ModelOpt mode: apply and restore. Importing this module registers the mode, and nothing else."""

from typing import Any

from modelopt.torch.opt.conversion import ModelLikeModule, apply_mode
from modelopt.torch.opt.mode import (
    ConvertEntrypoint,
    ModeDescriptor,
    RestoreEntrypoint,
    _ModeRegistryCls,
)
from torch import nn
from transformers import PreTrainedModel

from modelopt_dms.config import DMSConfig
from modelopt_dms.convert import convert_model, is_converted

MODE_NAME = "dms"

KVSparsityModeRegistry = _ModeRegistryCls("kv_sparsity")


class CheckpointError(ValueError):
    """A directory that cannot be loaded as a DMS model; the message says what is missing or broken."""


@KVSparsityModeRegistry.register_mode
class DMSModeDescriptor(ModeDescriptor):
    """The mode "dms": gates on every full-attention layer. Apply it before quantization."""

    @property
    def name(self) -> str:
        """Name under which ModelOpt saves the mode."""
        return MODE_NAME

    @property
    def config_class(self) -> type[DMSConfig]:
        """Schema of the mode's config."""
        return DMSConfig

    @property
    def convert(self) -> ConvertEntrypoint:
        """Entry point for applying the mode."""
        return _convert

    @property
    def restore(self) -> RestoreEntrypoint:
        """Entry point for applying a saved mode; weights come after it."""
        return _restore


def _convert(model: Any, config: DMSConfig) -> tuple[nn.Module, dict[str, Any]]:
    model = model.init_modellike() if isinstance(model, ModelLikeModule) else model
    summary = convert_model(model, config)
    # Plain transformers keeps unknown config fields: the marker survives save, load and export.
    model.config.dms_config = config.model_dump()
    return model, {"layers": summary.converted}


def _restore(model: nn.Module, config: DMSConfig, metadata: dict[str, Any]) -> nn.Module:
    model, found = _convert(model, config)
    if found["layers"] != metadata["layers"]:
        raise CheckpointError(
            f"the checkpoint has gates on {metadata['layers']}, but this model would have them on {found['layers']}"
        )
    return model


def facts_of(model: PreTrainedModel) -> DMSConfig:
    """The DMS facts that a converted model carries.

    Raises:
        ValueError: it has no gates.
    """
    facts = getattr(model.config, "dms_config", None)
    if facts is None:
        raise ValueError(f"{type(model).__name__} has no gates; call apply_dms (or compress) first")
    return DMSConfig(**facts)


def apply_dms(model: PreTrainedModel, config: DMSConfig | dict[str, Any]) -> PreTrainedModel:
    """Put untrained gates on a causal LM, in place, as a ModelOpt mode. Nothing is evicted until they have learnt.

    Args:
        model: any transformers causal LM with full-attention layers.
        config: the DMS facts, or a mapping of them.

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
    return apply_mode(
        model, mode=[(MODE_NAME, config.model_dump())], registry=KVSparsityModeRegistry
    )
