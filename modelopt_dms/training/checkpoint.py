# SPDX-License-Identifier: Apache-2.0
"""The directory of a retrofit: which run it holds, and checkpoints that are complete or not there.

run.json            what the run is: recipe, data, model; a resume must agree with it
train_log.jsonl     one row per logging interval
logs/               TensorBoard, with report_to: tensorboard
checkpoint-<step>/  trained.safetensors (what learns; thresholds), progress.json, Trainer's optimizer and scheduler;
                    of a sharded run, shards/ and shards.json in place of trained.safetensors and optimizer
.partial/           a checkpoint being written
"""

import hashlib
import json
import math
import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from modelopt_dms.config.calibrate import CalibrateConfig
from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.config.output_dir import MARKER, own, remove, share
from modelopt_dms.config.quantize import QuantizationConfig, quantization_to_dict
from modelopt_dms.config.retrofit import RetrofitConfig
from modelopt_dms.data.mixing import PreparedData
from modelopt_dms.gates.gate import EvictionGate, gate_parameters

RUN_FILE = "run.json"
LOG_FILE = "train_log.jsonl"
TENSORBOARD_DIR = "logs"
PARTIAL_DIR = ".partial"
WEIGHTS_FILE = "trained.safetensors"
INDEX_FILE = "shards.json"
PROGRESS_FILE = "progress.json"
KEPT_CHECKPOINTS = 2
# What only a run that goes on needs; the logs stay.
RESUMABLE = (RUN_FILE, f".{RUN_FILE}.partial", "checkpoint-*", PARTIAL_DIR, MARKER)
# Changing these does not change what a run computes.
FREE_FIELDS = ("save_steps", "report_to")
WAYS_OUT = "use another output_dir, or resume=False to start over"
SAMPLES_PER_STEP = "batch_size * gradient_accumulation_steps * processes"


class ResumeError(ValueError):
    """A directory from which a run cannot go on; the message says what differs or is broken."""


def describe_run(
    model: PreTrainedModel,
    config: RetrofitConfig,
    dms: DMSConfig,
    calibration: CalibrateConfig | None,
    quantization: QuantizationConfig | None,
    data: PreparedData,
    processes: int,
) -> dict[str, dict[str, Any]]:
    """What makes a run the one it is, as JSON; two runs with the same description visit the same samples in every step.

    Of how a step's samples are divided among processes and micro-steps only the product counts.
    """
    settings = _computing(config)
    parts = settings.pop("batch_size"), settings.pop("gradient_accumulation_steps"), processes
    return {
        "retrofit": settings | {SAMPLES_PER_STEP: math.prod(parts)},
        "dms": dms.model_dump(),
        "calibrate": {} if calibration is None else _computing(calibration),
        "quantize": {} if quantization is None else quantization_to_dict(quantization),
        "data": {
            "samples": len(data.training),
            "digest": data.training.digest(),
            "shares": [round(part.share, 9) for part in data.parts],
        },
        "model": {"class": type(model).__name__, "digest": model_digest(model)},
    }


def _computing(config: CalibrateConfig | RetrofitConfig) -> dict[str, Any]:
    return {key: value for key, value in config.model_dump().items() if key not in FREE_FIELDS}


def model_digest(model: PreTrainedModel) -> str:
    """A fingerprint of the weights as they were before the retrofit: the start of each, gates apart.

    Raises:
        ValueError: weights are not in memory.
    """
    away = [name for name, x in model.named_parameters() if x.is_meta]
    if away:
        raise ValueError(
            f"{len(away)} weights are offloaded or not loaded ({', '.join(away[:3])}, ...), and are read here; load "
            "the model without offloading (device_map)"
        )
    gates = {name for name, _ in gate_parameters(model)}
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if name not in gates:
            start = parameter.detach().flatten()[:16].double().cpu().tolist()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {start}".encode())
    return digest.hexdigest()[:16]


def check_run(directory: Path, description: Mapping[str, Mapping[str, Any]]) -> Path | None:
    """The newest complete checkpoint in a directory, from which the described run can go on; None at its start.

    Raises:
        ResumeError: the checkpoints there are of another run, or incomplete.
    """
    found = checkpoints(directory)
    if not found:
        return None
    _check_same_run(directory, description)
    _check_complete(found[-1], sharded=description["retrofit"]["sharding"] != "none")
    return found[-1]


def open_run(
    directory: Path, description: Mapping[str, Mapping[str, Any]], *, resume: bool, main: bool
) -> Path | None:
    """Make a directory ready for a run, and find the checkpoint to go on from.

    resume=False starts over and removes the checkpoints of the earlier run. Only the `main` process writes.

    Returns:
        The newest complete checkpoint, or None at the start of a run.

    Raises:
        ResumeError: the checkpoints there are of another run or incomplete, or the directory cannot be written.
    """
    newest = check_run(directory, description) if resume else None
    if main:
        _make_ready(directory, description, [] if resume else checkpoints(directory))
    return newest


def _make_ready(
    directory: Path, description: Mapping[str, Mapping[str, Any]], outdated: list[Path]
) -> None:
    try:
        own(directory)
        remove(directory, (PARTIAL_DIR, *(x.name for x in outdated)))
        own(directory)
        write_text(directory / RUN_FILE, json.dumps(description, indent=2) + "\n")
    except OSError as error:
        raise ResumeError(f"output_dir={directory} cannot be written: {error}") from error


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(
        (x for x in directory.glob("checkpoint-*") if x.name.removeprefix("checkpoint-").isdigit()),
        key=step_of,
    )


