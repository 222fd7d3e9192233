# SPDX-License-Identifier: Apache-2.0
"""A retrofit whose weights are spread over processes by torch's FSDP2, beside the whole model; its checkpoints.

accelerate's own FSDP2 plugin is not used: it turns into DDP on CPUs without a word, wraps models of transformers only,
and knows nothing of gates, whose decisions leave their layer by another way than its output.

A checkpoint has one safetensors file a process, read back by any number of them. It is written by
torch.distributed.checkpoint in its safetensors format: its default one keeps a pickle.
"""

import copy
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from modelopt_dms.config import distributed
from modelopt_dms.gates.gate import gate_parameters, gates
from modelopt_dms.training.checkpoint import INDEX_FILE, ResumeError, trained_tensors
from modelopt_dms.training.distill import Distiller
from modelopt_dms.training.trainer import RetrofitTrainer

SHARDS_DIR = "shards"
WEIGHTS, OPTIMIZER = "weights", "optimizer"
SCHEDULER_FILE = "scheduler.pt"


class ShardingError(ValueError):
    """A run that cannot be sharded; the message says what to change."""


def check_sharding(model: PreTrainedModel) -> None:
    """Check that a model can be sharded over the processes there are.

    Raises:
        ShardingError: not started by a launcher, by one that shards itself, or a model without known layers or on
            several devices.
    """
    if "WORLD_SIZE" not in os.environ:
        raise ShardingError(
            "retrofit.sharding='fsdp2' needs a launcher: torchrun --nproc-per-node=<GPUs> -m modelopt_dms ..., or "
            "accelerate launch; one process alone takes retrofit.sharding='none'"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise ShardingError(
            "accelerate's own FSDP is on (accelerate launch --use_fsdp, or its config file), but "
            "retrofit.sharding='fsdp2' shards the model itself; launch with --multi_gpu"
        )
    devices = set(getattr(model, "hf_device_map", {}).values())
    if len(devices) > 1:
        raise ShardingError(
            f"the model is spread over devices {sorted(map(str, devices))} by device_map; to shard it, load it without"
        )
    if not _layers(model):
        raise ShardingError(
            f"{type(model).__name__} names no decoder layers to shard (_no_split_modules="
            f"{model._no_split_modules}); accepted are models that do, or retrofit.sharding='none'"
        )


def shard_device() -> torch.device:
    """Where this process keeps its part: its GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def shard(whole: Distiller) -> Distiller:
    """A distiller with the same weights, each process holding its part of them on `shard_device`.

    The whole one stays as and where it is. Layers are gathered one at a time, as they run; what is outside of them
    (embeddings, last norm, output head) for a whole step, as the loss needs the head until the backward pass has ended.
    The process group must exist.
    """
    # FSDP2 moves a layer to the device, shards it and drops what it moved: nothing else may hold these views.
    sharded = copy.deepcopy(whole, _views(whole))
    mesh = init_device_mesh(shard_device().type, (dist.get_world_size(),))
    for model in filter(None, (sharded.model, sharded.copy)):
        for layer in _layers(model):
            for gate in gates(layer):
                if gate_parameters(gate):
                    # A group of their own, gathered around `logits`: the rate loss reaches gates past the output of
                    # their layer, so FSDP2 would not see that it needs them; and they are float32 in any model.
                    fully_shard(gate, mesh=mesh, reshard_after_forward=True)
                    register_fsdp_forward_method(gate, "logits")
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(sharded, mesh=mesh)
    for gate in gates(sharded):
        # Thresholds are calibrated by every process for itself, and GPUs may differ in the last bit.
        dist.broadcast(gate.threshold, src=0)
    # accelerate then leaves it alone; it would refuse DTensors under DDP.
    sharded._is_accelerate_prepared = True  # type: ignore[assignment]
    return sharded


def gather_root(sharded: Distiller) -> None:
    """Have what is outside of the layers whole until the next backward pass, for who calls the model piece by piece."""
    cast(FSDPModule, sharded).unshard()


@torch.no_grad()
def gather_trained(sharded: Distiller, whole: Distiller) -> None:
    """Put what learned into the whole model of every process; all must call this."""
    learned = trained_tensors(sharded)
    for name, tensor in trained_tensors(whole).items():
        part = learned[name]
        tensor.copy_(part.full_tensor() if isinstance(part, DTensor) else part)


def _views(module: nn.Module) -> dict[int, nn.Parameter]:
    """A memo by which deepcopy takes parameters as views of the same memory: the host keeps one copy."""
    return {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in module.parameters()
    }


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that transformers says must stay in one piece: decoder layers."""
    names = set(model._no_split_modules or ())
    return [
        module for module in model.modules() if names & {x.__name__ for x in type(module).__mro__}
    ]


class ShardedTrainer(RetrofitTrainer):
    """Takes what `shard` made, which is in its place; every process writes and reads its part of a checkpoint."""

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        # It is there, and moving what FSDP2 manages fails.
        pass

    def _save_weights(self, checkpoint: Path) -> None:
        # Only one process comes here; weights are written with the optimizer's state, where all do.
        pass

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_weights(Path(resume_from_checkpoint), self.distiller)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_shards(Path(output_dir), self.distiller, self.optimizer.optimizer)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        load_optimizer(Path(checkpoint), self.distiller, self.optimizer.optimizer)
        state = torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True)
        self.lr_scheduler.load_state_dict(state)
        for group, rate in zip(
            self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True
        ):
            group["lr"] = rate


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
    distributed.wait_for_all()
    if distributed.is_main():
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
