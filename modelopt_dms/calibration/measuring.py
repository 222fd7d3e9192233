# SPDX-License-Identifier: Apache-2.0
"""Which thresholds give which compression ratio, and what that costs: the curve of a model, measured."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from modelopt_dms.config.compression_ratio import is_reachable, physical_cr, target_evicted_fraction
from modelopt_dms.data.packing import Samples
from modelopt_dms.gates.curve import Curve, CurvePoint
from modelopt_dms.gates.gate import eviction_off, gates, record_alpha
from modelopt_dms.gates.thresholds import move_thresholds, thresholds_of
from modelopt_dms.kernels.reference import shift_decisions
from modelopt_dms.modeling.convert import dms_modules
from modelopt_dms.modeling.divergence import kl_divergence
from modelopt_dms.modeling.lm_head import input_device, last_hidden, output_head
from modelopt_dms.modeling.mode import dms_config_of
from modelopt_dms.training.loss import mean_decision

# A point of the curve is where it should be if its ratio is at most this share above the one asked for, and none below;
# at high ratios, where that is hardly any token, if it evicts this much of the evictable tokens more.
NEAR_RATIO = 0.04
NEAR_FRACTION = 0.006
# Corrections of a shift; more only if the ratio is not reached yet.
TRIES = 3
LOGITS_TOKENS = 512
# Tokens whose distributions are compared, evenly spaced: enough for a mean, at a fraction of the vocabulary's cost.
COMPARED_TOKENS = 2048


def trace_curve(held_out: "HeldOut", ratios: Sequence[float], *, progress: bool = False) -> Curve:
    """Measure what a common shift of all thresholds does, at shifts that reach some compression ratios.

    What is evicted in one layer changes what gates of the next ones read, so that shifts found with nothing evicted are
    only nearly right. For the ratio that the model is made for (`target_cr`) and the highest one the shift is corrected
    until it is reached; the others are measured once, near to where they were asked for, and lie within the curve.

    Args:
        held_out: samples and a model; the model's thresholds are the curve's shift 0, and stay.
        ratios: wanted compression ratios; those out of reach at the length are left out.
        progress: show a progress bar.
    """
    model, dms, length = held_out.model, held_out.dms, held_out.length
    logits = torch.cat([x.flatten() for x in held_out.margins()]).sort().values
    base = thresholds_of(model)
    always = (dms.window, length, dms.protect_first)
    reachable = [x for x in sorted(ratios) if is_reachable(x, *always)]
    fractions = [
        target_evicted_fraction(x, length, dms.window, dms.protect_first) for x in reachable
    ]
    reached_exactly = {dms.target_cr, *reachable[-1:]}
    points: list[CurvePoint] = []
    bar = tqdm(total=len(fractions), desc="curve", unit="ratio", disable=not progress)
    with bar, _in_eval(model):
        correction = 0.0
        try:
            for ratio, wanted in zip(reachable, fractions, strict=True):
                near = max(NEAR_RATIO / ratio, NEAR_FRACTION)
                for attempt in count(1):
                    # A little more than asked for, so that the ratio lies within what was measured.
                    share = min(max(wanted + near / 2 + correction, 0.0), 1.0)
                    shift = threshold_for(logits, share)
                    move_thresholds(model, base, shift)
                    points.append(held_out.point(shift))
                    beyond = points[-1].evicted_fraction - wanted
                    reached = beyond >= 0.0 or share >= 1.0
                    done = reached and (beyond <= near or attempt >= TRIES)
                    if not done:
                        correction += max(near / 2 - beyond, near if not reached else -1.0)
                    if done or ratio not in reached_exactly:
                        break
                bar.update()
        finally:
            move_thresholds(model, base, 0.0)
    nothing = CurvePoint(threshold_for(logits, 0.0), 0.0, 1.0, 1.0, 1.0, 0.0)
    return Curve(length, dms.window, dms.protect_first, base, _in_order([nothing, *points]))


def refine_thresholds(model: PreTrainedModel, curve: Curve, fraction: float) -> Curve:
    """Move thresholds, in place, to the point that was measured nearest to a fraction; the curve, seen from there."""
    here = min(curve.points, key=lambda x: abs(x.evicted_fraction - fraction)).shift
    move_thresholds(model, curve.thresholds, here)
    points = tuple(replace(x, shift=x.shift - here) for x in curve.points)
    return replace(curve, thresholds=thresholds_of(model), points=points)


class HeldOut:
    """Held-out samples, and what the model and its gates say about them with eviction off, read in one pass."""

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        samples: Samples,
        *,
        length: int,
        batch_size: int,
        progress: bool = False,
    ) -> None:
        """Read samples that the model was not fitted to; compression ratios are about sequences of `length` tokens."""
        self.model, self.length, self.dms = model, length, dms_config_of(model)
        starts = range(0, len(samples), batch_size)
        self.batches = [samples.batch(slice(x, x + batch_size)) for x in starts]
        self.every = max(1, int((samples.tokens_ahead >= 0).sum()) // COMPARED_TOKENS)
        self.wanted: list[Tensor] = []
        found: dict[str, list[Tensor]] = {name: [] for name in dms_modules(model)}
        bar = tqdm(self.batches, desc="held out", unit="forward", disable=not progress)
        with _in_eval(model), eviction_off(model):
            for batch in bar:
                counts = counted_tokens(batch, self.dms.window, self.dms.protect_first)
                with _reading(model, counts, found):
                    self.wanted.append(self._hidden(batch).cpu())
        # Eviction logits of every layer [R, N], N tokens whose eviction counts.
        self._logits = [torch.cat(parts, dim=1) for parts in found.values()]

    def margins(self) -> list[Tensor]:
        """By how much eviction logits exceed their thresholds, for every layer [R, N]; nothing is evicted."""
        thresholds = [x.threshold.cpu()[:, None] for x in gates(self.model)]
        return [x - t for x, t in zip(self._logits, thresholds, strict=True)]

    @torch.no_grad()
    def point(self, shift: float) -> CurvePoint:
        """What the model's thresholds give as they are."""
        dms, kl, tokens = self.dms, 0.0, 0
        shares: list[float] = []
        counts: list[int] = []
        for batch, wanted in zip(self.batches, self.wanted, strict=True):
            with record_alpha(self.model) as record:
                hidden = self._hidden(batch)
            valid = batch["tokens_ahead"] >= 0
            valid[:, torch.arange(valid.shape[1]) % self.every != 0] = False
            head = output_head(self.model)
            batch_kl = kl_divergence(
                hidden,
                wanted.to(hidden.device),
                valid.to(hidden.device),
                head,
                head,
                direction="forward",
                chunk_tokens=LOGITS_TOKENS,
            )
            kl, tokens = kl + float(batch_kl) * int(valid.sum()), tokens + int(valid.sum())
            counted = counted_tokens(batch, dms.window, dms.protect_first)
            governed = {i: shift_decisions(x, dms.decision_shift) for i, x in record.hard.items()}
            for row, own in enumerate(counted):
                if own.any():
                    of_row = {i: x[row : row + 1] for i, x in governed.items()}
                    shares.append(float(mean_decision(of_row, own[None])))
                    counts.append(int(own.sum()))
        evicted = sum(x * n for x, n in zip(shares, counts, strict=True)) / max(1, sum(counts))
        mean, lowest, highest = (
            physical_cr(x, self.length, dms.window, dms.protect_first)
            for x in (evicted, min(shares, default=0.0), max(shares, default=0.0))
        )
        return CurvePoint(shift, evicted, mean, lowest, highest, max(0.0, kl / max(1, tokens)))

    def _hidden(self, batch: dict[str, Tensor]) -> Tensor:
        device = input_device(self.model)
        return last_hidden(
            self.model, batch["input_ids"].to(device), batch["position_ids"].to(device)
        )


