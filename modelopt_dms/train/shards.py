# SPDX-License-Identifier: Apache-2.0
"""What a sharded run must remember, one safetensors file a process, read back by any number of them. Knows no Trainer.

Written and read by torch.distributed.checkpoint in its safetensors format: its default one keeps a pickle.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from modelopt_dms import processes
from modelopt_dms.train.checkpoint import INDEX_FILE, ResumeError, trained_tensors

SHARDS_DIR = "shards"
WEIGHTS, OPTIMIZER = "weights", "optimizer"


def save_shards(checkpoint: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write what learns, thresholds and the optimizer's state: every process its part, so all must call this."""
    parts = {
        WEIGHTS: trained_tensors(module),
        OPTIMIZER: _tensors(get_optimizer_state_dict(module, optimizer)),
    }
    for name, tensors in parts.items():
        writer = HuggingFaceStorageWriter(
            str(checkpoint / SHARDS_DIR / name), save_distributed=True
        )
        with _quietly():
            dcp.save(_storable(tensors), storage_writer=writer)
    processes.wait_for_all()
    if processes.is_main():
        files = sorted((checkpoint / SHARDS_DIR).rglob("*.safetensors"))
        sizes = {str(x.relative_to(checkpoint)): x.stat().st_size for x in files}
        (checkpoint / INDEX_FILE).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")


def load_weights(checkpoint: Path, module: nn.Module) -> None:
    """Put back what learns, and the thresholds; the processes need not be as many as wrote them.

    Raises:
        ResumeError: a file is broken, or not of this model.
    """
    _load(checkpoint / SHARDS_DIR / WEIGHTS, trained_tensors(module))


def load_optimizer(checkpoint: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put back the optimizer's state, but for the learning rate, which is the scheduler's.

    Raises:
        ResumeError: a file is broken, or not of this model.
    """
    state = get_optimizer_state_dict(module, optimizer)
    _load(checkpoint / SHARDS_DIR / OPTIMIZER, _tensors(state))
    set_optimizer_state_dict(module, optimizer, state)


def _load(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Fill tensors in place."""
    try:
        with _quietly():
            dcp.load(_storable(tensors), storage_reader=HuggingFaceStorageReader(str(directory)))
    except Exception as error:  # torch wraps what any process met into one of its own
        raise ResumeError(
            f"{directory} cannot be read: {error}; remove {directory.parent.parent} to go on without it"
        ) from error


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """The part of an optimizer's state that its recipe does not tell."""
    return {
        f"{name}.{key}": x for name, values in state["state"].items() for key, x in values.items()
    }


def _storable(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same memory; safetensors slices need a dimension, which step counts lack."""
    return {
        name: x if isinstance(x, DTensor) or x.ndim else x.view(1) for name, x in tensors.items()
    }


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the planner's remarks on how it splits files."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
