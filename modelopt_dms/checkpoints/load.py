# SPDX-License-Identifier: Apache-2.0
"""A directory -> a DMS model, quantized or not. Reads JSON and safetensors only."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from modelopt.torch.quantization.nn import TensorQuantizer
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as hf_logging

from modelopt_dms.checkpoints import nvidia_dms
from modelopt_dms.checkpoints.lost_gates import gates_put_on_later
from modelopt_dms.checkpoints.tensor_names import GATE_KEY, StoredNames
from modelopt_dms.checkpoints.unified_hf import is_packed, unpack
from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.config.quantize import QuantizationConfig
from modelopt_dms.config.section import in_one_line
from modelopt_dms.gates.curve import CompressionError
from modelopt_dms.gates.thresholds import curve_of
from modelopt_dms.modeling.config_marks import unmark
from modelopt_dms.modeling.convert import dms_modules, is_converted
from modelopt_dms.modeling.finite import WeightError, check_weights
from modelopt_dms.modeling.mode import CheckpointError, apply_dms, read_dms_config
from modelopt_dms.modeling.staging import gate_device
from modelopt_dms.quantization.apply import insert, is_quantized
from modelopt_dms.quantization.foreign import FOREIGN

RANGE_SUFFIXES = ("._amax", "._pre_quant_scale")


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    **others: Any,
) -> PreTrainedModel:
    """Load what `compress`, `save_pretrained` or `export` wrote, or a DMS checkpoint of NVIDIA's.

    Reads JSON and safetensors only, and runs no code of a checkpoint unless `trust_remote_code` says so.

    Args:
        path: the directory.
        dtype: dtype of the base model; gates stay in float32.
        device_map: as in `from_pretrained`.
        trust_remote_code: as in `from_pretrained`; off unless asked for.
        **others: refused by name: what else `from_pretrained` takes is not for a DMS model.

    Raises:
        CheckpointError: not a DMS or quantized checkpoint, gates missing, or a file is broken.
        ValueError: an argument that is not accepted.
    """
    if others:
        raise ValueError(
            f"modelopt_dms.load does not accept {', '.join(f'{key}={x!r}' for key, x in others.items())}; accepted: "
            "dtype, device_map, trust_remote_code (a DMS model runs only with its own attention)"
        )
    path = Path(path)
    try:
        return _load(path, dtype, device_map, trust_remote_code)
    except (CheckpointError, WeightError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # A damaged directory: transformers and ModelOpt trust what they read, and fail anyhow and anywhere.
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        line = in_one_line(error) if isinstance(error, ValidationError) else str(error)
        raise CheckpointError(f"{path} cannot be loaded: {kind}{' '.join(line.split())}") from error


def _load(
    path: Path,
    dtype: torch.dtype | str,
    device_map: str | dict[str, Any] | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} has no config.json; expected a directory written by save_pretrained"
        )
    raw = _read_json(path / "config.json")
    if not isinstance(raw, dict):
        raise CheckpointError(
            f"{path / 'config.json'} must hold a mapping, not {type(raw).__name__}"
        )
    files = sorted(path.glob("*.safetensors"))
    theirs = nvidia_dms.is_nvidia(raw)
    config = (
        nvidia_dms.read_config(raw)
        if theirs
        else AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    )
    if not any(getattr(config, x, None) for x in ("dms_config", "dms_quantization")):
        lost = bool(files) and bool(_read(path, files, (GATE_KEY,)))
        raise CheckpointError(
            f"{path} holds the gates of a DMS model, but config.json has lost its dms_config; put it back"
            if lost
            else f"{path} is not a DMS model: config.json has no dms_config; compress it first"
        )
    unmark(config)
    ranges: dict[str, Tensor] = {}
    weights = None
    if theirs:
        stored = nvidia_dms.gate_tensors(
            _read(path, files, (nvidia_dms.GATE_KEY,)), DMSConfig(**config.dms_config)
        )
    elif is_packed(path):
        stored = _read(path, files, ("",))
        weights, ranges = unpack(stored, path)
    else:
        stored = _read(path, files, (GATE_KEY, *RANGE_SUFFIXES))
    model = _load_base(
        path,
        config,
        weights,
        dtype=dtype,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
    )
    _attach(model, stored, ranges, path)
    return model.eval()


def attach(model: PreTrainedModel, files: Iterable[str | Path]) -> None:
    """Put gates and quantizers on a model that transformers has loaded from these files, as its config says.

    Args:
        model: of the class that was saved, or another one on the same layers.
        files: safetensors files of the checkpoint.

    Raises:
        CheckpointError: gates are missing, or a file is broken.
    """
    paths = [Path(x) for x in files]
    place = paths[0].parent
    _attach(model, _read(place, paths, (GATE_KEY, *RANGE_SUFFIXES)), {}, place)


def _attach(
    model: PreTrainedModel, stored: dict[str, Tensor], ranges: dict[str, Tensor], path: Path
) -> None:
    """Gates and ranges by their names in the checkpoint; `ranges` are those that lay in packed weights."""
    stored_config = getattr(model.config, "dms_config", None)
    quantization = getattr(model.config, "dms_quantization", None)
    gates = {key: x for key, x in stored.items() if GATE_KEY in key}
    if stored_config is not None:
        if not gates:
            raise CheckpointError(
                f"{path} says it is a DMS model, but its safetensors hold no *{GATE_KEY}* tensors"
            )
        if not is_converted(model):
            config = read_dms_config(stored_config, str(path / "config.json"))
            del model.config.dms_config
            apply_dms(model, config)
        _put_gates(model, gates, path)
        _check_curve(model, path)
    foreign = getattr(model.config, FOREIGN, False) or bool(_ranges(stored))
    if quantization is None and not is_quantized(model) and foreign:
        raise CheckpointError(
            f"{path} was quantized by mtq.quantize, but nothing says how; quantize with modelopt_dms.quantize, or call "
            "modelopt.torch.opt.enable_huggingface_checkpointing() before saving and loading"
        )
    if quantization is not None:
        # ModelOpt may have put quantizers on already, and transformers their ranges, in the model's dtype.
        if not is_quantized(model):
            insert(model, QuantizationConfig(**quantization))
        _put_ranges(model, ranges | _ranges(stored), path)
    check_weights(model, str(path))


def _check_curve(model: PreTrainedModel, path: Path) -> None:
    if getattr(model.config, "dms_curve", None) is not None:
        try:
            curve_of(model)
        except CompressionError as error:
            raise CheckpointError(f"{path / 'config.json'}: {error}") from None


def _read(path: Path, files: list[Path], parts: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors whose names contain one of these parts."""
    if not files:
        raise CheckpointError(f"{path} has no safetensors file")
    stored = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                ours = [key for key in list(tensors.keys()) if any(x in key for x in parts)]
                stored.update({key: tensors.get_tensor(key) for key in ours})
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
    return stored


