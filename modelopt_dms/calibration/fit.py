# SPDX-License-Identifier: Apache-2.0
"""One pass over calibration text: what every gate reads, and what evicting each key would cost, as running sums."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modelopt_dms.calibration.state import Description, load_state, save_state
from modelopt_dms.calibration.statistics import Regression
from modelopt_dms.config.calibrate import CalibrateConfig
from modelopt_dms.data.packing import Samples
from modelopt_dms.gates.gate import EvictionGate, eviction_off
from modelopt_dms.kernels.importance import ResidualStream, output_change
from modelopt_dms.kernels.reference import shift_decisions
from modelopt_dms.modeling.convert import dms_modules
from modelopt_dms.modeling.lm_head import input_device

# The importance is a sum of squares that spans many decades: its root, a norm, is nearer to what a
# linear gate can tell apart (benchmarks/results/real_model_log.md has other powers).
POWER = 0.5


class _Observer:
    """Adds one layer's tokens to its sums, forward by forward."""

    def __init__(self, module: Any, sums: Regression) -> None:
        self.gate: EvictionGate = module.dms_gate
        self.sums = sums
        self.module = module
        self.lengths = torch.empty(0)

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the attention runs: what the gate reads."""
        self.features = self.gate.features(self.gate.read(args, kwargs)).float()

    def observe(self, *attended: Any) -> None:
        """While it runs: its queries, keys and values, and how they are scored."""
        self.attended = attended

    def leave(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the decoder layer, whose output says how much a change of the attention's would weigh."""
        q, k, v, scoring = self.attended
        gate, window = self.gate, self.gate.window
        stream = output if isinstance(output, Tensor) else output[0]  # [B, T, C]
        residual = ResidualStream(
            head_grams(self.module, q.shape[1], v.shape[-1]),
            stream.float().square().sum(-1).to(q.device),
        )
        importance = output_change(q, k, v, residual, self.lengths, window, scoring)
        if importance.shape[1] != gate.threshold.numel():  # one decision for all heads
            importance = importance.sum(1, keepdim=True)
        targets = importance.pow(POWER).transpose(1, 2)  # [B, R, T] -> [B, T, R]
        positions = torch.arange(targets.shape[1], device=targets.device)
        last = self.lengths.to(targets.device)[:, None] - 1
        counts = (last - positions > window) & (positions >= gate.protect_first)
        # What is read at a token governs the one before it, if decisions are shifted.
        features = shift_decisions(self.features.transpose(1, 2), gate.shift).transpose(1, 2)
        self.sums.add(features[counts], targets[counts])
        del self.features, self.attended


def head_grams(module: nn.Module, heads: int, width: int) -> Tensor:
    """P^T P [H, Dv, Dv] in float32 of every head's part P [C, Dv] of an attention layer's output projection.

    The projection is the layer's last linear map from H * Dv to anything: o_proj, dense, out_proj, c_proj.

    Raises:
        ValueError: there is none.
    """
    maps = [
        x for x in module.modules() if isinstance(x, nn.Linear) and x.in_features == heads * width
    ]
    if not maps:
        raise ValueError(
            f"{type(module).__name__} has no linear output projection from {heads} heads of {width} dimensions; "
            "calibrate cannot weigh its keys, use a recipe with a retrofit only"
        )
    parts = (
        maps[-1].weight.detach().float().unflatten(1, (heads, width)).transpose(0, 1)
    )  # [H, C, Dv]
    return parts.mT @ parts


@torch.no_grad()
def accumulate(
    model: PreTrainedModel,
    samples: Samples,
    config: CalibrateConfig,
    *,
    directory: Path | None,
    description: Description,
    progress: bool,
) -> dict[str, Regression]:
    """Sums over all samples (one document each, padded on the right) by layer name, with eviction off.

    Goes on from what `directory` holds of the same run, and writes there from time to time; None is nowhere.
    """
    observers = {
        name: _Observer(module, _empty(module.dms_gate))
        for name, module in dms_modules(model).items()
    }
    sums = {name: observer.sums for name, observer in observers.items()}
    done = 0 if directory is None else load_state(directory, sums, description)
    starts = range(0, len(samples), config.batch_size)
    decoder: nn.Module = model.get_decoder()
    bar = tqdm(
        total=len(starts), initial=done, desc="calibrate", unit="forward", disable=not progress
    )
    with bar, _observing(model, observers), eviction_off(model):
        for number, start in enumerate(starts[done:], start=done + 1):
            batch = samples.batch(slice(start, start + config.batch_size))
            lengths = (batch["tokens_ahead"] >= 0).sum(1)
            for observer in observers.values():
                observer.lengths = lengths
            ids = batch["input_ids"][:, : int(lengths.max())].to(input_device(model))
            decoder(input_ids=ids, use_cache=False)
            bar.update()
            if directory is not None and (number % config.save_steps == 0 or number == len(starts)):
                save_state(directory, sums, number, description)
    return sums


def _empty(gate: EvictionGate) -> Regression:
    return Regression.empty(gate.weight.shape[1], gate.threshold.numel(), gate.weight.device)


@contextmanager
def _observing(model: PreTrainedModel, observers: dict[str, _Observer]) -> Iterator[None]:
    handles = []
    for name, observer in observers.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        handles.append(observer.module.register_forward_pre_hook(observer.read, with_kwargs=True))
        handles.append(layer.register_forward_hook(observer.leave))
    try:
        for observer in observers.values():
            observer.gate.observer = observer.observe
        yield
    finally:
        for observer in observers.values():
            observer.gate.observer = None
        for handle in handles:
            handle.remove()