def step_of(checkpoint: Path) -> int:
    """Optimizer steps taken before a checkpoint was written."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def commit(directory: Path, step: int) -> None:
    """Turn the checkpoint written under `.partial` into a complete one, and remove the oldest.

    A rename is all or nothing: whenever a run is killed, every checkpoint-<step> is whole.
    """
    name = f"checkpoint-{step}"
    os.replace(directory / PARTIAL_DIR / name, directory / name)
    for path in checkpoints(directory)[:-KEPT_CHECKPOINTS]:
        # Under a name that is not a checkpoint's, so that a half-removed one is never taken for whole.
        doomed = directory / PARTIAL_DIR / f"old-{path.name}"
        os.replace(path, doomed)
        shutil.rmtree(doomed)


def save_trained(module: nn.Module, path: Path) -> None:
    """Write what learns, and the gates' thresholds, and only those, to a safetensors file."""
    save_file({name: x.cpu().contiguous() for name, x in trained_tensors(module).items()}, path)
    share(path)


@torch.no_grad()
def load_trained(module: nn.Module, path: Path) -> None:
    """Put the tensors of `save_trained` back.

    Raises:
        ResumeError: the file is broken, or is not of this model.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ResumeError(
            f"{path} cannot be read: {error}; remove {path.parent} to go on without it"
        ) from error
    ours = trained_tensors(module)
    expected = {name: tuple(x.shape) for name, x in ours.items()}
    stored = {name: tuple(x.shape) for name, x in tensors.items()}
    if expected != stored:
        odd = sorted(dict(expected.items() ^ stored.items()))
        raise ResumeError(
            f"{path} does not fit this model: {', '.join(odd[:3])} missing, unexpected or of another shape"
        )
    for name, tensor in ours.items():
        tensor.copy_(tensors[name])


def trained_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a retrofit changes, and what calibration set before it; the tensors themselves."""
    trained = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    thresholds = {
        f"{name}.threshold": x.threshold
        for name, x in module.named_modules()
        if isinstance(x, EvictionGate)
    }
    return trained | thresholds


def write_text(path: Path, text: str) -> None:
    """Write a file that is complete or not there."""
    staged = path.with_name(f".{path.name}.partial")
    staged.write_text(text, encoding="utf-8")
    os.replace(staged, path)


def _check_same_run(directory: Path, description: Mapping[str, Mapping[str, Any]]) -> None:
    path = directory / RUN_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResumeError(
            f"{path} cannot be read ({error}), so its checkpoints cannot be resumed; {WAYS_OUT}"
        ) from error
    different = differences(stored, description)
    if different:
        raise ResumeError(
            f"output_dir={directory} holds checkpoints of a run with other settings: "
            f"{', '.join(different)}; {WAYS_OUT}"
        )


def differences(
    stored: Mapping[str, Mapping[str, Any]], description: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Where a stored description of a run differs from ours, in words."""
    ours, theirs = _flatten(json.loads(json.dumps(description))), _flatten(stored)
    return [
        f"{key} (there {theirs.get(key)!r}, now {ours.get(key)!r})"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]


def _flatten(description: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        f"{part}.{key}": value
        for part, values in description.items()
        for key, value in values.items()
    }


def _check_complete(checkpoint: Path, *, sharded: bool) -> None:
    names = [PROGRESS_FILE, "trainer_state.json", "scheduler.pt"]
    names += [INDEX_FILE] if sharded else [WEIGHTS_FILE, "optimizer.pt"]
    problems = {x: "is missing" for x in names if not (checkpoint / x).is_file()}
    if sharded and not problems:
        problems = _incomplete_shards(checkpoint)
    archives = [x for x in names if x.endswith(".pt") and x not in problems]
    problems |= {x: "is broken" for x in archives if not _is_intact(checkpoint / x)}
    logs = [x for x in names[:2] if x not in problems]
    problems |= {x: "is broken" for x in logs if not _holds_object(checkpoint / x)}
    for name, problem in problems.items():
        raise ResumeError(
            f"{checkpoint / name} {problem}; remove {checkpoint.name} to go on from an earlier checkpoint"
        )


def _incomplete_shards(checkpoint: Path) -> dict[str, str]:
    """Files of the index that are not there in full length, each with what is wrong."""
    try:
        sizes = json.loads((checkpoint / INDEX_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {INDEX_FILE: "is broken"}
    found = {name: checkpoint / name for name in sizes}
    missing = {name: "is missing" for name, path in found.items() if not path.is_file()}
    broken = {
        name: "is broken"
        for name, path in found.items()
        if name not in missing and path.stat().st_size != sizes[name]
    }
    return missing | broken


def _is_intact(archive: Path) -> bool:
    """Whether a file of torch.save, a zip, is whole: its checksums agree, and it holds numbers and no programs."""
    try:
        if zipfile.ZipFile(archive).testzip() is not None:
            return False
        torch.load(archive, map_location="cpu", mmap=True, weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, KeyError):
        return False
    return True


def _holds_object(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError, RecursionError):
        return False
