# SPDX-License-Identifier: Apache-2.0
"""A calibration that can be stopped at any moment: its sums in one file that is complete or not there."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from modelopt_dms.calibration.statistics import Regression
from modelopt_dms.config.output_dir import own, share, writing
from modelopt_dms.training.checkpoint import WAYS_OUT, ResumeError, differences

STATE_FILE = "sums.safetensors"
# What a calibration writes into its directory.
WRITTEN = (STATE_FILE, f".{STATE_FILE}.partial")

Description = Mapping[str, Mapping[str, Any]]


def save_state(
    directory: Path, sums: Mapping[str, Regression], done: int, description: Description
) -> None:
    """Write the sums of the first `done` forwards."""
    tensors = {
        f"{layer}.{name}": x.cpu().contiguous()
        for layer, regression in sums.items()
        for name, x in regression.tensors().items()
    }
    staged = directory / f".{STATE_FILE}.partial"
    try:
        own(directory)
        with writing(directory):
            save_file(
                tensors,
                staged,
                metadata={"done": str(done), "description": json.dumps(description)},
            )
            share(staged)
        os.replace(staged, directory / STATE_FILE)
    except OSError as error:
        raise ResumeError(f"output_dir={directory} cannot be written: {error}") from error


def load_state(directory: Path, sums: Mapping[str, Regression], description: Description) -> int:
    """Put the sums of an interrupted run of this description back; returns how many forwards are done.

    Raises:
        ResumeError: the file is broken or of another run.
    """
    path = directory / STATE_FILE
    done = check_state(directory, description)
    if not done:
        return 0
    with safe_open(path, framework="pt") as stored:
        for layer, regression in sums.items():
            for name, x in regression.tensors().items():
                x.copy_(stored.get_tensor(f"{layer}.{name}"))
    return done


def check_state(directory: Path, description: Description) -> int:
    """How many forwards of the described run a directory holds; 0 if none.

    Raises:
        ResumeError: the file is broken or of another run.
    """
    path = directory / STATE_FILE
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata()
        found = json.loads(metadata["description"])
        done = int(metadata["done"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ResumeError(f"{path} cannot be read: {error}; {WAYS_OUT}") from error
    different = differences(found, description)
    if different:
        raise ResumeError(
            f"{path} is of a calibration with other settings: {', '.join(different)}; {WAYS_OUT}"
        )
    return done
