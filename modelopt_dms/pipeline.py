# SPDX-License-Identifier: Apache-2.0
"""From a recipe to a compressed model: gates, calibration, retrofit, quantization; saved and exported if asked for."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from modelopt.torch.quantization.config import need_calibration
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from modelopt_dms.calibration.measuring import HeldOut, trace_curve
from modelopt_dms.calibration.run import (
    CalibrationResult,
    PreparedCalibration,
    calibrate,
    prepare_calibration,
)
from modelopt_dms.calibration.state import WRITTEN as SUMS
from modelopt_dms.checkpoints.base import own_tokenizer
from modelopt_dms.checkpoints.model_card import CARD_FILE, card
from modelopt_dms.checkpoints.written import check_written
from modelopt_dms.config import distributed
from modelopt_dms.config.bundled import DEFAULT_RECIPE
from modelopt_dms.config.calibrate import CalibrateConfig
from modelopt_dms.config.in_use import in_use
from modelopt_dms.config.output_dir import (
    CALIBRATION_DIR,
    RETROFIT_DIR,
    atomic_dir,
    check_output,
    remove,
)
from modelopt_dms.config.progress import Watched, phase, showing
from modelopt_dms.config.quantize import QuantizationConfig
from modelopt_dms.config.recipe import Recipe, load_recipe
from modelopt_dms.config.retrofit import RetrofitConfig
from modelopt_dms.data.batches import calibration_batches
from modelopt_dms.data.dry_run import Preview, preview_prepared
from modelopt_dms.data.mix import SHORTEST, calibration_mix
from modelopt_dms.exporters import ExportError, check_format, export
from modelopt_dms.exporters.hf import write_companions
from modelopt_dms.gates.thresholds import store_curve
from modelopt_dms.modeling.convert import plan_conversion
from modelopt_dms.modeling.mode import apply_dms
from modelopt_dms.quantization.apply import check_quantization, is_quantized, quantize
from modelopt_dms.training.callbacks import check_reporting
from modelopt_dms.training.checkpoint import RESUMABLE
from modelopt_dms.training.loop import PreparedRun, RetrofitResult, prepare, retrofit

SUMMARY_FILE = "dms_summary.json"
EXPORT_DIR = "exported"
# Documents of the built-in mix for a retrofit that would visit more: they are repeated, as other data are.
MOST_BUILT_IN = 1024


def compress(
    model: PreTrainedModel,
    recipe: Recipe | str | Path = DEFAULT_RECIPE,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Any = None,
    output_dir: str | Path | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    resume: bool = True,
    progress: bool = True,
    on_data: Callable[[Preview], None] | None = None,
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
) -> PreTrainedModel:
    """Turn a pretrained causal LM, in place, into one whose KV cache forgets what the model does not need.

    Args:
        model: any transformers causal LM with full-attention layers.
        recipe: calibrated_cr4, or another name of a shipped recipe, path of a YAML file, or a Recipe.
        tokenizer: needed if `data` is text or None; saved with the model, else that of the directory that the model was
            loaded from.
        data: texts, chat records, token ids, a `datasets.Dataset`, paths of .jsonl, .txt or .parquet files, or a
            `Blend` of these. None: the built-in mix of chats, prose and code, see `data.mix.calibration_mix`.
        output_dir: where the model, its recipe and resumable checkpoints go; nothing is written without it.
        overrides: changes to the recipe, {"dms.window": 512} or ["dms.window=512"].
        resume: go on from the newest checkpoint of an interrupted run in `output_dir`.
        progress: show a progress bar.
        on_data: called, before anything is changed, with counts of what the retrofit will read and visit.
        callbacks: transformers' TrainerCallbacks for the retrofit, see `retrofit`.

    Returns:
        The same model in eval mode; `generate` works as before.

    Raises:
        ValueError: recipe, model, data or output directory are not usable; nothing was changed or written.
        StoppedError: a callback stopped the retrofit; the same call with the same output_dir goes on.
    """
    recipe = load_recipe(recipe, overrides)
    target = _check_target(recipe, output_dir)
    if recipe.retrofit is not None:
        check_reporting(recipe.retrofit.report_to, callbacks, target)
    elif callbacks:
        raise ValueError(
            "callbacks are told how a retrofit goes, and the recipe has none; leave them out"
        )
    how = _How(resume, progress, on_data, callbacks)
    with _alone(target):
        return _compress(model, recipe, target, tokenizer, data, how)


@dataclass(frozen=True)
class _How:
    """How a recipe is run: what `compress` takes that does not change its result."""

    resume: bool
    progress: bool
    on_data: Callable[[Preview], None] | None
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]]


def _alone(target: Path | None) -> AbstractContextManager[None]:
    """Keep other runs out of the output directory; of several processes of this run, one writes."""
    return nullcontext() if target is None or not distributed.is_main() else in_use(target)


def _compress(
    model: PreTrainedModel,
    recipe: Recipe,
    target: Path | None,
    tokenizer: PreTrainedTokenizerBase | None,
    data: Any,
    how: _How,
) -> PreTrainedModel:
    """As `compress`, with a recipe that is loaded, into a directory that nobody else uses."""
    plan = _plan_dms(model, recipe, data, tokenizer, target if how.resume else None)
    batches = _plan_quantization(model, recipe.quantize, data, tokenizer)
    if how.on_data is not None and plan.retrofit is not None:
        assert recipe.dms is not None and recipe.retrofit is not None
        counted = preview_prepared(
            plan.retrofit.data,
            recipe.dms,
            recipe.retrofit,
            tokenizer,
            processes=distributed.count(),
        )
        how.on_data(counted)
    how = replace(how, progress=how.progress and distributed.is_main())
    with showing(how.progress):
        watched = Watched(batches, "quantize", "batch")
        results = _run(model, recipe, plan, watched, target, how)
        if target is not None and distributed.is_main():
            _write(model, target, recipe, tokenizer, results)
    distributed.wait_for_all()
    return model


def _check_target(recipe: Recipe, output_dir: str | Path | None) -> Path | None:
    """The output directory, if there is one, into which the recipe's export can be written."""
    target = (
        None if output_dir is None else check_output(output_dir, (CALIBRATION_DIR, RETROFIT_DIR))
    )
    if recipe.export is not None:
        if target is None:
            raise ValueError(f"export.format={recipe.export.format!r} needs an output_dir")
        check_format(recipe.export.format, {})
    return target


