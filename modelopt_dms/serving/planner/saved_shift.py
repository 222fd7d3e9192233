# SPDX-License-Identifier: Apache-2.0
"""What ratio a saved model is set to: its gates' thresholds beside those of its curve. Imports no torch."""

import re
from pathlib import Path
from typing import Any

from modelopt_dms.gates.curve import read_curve

_THRESHOLD = re.compile(r"\.(\d+)\..*\.dms_gate\.threshold$")


def saved_shift(directory: Path, stored: Any) -> float:
    """How far the thresholds in a directory are from shift 0 of the curve in its config.json; 0 without weights.

    Args:
        directory: of a DMS model.
        stored: its `dms_curve`.

    Raises:
        ValueError: the curve is damaged.
        OSError: a file cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    curve = read_curve(stored)
    found: dict[int, float] = {}
    for path in directory.glob("*.safetensors"):
        try:
            with safe_open(path, framework="numpy") as tensors:
                for key in list(tensors.keys()):
                    if (layer := _THRESHOLD.search(key)) is not None:
                        found[int(layer[1])] = float(tensors.get_tensor(key).flat[0])
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
    # All thresholds move together: the first layer's tells how far.
    return found[min(found)] - curve.thresholds[0][0] if found else 0.0