def _ranges(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: x for key, x in stored.items() if key.endswith(RANGE_SUFFIXES)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _load_base(
    path: Path, config: PreTrainedConfig, weights: dict[str, Tensor] | None, **kwargs: Any
) -> PreTrainedModel:
    source: dict[str, Any] = {"pretrained_model_name_or_path": path, "config": config}
    loader = _model_class(config, path, kwargs["trust_remote_code"])
    if loader is not AutoModelForCausalLM:
        kwargs.pop("trust_remote_code")
    if weights is not None:
        # The weights are in plain numbers again; transformers has no reader for ModelOpt's packed ones.
        source |= {"pretrained_model_name_or_path": None, "state_dict": weights}
    # transformers lists our gates as unexpected keys: true, expected, and of no use to a reader.
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        with gates_put_on_later():
            model, info = loader.from_pretrained(**source, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    finally:
        hf_logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        raise CheckpointError(f"{path} lacks the weights {sorted(info['missing_keys'])}")
    return model


def _model_class(config: PreTrainedConfig, path: Path, trust_remote_code: bool) -> Any:
    """The class that a checkpoint's config names, else the causal LM of its type."""
    found = getattr(transformers, (config.architectures or [""])[0], None)
    if found is not None:
        return found
    if getattr(config, "auto_map", None) and trust_remote_code:
        return AutoModelForCausalLM
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"{path}: architectures={config.architectures} is no model of transformers"
        )
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _put_gates(model: PreTrainedModel, stored: dict[str, Tensor], path: Path) -> None:
    for module in dms_modules(model).values():
        if any(x.is_meta for x in module.dms_gate.state_dict().values()):
            module.dms_gate.to_empty(device=gate_device(module))
    wanted = {
        f"{name}{GATE_KEY}{key}": tensor
        for name, module in dms_modules(model).items()
        for key, tensor in module.dms_gate.state_dict(keep_vars=True).items()
    }
    names = StoredNames(model)
    found = {names.of(key): tensor for key, tensor in stored.items()}
    if found.keys() != wanted.keys():
        differ = sorted(found.keys() ^ wanted.keys())
        raise CheckpointError(f"{path}: gates in the file and in the model differ: {differ}")
    for key, tensor in wanted.items():
        if found[key].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: {key} has shape {tuple(found[key].shape)}, expected {tuple(tensor.shape)}"
            )
        if not found[key].is_floating_point():
            raise CheckpointError(f"{path}: {key} is {found[key].dtype}, expected {tensor.dtype}")
        tensor.data = found[key].to(tensor.device)


def _put_ranges(model: PreTrainedModel, ranges: dict[str, Tensor], path: Path) -> None:
    """Give quantizers the ranges that calibration found, by the names of their buffers."""
    quantizers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer)
    }
    names = StoredNames(model)
    for key, tensor in ranges.items():
        name, _, buffer = key.rpartition(".")
        found = names.quantizer(name, quantizers)
        if found is None:
            raise CheckpointError(f"{path}: {key} belongs to no quantizer of this model")
        device = next(model.get_submodule(found.rpartition(".")[0]).parameters(), tensor).device
        if hasattr(quantizers[found], buffer):
            delattr(quantizers[found], buffer)
        setattr(quantizers[found], buffer.removeprefix("_"), tensor.to(device))