def _run(
    model: PreTrainedModel,
    recipe: Recipe,
    plan: "_Plan",
    batches: Sequence[dict[str, Tensor]],
    target: Path | None,
    how: _How,
) -> dict[str, CalibrationResult | RetrofitResult]:
    """Everything that changes the model, in place; what calibration and retrofit achieved."""
    results: dict[str, CalibrationResult | RetrofitResult] = {}
    if recipe.dms is not None:
        apply_dms(model, recipe.dms)
    if recipe.quantize is not None and recipe.quantize.order == "before_retrofit":
        quantize(model.eval(), recipe.quantize, batches)
    if recipe.calibrate is not None:
        # Every process computes the same, and one writes.
        work = target / CALIBRATION_DIR if target is not None and distributed.is_main() else None
        results["calibrate"] = calibrate(
            model,
            recipe.calibrate,
            data=plan.calibration,
            output_dir=work,
            resume=how.resume,
            progress=how.progress,
        )

    def carry_curve(trained: PreTrainedModel) -> None:
        _measure_curve(trained, model, recipe, plan, how.progress)

    measured = recipe.retrofit is not None and (recipe.quantize is None or is_quantized(model))
    if recipe.retrofit is not None:
        results["retrofit"] = retrofit(
            model,
            recipe.retrofit,
            data=plan.retrofit,
            output_dir=None if target is None else target / RETROFIT_DIR,
            finish=carry_curve if measured else None,
            resume=how.resume,
            progress=how.progress,
            callbacks=how.callbacks,
        )
    model.eval()
    if recipe.quantize is not None and not is_quantized(model):
        quantize(model, recipe.quantize, batches)
    if not measured:
        carry_curve(model)
    return results


def _write(
    model: PreTrainedModel,
    target: Path,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    results: Mapping[str, CalibrationResult | RetrofitResult],
) -> None:
    """Export and save a finished model, complete or not there at all; then remove what only a resume needs.

    Raises:
        ExportError: the format cannot hold the model, which is saved all the same.
    """
    refused = None
    if tokenizer is None:
        # In a directory without one, transformers would make up an empty one.
        tokenizer = own_tokenizer(model)
    with atomic_dir(target) as place:
        if recipe.export is not None:
            try:
                export(
                    model,
                    place / EXPORT_DIR,
                    recipe.export.format,
                    tokenizer=tokenizer,
                    recipe=recipe,
                )
            except ExportError as error:
                refused = ExportError(f"{error} (the model itself is saved in {target})")
        with phase("save"):
            save(model, place, recipe=recipe, tokenizer=tokenizer, results=results)
    remove(target / CALIBRATION_DIR, SUMS)
    remove(target / RETROFIT_DIR, RESUMABLE)
    if refused is not None:
        raise refused


