# SPDX-License-Identifier: Apache-2.0
"""Calibration in one call: fit, thresholds, curve. No gradients, no optimizer."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.calibration.fit import accumulate
from modelopt_dms.calibration.measuring import (
    HeldOut,
    refine_thresholds,
    threshold_for,
    trace_curve,
)
from modelopt_dms.calibration.samples import CalibrationData, draw
from modelopt_dms.calibration.state import WRITTEN, check_state
from modelopt_dms.calibration.statistics import Fit
from modelopt_dms.config.calibrate import CalibrateConfig
from modelopt_dms.config.compression_ratio import check_reachable, target_evicted_fraction
from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.config.output_dir import remove
from modelopt_dms.config.quantize import QuantizationConfig, quantization_to_dict
from modelopt_dms.data.mixing import open_sources, read_once
from modelopt_dms.gates.curve import Curve
from modelopt_dms.gates.gate import gates
from modelopt_dms.gates.thresholds import store_curve
from modelopt_dms.modeling.lm_head import check_head
from modelopt_dms.modeling.mode import dms_config_of
from modelopt_dms.quantization.apply import quantization_of
from modelopt_dms.training.checkpoint import FREE_FIELDS, model_digest

# Standard deviation of fitted logits: several times that of the retrofit's noise (1.8), so that a retrofit which starts
# from them starts from nearly hard decisions.
SPREAD = 5.0


@dataclass(frozen=True)
class PreparedCalibration:
    """What `prepare_calibration` made: samples, and the description by which a resume knows the run."""

    data: CalibrationData
    description: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class CalibrationResult:
    """What a calibration did, and what it achieved on samples that gates were not fitted to.

    Attributes:
        seconds: of this process.
        tokens: that gates were fitted to.
        target_cr: what the recipe asked for.
        sequence_length: tokens of a sample.
        compression_ratio: measured at that length, with hard decisions.
        lowest_cr: of the held-out sample that was compressed least.
        highest_cr: of the one that was compressed most.
        evicted_fraction: share of the tokens whose eviction takes effect.
        kl: KL divergence from the model with eviction off, nats per token.
        explained: for every layer and row, the share of the importance's variance that the gate explains.
        curve: what other thresholds would give.
    """

    seconds: float
    tokens: int
    target_cr: float
    sequence_length: int
    compression_ratio: float
    lowest_cr: float
    highest_cr: float
    evicted_fraction: float
    kl: float
    explained: tuple[tuple[float, ...], ...]
    curve: Curve

    def summary(self) -> dict[str, Any]:
        """Everything but the curve, which the model carries, as JSON."""
        return {key: value for key, value in asdict(self).items() if key != "curve"}


def prepare_calibration(
    model: PreTrainedModel,
    config: CalibrateConfig,
    dms: DMSConfig,
    *,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantization: QuantizationConfig | None = None,
    resume_from: Path | None = None,
) -> PreparedCalibration:
    """Check what can be checked before the model is converted, and draw the samples.

    Args:
        model: converted or not.
        config: how to calibrate.
        dms: the config that the model has or will have.
        data: see `modelopt_dms.data.documents.ACCEPTED`.
        tokenizer: needed unless the data are token ids.
        quantization: how the model is quantized, or will be before.
        resume_from: directory whose state, if there is any, must be of this run.

    Raises:
        ValueError: the gate has no weights, the ratio is out of reach, data are not usable, or the state is of
            another run.
    """
    if dms.gate == "neuron":
        raise ValueError(
            "calibrate needs gates with weights of their own: dms.gate='adapter' or 'residual', not 'neuron'"
        )
    check_reachable(
        dms.target_cr, dms.window, config.sample_length, dms.protect_first, "sample_length"
    )
    drawn = draw(read_once(open_sources(data, tokenizer, model), config.seed), config, dms)
    values = {key: value for key, value in config.model_dump().items() if key not in FREE_FIELDS}
    description: dict[str, dict[str, Any]] = {
        "calibrate": values,
        "dms": dms.model_dump(),
        "quantize": {} if quantization is None else quantization_to_dict(quantization),
        "data": {"samples": len(drawn.fit), "digest": drawn.fit.digest()},
        "model": {"class": type(model).__name__, "digest": model_digest(model)},
    }
    if resume_from is not None:
        check_state(resume_from, description)
    return PreparedCalibration(drawn, description)


def calibrate(
    model: PreTrainedModel,
    config: CalibrateConfig | Mapping[str, Any] | None = None,
    *,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output_dir: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> CalibrationResult:
    """Fit the gates of a converted model, in place, to what evicting each key would cost. No back-propagation.

    Text is read once with eviction off. A key is as important as the change of the layer's output that queries beyond
    the delay window would see without it (`kernels.importance`); each gate's rows are the ridge regression of that on
    what the gate reads; thresholds then give `target_cr` on held-out samples. Afterwards the model carries a curve, for
    `set_compression`.

    Args:
        model: converted by `apply_dms`; target ratio and window are read from its config.
        config: how to calibrate.
        data: see `modelopt_dms.data.documents.ACCEPTED`; or what `prepare_calibration` made of it.
        tokenizer: needed unless the data are token ids.
        output_dir: for resumable state; nothing is written without it.
        resume: go on from the state in `output_dir`.
        progress: show a progress bar.

    Raises:
        ValueError: model, data, settings or output directory are not usable; nothing was changed or written.
    """
    dms = dms_config_of(model)
    if not isinstance(config, CalibrateConfig):
        config = CalibrateConfig(**(config or {}))
    directory = None if output_dir is None else Path(output_dir)
    if isinstance(data, PreparedCalibration):
        run = data
    else:
        quantization = quantization_of(model)
        run = prepare_calibration(
            model, config, dms, data=data, tokenizer=tokenizer, quantization=quantization
        )
    check_head(model)
    if directory is not None and not resume:
        remove(directory, WRITTEN)
    start = time.perf_counter()
    training = model.training
    model.eval()
    try:
        fits, curve = _fit(model, config, dms, run, directory, progress)
    finally:
        model.train(training)
    store_curve(model, curve)
    here = min(curve.points, key=lambda x: abs(x.shift))
    return CalibrationResult(
        seconds=time.perf_counter() - start,
        tokens=int((run.data.fit.tokens_ahead >= 0).sum()),
        target_cr=dms.target_cr,
        sequence_length=config.sample_length,
        compression_ratio=here.compression_ratio,
        lowest_cr=here.lowest_cr,
        highest_cr=here.highest_cr,
        evicted_fraction=here.evicted_fraction,
        kl=here.kl,
        explained=tuple(tuple(x.explained.tolist()) for x in fits),
        curve=curve,
    )


def _fit(
    model: PreTrainedModel,
    config: CalibrateConfig,
    dms: DMSConfig,
    run: PreparedCalibration,
    directory: Path | None,
    progress: bool,
) -> tuple[list[Fit], Curve]:
    """Fit the gates of a model in eval mode, and set their thresholds; the fits by layer, and the curve."""
    sums = accumulate(
        model,
        run.data.fit,
        config,
        directory=directory,
        description=run.description,
        progress=progress,
    )
    fits = [x.solve(config.ridge) for x in sums.values()]
    _put(model, fits)
    length = config.sample_length
    fraction = target_evicted_fraction(dms.target_cr, length, dms.window, dms.protect_first)
    held_out = HeldOut(
        model,
        run.data.held_out,
        length=length,
        batch_size=config.batch_size,
        progress=progress,
    )
    _set_thresholds(model, held_out.margins(), config, fraction)
    ratios = sorted({*config.curve, dms.target_cr} - {1.0})
    return fits, refine_thresholds(
        model, trace_curve(held_out, ratios, progress=progress), fraction
    )


@torch.no_grad()
def _put(model: PreTrainedModel, fits: list[Fit]) -> None:
    """Make every gate compute -gain * importance - offset: the less a key matters, the higher its eviction logit."""
    gain = SPREAD / max(float(torch.cat([x.variance.cpu() for x in fits]).mean().sqrt()), 1e-12)
    for gate, fit in zip(gates(model), fits, strict=True):
        gate.weight.copy_(-gain / gate.scale * fit.weight)
        # Evicted are keys with an importance below 0, for now.
        gate.threshold.copy_(gain * fit.bias - gate.offset)


def _set_thresholds(
    model: PreTrainedModel, above: list[Tensor], config: CalibrateConfig, fraction: float
) -> None:
    """Move thresholds so that this fraction of held-out tokens is above them; margins [R, N] by layer."""
    together = torch.cat([x.flatten() for x in above]).sort().values
    for gate, rows in zip(gates(model), above, strict=True):
        for row, own in enumerate(rows):
            pool = together if config.budget == "global" else own.sort().values
            gate.threshold[row] += threshold_for(pool, fraction)
