# SPDX-License-Identifier: Apache-2.0
"""DMS as a ModelOpt mode: apply, save and restore. Importing this module registers the mode, and nothing else."""

import json
from pathlib import Path
from typing import Any

import torch
from modelopt.torch.opt.conversion import ModelLikeModule, apply_mode
from modelopt.torch.opt.mode import (
    ConvertEntrypoint,
    ModeDescriptor,
    RestoreEntrypoint,
    _ModeRegistryCls,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as hf_logging

from modelopt_dms.config import DMSConfig
from modelopt_dms.convert import convert_model, dms_modules, is_converted

MODE_NAME = "dms"
GATE_KEY = ".dms_gate."

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
    return _apply(model, config if isinstance(config, DMSConfig) else DMSConfig(**config))


def _apply(model: PreTrainedModel, config: DMSConfig) -> PreTrainedModel:
    return apply_mode(
        model, mode=[(MODE_NAME, config.model_dump())], registry=KVSparsityModeRegistry
    )


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a DMS model from a directory written by `save_pretrained`; reads JSON and safetensors only.

    Args:
        path: the directory.
        dtype: dtype of the base model; gates stay in float32.
        device_map: as in `from_pretrained`.
        trust_remote_code: as in `from_pretrained`; off unless asked for.

    Raises:
        CheckpointError: not a DMS checkpoint, gates missing, or a file is broken.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} has no config.json; expected a directory written by save_pretrained"
        )
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    facts = getattr(config, "dms_config", None)
    if facts is None:
        raise CheckpointError(
            f"{path} is not a DMS model: config.json has no dms_config; compress it first"
        )
    stored = _read_gates(path)
    if not stored:
        raise CheckpointError(
            f"{path} says it is a DMS model, but its safetensors hold no *{GATE_KEY}* tensors"
        )
    model = _load_base(
        path, dtype=dtype, device_map=device_map, trust_remote_code=trust_remote_code
    )
    if not is_converted(model):
        _apply(model, DMSConfig(**facts))
    _put_gates(model, stored, path)
    return model.eval()


def _read_gates(path: Path) -> dict[str, Tensor]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text())["weight_map"]
        files = sorted({path / name for key, name in weight_map.items() if GATE_KEY in key})
    else:
        files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{path} has no safetensors file")
    stored = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                ours = [key for key in list(tensors.keys()) if GATE_KEY in key]
                stored.update({key: tensors.get_tensor(key) for key in ours})
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    return stored


def _load_base(path: Path, **kwargs: Any) -> PreTrainedModel:
    # transformers lists our gates as unexpected keys: true, expected, and of no use to a reader.
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    finally:
        hf_logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        raise CheckpointError(f"{path} lacks the weights {sorted(info['missing_keys'])}")
    return model


def _put_gates(model: nn.Module, stored: dict[str, Tensor], path: Path) -> None:
    wanted = {
        f"{name}{GATE_KEY}{key}": tensor
        for name, module in dms_modules(model).items()
        for key, tensor in module.dms_gate.state_dict(keep_vars=True).items()
    }
    if stored.keys() != wanted.keys():
        differ = sorted(stored.keys() ^ wanted.keys())
        raise CheckpointError(f"{path}: gates in the file and in the model differ: {differ}")
    for key, tensor in wanted.items():
        if stored[key].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: {key} has shape {tuple(stored[key].shape)}, expected {tuple(tensor.shape)}"
            )
        tensor.data = stored[key].to(tensor.device)
