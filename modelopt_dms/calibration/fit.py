# SPDX-License-Identifier: Apache-2.0
"""One pass over calibration text: what every gate reads, and how much the future needs each key, as running sums."""

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
from modelopt_dms.config import CalibrateConfig
from modelopt_dms.convert import dms_modules
from modelopt_dms.data import Samples
from modelopt_dms.gate import EvictionGate, eviction_off, hidden_input
from modelopt_dms.ops import Scoring, future_need, shift_decisions
from modelopt_dms.train.head import input_device


class _Observer:
    """Adds one layer's tokens to its sums, forward by forward."""

    def __init__(self, gate: EvictionGate, config: CalibrateConfig, sums: Regression) -> None:
        self.gate, self.config, self.sums = gate, config, sums
        self.lengths = torch.empty(0)

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the layer runs: what its gate reads."""
        self.features = self.gate.features(hidden_input(args, kwargs)).float()

    def watch(self, q: Tensor, k: Tensor, v: Tensor, scoring: Scoring) -> None:
        """While it runs: who needs its keys."""
        gate, window = self.gate, self.gate.window
        largest, mean = future_need(q, k, v, self.lengths, window, scoring)
        need = largest if self.config.need == "max" else mean
        if need.shape[1] != gate.threshold.numel():  # one decision for all heads
            reduced = need.amax(1) if self.config.need == "max" else need.mean(1)
            need = reduced[:, None]
        # Attention weights span decades; their roots are nearer to what a linear gate can tell apart.
        targets = need.sqrt().transpose(1, 2)  # [B, R, T] -> [B, T, R]
        positions = torch.arange(targets.shape[1], device=targets.device)
        last = self.lengths.to(targets.device)[:, None] - 1
        counts = (last - positions > window) & (positions >= gate.protect_first)
        # What is read at a token governs the one before it, if decisions are shifted.
        features = shift_decisions(self.features.transpose(1, 2), gate.shift).transpose(1, 2)
        self.sums.add(features[counts], targets[counts])
        del self.features


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
    """Sums over all samples, by layer name; goes on from what `directory` holds of the same run.

    Args:
        model: a converted model; gates are off while it runs.
        samples: one document each, padded on the right.
        config: batch size, checkpoint interval, which need.
        directory: where to write the sums from time to time; None for nowhere.
        description: what makes this run the one it is.
        progress: show a progress bar.
    """
    observers = {
        name: _Observer(module.dms_gate, config, _empty(module.dms_gate))
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
    modules = dms_modules(model)
    handles = [
        modules[name].register_forward_pre_hook(observer.read, with_kwargs=True)
        for name, observer in observers.items()
    ]
    try:
        for observer in observers.values():
            observer.gate.watch = observer.watch
        yield
    finally:
        for observer in observers.values():
            observer.gate.watch = None
        for handle in handles:
            handle.remove()
