# SPDX-License-Identifier: Apache-2.0
"""The retrofit: data, teacher, Trainer, checkpoints and a measurement at the end, in one call."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)

from modelopt_dms.config import distributed
from modelopt_dms.config.calibrate import CalibrateConfig
from modelopt_dms.config.compression_ratio import (
    check_reachable,
    physical_cr,
    target_evicted_fraction,
)
from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.config.quantize import QuantizationConfig
from modelopt_dms.config.retrofit import RetrofitConfig
from modelopt_dms.data.mixing import PreparedData, open_sources, prepare_samples
from modelopt_dms.gates.thresholds import curve_of
from modelopt_dms.modeling.lm_head import check_head
from modelopt_dms.modeling.mode import dms_config_of
from modelopt_dms.quantization.apply import quantization_of
from modelopt_dms.training.callbacks import StoppedError, check_reporting, reporters
from modelopt_dms.training.checkpoint import (
    WEIGHTS_FILE,
    check_run,
    describe_run,
    load_trained,
    open_run,
    step_of,
)
from modelopt_dms.training.distill import Distiller, learning
from modelopt_dms.training.lora import adapted, check_lora
from modelopt_dms.training.measure import measure
from modelopt_dms.training.progress import Progress, Row
from modelopt_dms.training.sharding import (
    ShardedTrainer,
    check_sharding,
    gather_root,
    gather_trained,
    load_weights,
    shard,
    shard_device,
)
from modelopt_dms.training.trainer import RetrofitTrainer, training_arguments


@dataclass(frozen=True)
class RetrofitResult:
    """What a retrofit did, and what it achieved on samples it never trained on.

    Evicted fractions are shares of the tokens whose eviction takes effect (all but a document's last window + 1);
    compression ratios are physical ones, context over resident tokens of a sequence of `sequence_length` tokens.

    Attributes:
        steps: optimizer steps.
        seconds: time in the training loop, resumed runs included.
        tokens: tokens visited, padding included.
        target_cr: what the recipe asked for.
        target_fraction: the evicted fraction that gives it.
        compression_ratio: measured, with decisions at the threshold, as in inference.
        evicted_hard: the evicted fraction it comes from.
        evicted_soft: mean of the relaxed decisions with noise, as in training.
        evicted_by_layer: the part of each converted layer in `evicted_hard`.
        kl: KL divergence from the teacher with decisions at the threshold, nats per token.
        kl_soft: with relaxed decisions.
        sequence_length: tokens of the samples.
        window: delay window.
        rows: the log; one row per logging interval.
    """

    steps: int
    seconds: float
    tokens: int
    target_cr: float
    target_fraction: float
    compression_ratio: float
    evicted_hard: float
    evicted_soft: float
    evicted_by_layer: tuple[float, ...]
    kl: float
    kl_soft: float
    sequence_length: int
    window: int
    rows: tuple[Row, ...]

    def summary(self) -> dict[str, Any]:
        """Everything but the log, as JSON."""
        return {key: value for key, value in asdict(self).items() if key != "rows"}


@dataclass(frozen=True)
class PreparedRun:
    """What `prepare` made: packed data, and the description by which a resume knows the run."""

    data: PreparedData
    description: dict[str, dict[str, Any]]


def prepare(
    model: PreTrainedModel,
    config: RetrofitConfig,
    dms: DMSConfig,
    *,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: CalibrateConfig | None = None,
    quantization: QuantizationConfig | None = None,
    resume_from: Path | None = None,
) -> PreparedRun:
    """Check what can be checked before the model is converted, and pack the data; `retrofit` takes them like this.

    Args:
        model: converted or not.
        config: how to train.
        dms: the config that the model has or will have.
        data: see `modelopt_dms.data.documents.ACCEPTED`.
        tokenizer: needed unless the data are token ids.
        calibration: how the gates are calibrated before they learn, if they are.
        quantization: how the model is quantized, or will be before it learns.
        resume_from: directory whose checkpoints, if there are any, must be of this run.

    Raises:
        ValueError: data are missing, empty, too short or not of this model, the ratio is out of reach, or the
            checkpoints are of another run.
    """
    check_reachable(dms.target_cr, dms.window, config.sequence_length, dms.protect_first)
    check_lora(config)
    if config.cr_range is not None:
        _check_range(model, config, config.cr_range[1], dms, calibration)
    if config.sharding == "fsdp2":
        check_sharding(model)
    packed = prepare_samples(
        open_sources(data, tokenizer, model),
        length=config.sequence_length,
        window=dms.window,
        wanted=config.visits(distributed.count()),
        seed=config.seed,
    )
    description = describe_run(
        model, config, dms, calibration, quantization, packed, distributed.count()
    )
    if resume_from is not None:
        check_run(resume_from, description)
    return PreparedRun(packed, description)


def _check_range(
    model: PreTrainedModel,
    config: RetrofitConfig,
    highest: float,
    dms: DMSConfig,
    calibration: CalibrateConfig | None,
) -> None:
    length, protected = config.sequence_length, dms.protect_first
    check_reachable(highest, dms.window, length, protected, wanted="the highest of cr_range")
    if calibration is None:
        curve_of(model).at(highest, length)


def retrofit(
    model: PreTrainedModel,
    config: RetrofitConfig,
    *,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None = None,
    output_dir: str | Path | None = None,
    resume: bool = True,
    progress: bool = True,
    finish: Callable[[PreTrainedModel], None] | None = None,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
) -> RetrofitResult:
    """Teach the gates of a converted model, in place, to evict what the model does not need.

    The model learns where it is: on the CPU, or on the process's GPU. Start one process a GPU for data parallelism.
    With sharding it stays where it is, best on the CPU, while a copy spread over the GPUs learns; in every process it
    then gets what was learned.

    Args:
        model: converted by `apply_dms`; target ratio and window are read from its config.
        config: how to train.
        data: see `modelopt_dms.data.documents.ACCEPTED`; or what `prepare` made of it.
        tokenizer: needed unless the data are token ids.
        output_dir: for checkpoints and logs; nothing is written without it.
        resume: go on from the newest checkpoint in `output_dir`.
        progress: show a progress bar.
        finish: called, in every process, with the trained model while it is still where it learned.
        callbacks: transformers' TrainerCallbacks, told of every step as in any training by Trainer, after those that
            `config.report_to` names. Their `model` is the `Distiller`, whose `model` is this one.

    Raises:
        ValueError: model, data, recipe or output directory are not usable; nothing was changed or written.
        StoppedError: a callback stopped the run, which the same call with the same output_dir goes on with.
    """
    dms = dms_config_of(model)
    check_reporting(config.report_to, callbacks, output_dir)
    if isinstance(data, PreparedRun):
        run = data
    else:
        quantization = quantization_of(model)
        run = prepare(model, config, dms, data=data, tokenizer=tokenizer, quantization=quantization)
    sharded = config.sharding == "fsdp2"
    with adapted(model, config), learning(model, config), _directory(output_dir) as place:
        whole = Distiller(model, config).train()
        check_head(model)
        # This also starts the process group.
        arguments = training_arguments(config, shard_device() if sharded else model.device, place)
        distiller = shard(whole) if sharded else whole
        log = _train(
            distiller,
            run,
            arguments,
            None if output_dir is None else place,
            resume=resume,
            show=progress,
            callbacks=callbacks,
        )
        measured = measure(distiller, run.data.held_out, config.batch_size)
        if finish is not None:
            if sharded:
                gather_root(distiller)
            finish(distiller.model)
        if sharded:
            gather_trained(distiller, whole)
    return _result(config, dms, measured, log)


def _train(
    distiller: Distiller,
    run: PreparedRun,
    arguments: TrainingArguments,
    directory: Path | None,
    *,
    resume: bool,
    show: bool,
    callbacks: Sequence[Any],
) -> Progress:
    """Run or resume the training loop; returns its log."""
    config = distiller.retrofit
    sharded = config.sharding == "fsdp2"
    main = arguments.process_index == 0
    log = Progress(config.steps, directory if main else None, show=show and main)
    checkpoint = None
    if directory is not None:
        checkpoint = open_run(directory, run.description, resume=resume, main=main)
    if checkpoint is not None:
        log.load(checkpoint)
        if step_of(checkpoint) == config.steps:
            if sharded:
                load_weights(checkpoint, distiller)
            else:
                load_trained(distiller, checkpoint / WEIGHTS_FILE)
            return log
    visits = run.data.visits(config.visits(distributed.count()), config.seed)
    begun = 0 if checkpoint is None else step_of(checkpoint)
    told = [*reporters(config.report_to, directory if main else None, begun), *callbacks]
    kind = ShardedTrainer if sharded else RetrofitTrainer
    trainer = kind(distiller, arguments, visits, log, directory, told)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        log.close()
    if trainer.state.global_step < config.steps:
        raise StoppedError(trainer.state.global_step, config.steps, directory)
    return log


@contextmanager
def _directory(output_dir: str | Path | None) -> Iterator[Path]:
    """The output directory, or one that Trainer may make and that leaves nothing behind."""
    if output_dir is not None:
        yield Path(output_dir)
        return
    with tempfile.TemporaryDirectory(prefix="modelopt_dms_") as place:
        yield Path(place)


def _result(
    config: RetrofitConfig, dms: DMSConfig, measured: dict[str, Any], log: Progress
) -> RetrofitResult:
    length, window, protected = config.sequence_length, dms.window, dms.protect_first
    return RetrofitResult(
        steps=config.steps,
        seconds=log.seconds,
        tokens=config.visits(distributed.count()) * length,
        target_cr=dms.target_cr,
        target_fraction=target_evicted_fraction(dms.target_cr, length, window, protected),
        compression_ratio=physical_cr(measured["evicted_hard"], length, window, protected),
        evicted_hard=measured["evicted_hard"],
        evicted_soft=measured["evicted_soft"],
        evicted_by_layer=tuple(measured["evicted_by_layer"]),
        kl=measured["kl"],
        kl_soft=measured["kl_soft"],
        sequence_length=length,
        window=window,
        rows=tuple(log.rows),
    )
