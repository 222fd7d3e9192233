# SPDX-License-Identifier: Apache-2.0
"""What was saved is read back before anybody is told that it was: config, names, gates, one place a tensor."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from modelopt_dms.checkpoints.tensor_names import GATE_KEY, StoredNames
from modelopt_dms.config.output_dir import OutputError

# What a model says of itself in its config and cannot be loaded without.
FIELDS = ("dms_config", "dms_quantization", "dms_curve")


def check_written(place: Path, model: PreTrainedModel) -> None:
    """Read back a directory that a model was saved to, packed by ModelOpt or not.

    Raises:
        OutputError: something of the model is missing there, twice there, or another; a gate or threshold differs in
            a bit; or a file cannot be read.
    """
    _check_config(place, model)
    shapes = _shapes(place)
    _check_index(place, shapes)
    names = StoredNames(model)
    found = {names.of(key): (key, shape) for key, (_, shape) in shapes.items()}
    for name, shape in _expected(model).items():
        if name not in found:
            raise OutputError(f"{place} was not written right: {name} is not in it")
        stored, written = found[name]
        if GATE_KEY in name and written != shape:
            raise OutputError(
                f"{place} was not written right: {stored} has shape {written}, expected {shape}"
            )
    for name, expected in model.state_dict().items():
        if GATE_KEY in name:
            key = found[name][0]
            _check_value(place / shapes[key][0], key, expected)


def _check_config(place: Path, model: PreTrainedModel) -> None:
    try:
        written = json.loads((place / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(f"{place}/config.json was not written right: {error}") from error
    for field in FIELDS:
        expected = json.loads(json.dumps(getattr(model.config, field, None)))
        if written.get(field) != expected:
            raise OutputError(f"{place}/config.json was not written right: {field} is another one")


def _shapes(place: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Every tensor's file and shape, from the files' headers."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in sorted(place.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as stored:
                for key in list(stored.keys()):
                    if key in shapes:
                        raise OutputError(
                            f"{place} was not written right: {key} is in {shapes[key][0]} and in {file.name}"
                        )
                    shapes[key] = file.name, tuple(stored.get_slice(key).get_shape())
        except (SafetensorError, OSError) as error:
            raise OutputError(f"{file} was not written right: {error}") from error
    return shapes


def _check_value(file: Path, key: str, expected: Tensor) -> None:
    """Bit for bit: a gate that is rounded decides otherwise."""
    with safe_open(file, framework="pt") as stored:
        found = stored.get_tensor(key)
    expected = expected.detach().cpu().contiguous()
    same = found.dtype == expected.dtype and torch.equal(
        found.contiguous().view(torch.uint8), expected.view(torch.uint8)
    )
    if not same:
        raise OutputError(f"{file} was not written right: {key} holds other values than the model")


def _check_index(place: Path, shapes: dict[str, Any]) -> None:
    path = place / "model.safetensors.index.json"
    if not path.is_file():
        return
    listed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    if listed != {key: file for key, (file, _) in shapes.items()}:
        raise OutputError(f"{path} was not written right: it does not list what the files hold")


def _expected(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Weights and gates by their names in the model; of tied ones, that which is stored."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    ignored = set(model._keys_to_ignore_on_save or ())
    return {
        name: tuple(x.shape)
        for name, x in model.state_dict().items()
        if name not in tied | ignored
        and "_quantizer" not in name
        and not name.endswith("_extra_state")
    }