def counted_tokens(batch: dict[str, Tensor], window: int, protect_first: int) -> Tensor:
    """Which tokens [B, T] of samples could be evicted while their document still goes on."""
    return (batch["tokens_ahead"] > window) & (batch["position_ids"] >= protect_first)


def _in_order(points: Sequence[CurvePoint]) -> tuple[CurvePoint, ...]:
    """By rising evicted fraction; of several that evict as much, the one with the highest thresholds."""
    unique = {x.evicted_fraction: x for x in sorted(points, key=lambda x: x.shift)}
    return tuple(unique[x] for x in sorted(unique))


def threshold_for(logits: Tensor, fraction: float) -> float:
    """The value that this share of sorted logits [N] is above."""
    if fraction <= 0.0:
        return float(logits[-1])
    if fraction >= 1.0:  # well below all of them: other tokens may have lower ones
        return float(2 * logits[0] - logits[-1])
    return float(logits[min(len(logits) - 1, int((1.0 - fraction) * len(logits)))])


@contextmanager
def _reading(
    model: PreTrainedModel, counts: Tensor, found: dict[str, list[Tensor]]
) -> Iterator[None]:
    """Inside, every forward adds the eviction logits [R, N] of the tokens [B, T] that count, by layer name."""

    def read(name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        gate = module.dms_gate
        z = shift_decisions(gate.logits(gate.read(args, kwargs)), gate.shift)
        found[name].append(z.transpose(0, 1)[:, counts.to(z.device)].cpu())

    handles = [
        module.register_forward_pre_hook(partial(read, name), with_kwargs=True)
        for name, module in dms_modules(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
