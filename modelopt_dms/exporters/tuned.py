# SPDX-License-Identifier: Apache-2.0
"""A model's directory once more, with other thresholds: nothing else in it changes."""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from modelopt_dms.checkpoints.tensor_names import StoredNames
from modelopt_dms.checkpoints.written import check_written
from modelopt_dms.config.output_dir import atomic_dir, check_output
from modelopt_dms.evaluation.report_page import PAGE
from modelopt_dms.modeling.convert import dms_modules

KEY = ".dms_gate.threshold"


def save_tuned(model: PreTrainedModel, source: str | Path, output_dir: str | Path) -> None:
    """Copy the directory that a model was loaded from, with the thresholds that it has now.

    Args:
        model: loaded from `source`, then set by `set_compression` or `tune`.
        source: written by `compress`, `save_pretrained` or `export`.
        output_dir: for the copy.

    Raises:
        ValueError: `source` holds no such thresholds, or `output_dir` is not free.
    """
    source, target = Path(source), check_output(output_dir)
    wanted = {f"{name}{KEY}": x.dms_gate.threshold for name, x in dms_modules(model).items()}
    holders = {x: keys for x in source.glob("*.safetensors") if (keys := _thresholds(x))}
    names = StoredNames(model)
    found = {names.of(key) for keys in holders.values() for key in keys}
    if found != wanted.keys():
        raise ValueError(
            f"{source} does not hold the thresholds of this model (differing: {sorted(found ^ wanted.keys())[:3]}); "
            "save it with save_pretrained"
        )
    with atomic_dir(target) as place:
        for path in source.iterdir():
            if path in holders:
                _rewrite(
                    path, place / path.name, {key: wanted[names.of(key)] for key in holders[path]}
                )
            elif path.is_file() and path.name != PAGE:  # which shows the other thresholds
                shutil.copy2(path, place / path.name)
        check_written(place, model)


def _thresholds(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as stored:
        return [key for key in list(stored.keys()) if key.endswith(KEY)]


def _rewrite(path: Path, target: Path, changed: dict[str, Tensor]) -> None:
    with safe_open(path, framework="pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(path)
    for key, value in changed.items():
        tensors[key] = value.detach().to("cpu", torch.float32).contiguous()
    save_file(tensors, target, metadata=metadata)