@dataclass(frozen=True)
class _Plan:
    """What gates are fitted to and learn from."""

    calibration: PreparedCalibration | None = None
    retrofit: PreparedRun | None = None


def _plan_dms(
    model: PreTrainedModel,
    recipe: Recipe,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    resume_from: Path | None,
) -> _Plan:
    """Check that gates can be put on the model and can be fitted or learn; the samples, if they will."""
    if recipe.dms is None:
        return _Plan()
    plan_conversion(model, recipe.dms)
    first = recipe.quantize is not None and recipe.quantize.order == "before_retrofit"
    quantization = recipe.quantize if first else None
    calibration = run = None
    if recipe.calibrate is not None:
        calibration = prepare_calibration(
            model,
            recipe.calibrate,
            recipe.dms,
            data=_or_built_in(data, tokenizer, _calibration_needs(recipe.calibrate)),
            tokenizer=tokenizer,
            quantization=quantization,
            resume_from=None if resume_from is None else resume_from / CALIBRATION_DIR,
        )
    if recipe.retrofit is not None:
        run = prepare(
            model,
            recipe.retrofit,
            recipe.dms,
            data=_or_built_in(data, tokenizer, _retrofit_needs(recipe.retrofit)),
            tokenizer=tokenizer,
            calibration=recipe.calibrate,
            quantization=quantization,
            resume_from=None if resume_from is None else resume_from / RETROFIT_DIR,
        )
    return _Plan(calibration, run)


def _measure_curve(
    trained: PreTrainedModel, model: PreTrainedModel, recipe: Recipe, plan: _Plan, progress: bool
) -> None:
    """Have a model carry the curve of the finished one, itself or the sharded one that learned for it.

    What calibration measured holds if nothing came after it.
    """
    dms, how = recipe.dms, recipe.calibrate or CalibrateConfig()
    if dms is None or (recipe.retrofit is None and recipe.quantize is None):
        return
    if plan.retrofit is not None and recipe.retrofit is not None:
        # The retrofit's: it may have learned from calibration's.
        held_out, batch_size = plan.retrofit.data.held_out, recipe.retrofit.batch_size
        held_out = held_out.select(torch.arange(min(len(held_out), how.held_out)))
        length = recipe.retrofit.sequence_length
    elif plan.calibration is not None:
        held_out, batch_size = plan.calibration.data.held_out, how.batch_size
        length = how.sample_length
    else:
        return
    ratios = sorted({*how.curve, dms.target_cr} - {1.0})
    judge = HeldOut(trained, held_out, length=length, batch_size=batch_size, progress=progress)
    store_curve(model, trace_curve(judge, ratios, progress=progress))


def _plan_quantization(
    model: PreTrainedModel,
    config: QuantizationConfig | None,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[dict[str, Tensor]]:
    """Check that the model can be quantized; what to calibrate with, unless nothing is measured on data."""
    if config is None:
        return []
    check_quantization(model, config)
    if data is None and not need_calibration(config.model_dump()):
        return []
    return calibration_batches(
        model,
        _or_built_in(data, tokenizer, (config.samples, config.sample_length, 0)),
        tokenizer,
        samples=config.samples,
        length=config.sample_length,
        batch_size=config.batch_size,
    )


def _calibration_needs(config: CalibrateConfig) -> tuple[int, int, int]:
    """Number, length and seed of the documents that a calibration reads."""
    return config.samples + config.held_out, config.sample_length, config.seed


def _retrofit_needs(config: RetrofitConfig) -> tuple[int, int, int]:
    """Number, length and seed of the documents that a retrofit reads; some more are held out."""
    visited = min(config.visits(distributed.count()), MOST_BUILT_IN)
    return visited + 32, config.sequence_length, config.seed


def _or_built_in(
    data: Any, tokenizer: PreTrainedTokenizerBase | None, needs: tuple[int, int, int]
) -> Any:
    """The data; documents of the built-in mix if there are none, but a tokenizer to make them with."""
    if data is not None or tokenizer is None:
        return data
    count, length, seed = needs
    return calibration_mix(count, max(length, SHORTEST), tokenizer, seed)


def save(
    model: PreTrainedModel,
    place: Path,
    *,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    results: Mapping[str, CalibrationResult | RetrofitResult],
) -> None:
    """Write model, tokenizer, resolved recipe, summary and model card into a directory, and read the model back.

    Raises:
        OutputError: it was not written right.
    """
    model.save_pretrained(place)
    check_written(place, model)
    write_companions(place, tokenizer, recipe)
    summary = {name: result.summary() for name, result in results.items()}
    (place / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (place / CARD_FILE).write_text(card(model, recipe, summary), encoding="utf-8")
