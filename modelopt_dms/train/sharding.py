# SPDX-License-Identifier: Apache-2.0
"""A distiller's weights spread over processes by torch's FSDP2, beside the whole model. Knows no Trainer.

accelerate's own FSDP2 plugin is not used: it turns into DDP on CPUs without a word, wraps models of transformers only,
and knows nothing of gates, whose decisions leave their layer by another way than its output.
"""

import copy
import os
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from modelopt_dms.gate import gate_parameters, gates
from modelopt_dms.train.checkpoint import trained_tensors
from modelopt_dms.train.distill import Distiller


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
            "retrofit.sharding='fsdp2' needs a launcher: torchrun --nproc-per-node=<GPUs> -m modelopt_dms.cli ..., or "
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
