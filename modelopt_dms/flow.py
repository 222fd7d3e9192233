# SPDX-License-Identifier: Apache-2.0
"""The front door's flow: recipe -> gates -> retrofit -> a model that forgets, saved if asked for."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modelopt.torch.quantization.config import need_calibration
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.config import QuantizationConfig
from modelopt_dms.convert import plan_conversion
from modelopt_dms.data import calibration_batches
from modelopt_dms.exporters import RECIPE_FILE, export
from modelopt_dms.mode import apply_dms
from modelopt_dms.output import check_output, staged
from modelopt_dms.quantization import check_quantization, is_quantized, quantize
from modelopt_dms.recipe import Recipe, load_recipe, recipe_to_yaml
from modelopt_dms.train import PreparedRun, RetrofitResult, prepare, retrofit

SUMMARY_FILE = "dms_summary.json"
WORK_DIR = "retrofit"
EXPORT_DIR = "exported"


def compress(
    model: PreTrainedModel,
    recipe: Recipe | str | Path = "dms_cr4",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data: Any = None,
    output_dir: str | Path | None = None,
    overrides: Mapping[str, Any] | Sequence[str] = (),
    resume: bool = True,
    progress: bool = True,
) -> PreTrainedModel:
    """Turn a pretrained causal LM, in place, into one whose KV cache forgets what the model does not need.

    Args:
        model: any transformers causal LM with full-attention layers.
        recipe: name of a shipped recipe, path of a YAML file, or a Recipe.
        tokenizer: needed if `data` is text; saved with the model.
        data: texts, chat records, token ids, a `datasets.Dataset`, or paths of .jsonl, .txt or .parquet files.
        output_dir: where the model, its recipe and resumable checkpoints go; nothing is written without it.
        overrides: changes to the recipe, {"dms.window": 512} or ["dms.window=512"].
        resume: go on from the newest checkpoint of an interrupted run in `output_dir`.
        progress: show a progress bar.

    Returns:
        The same model in eval mode; `generate` works as before.

    Raises:
        ValueError: recipe, model, data or output directory are not usable; nothing was changed or written.
    """
    recipe = load_recipe(recipe, overrides)
    target = None if output_dir is None else check_output(output_dir, (WORK_DIR, EXPORT_DIR))
    if recipe.export is not None and target is None:
        raise ValueError(f"export.format={recipe.export.format!r} needs an output_dir")
    work = None if target is None else target / WORK_DIR
    run = _plan_dms(model, recipe, data, tokenizer, work if resume else None)
    batches = _plan_quantization(model, recipe.quantize, data, tokenizer)
    result = None
    if recipe.dms is not None:
        apply_dms(model, recipe.dms)
    if recipe.quantize is not None and recipe.quantize.order == "before_retrofit":
        quantize(model.eval(), recipe.quantize, batches)
    if recipe.retrofit is not None:
        result = retrofit(
            model, recipe.retrofit, data=run, output_dir=work, resume=resume, progress=progress
        )
    model.eval()
    if recipe.quantize is not None and not is_quantized(model):
        quantize(model, recipe.quantize, batches)
    if target is not None:
        if recipe.export is not None:
            exported = target / EXPORT_DIR
            shutil.rmtree(exported, ignore_errors=True)  # an interrupted run's
            export(model, exported, recipe.export.format, tokenizer=tokenizer, recipe=recipe)
        save(model, target, recipe=recipe, tokenizer=tokenizer, result=result)
    return model


def _plan_dms(
    model: PreTrainedModel,
    recipe: Recipe,
    data: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    resume_from: Path | None,
) -> PreparedRun | None:
    """Check that gates can be put on the model and can learn; the packed data, if they will."""
    if recipe.dms is None:
        return None
    plan_conversion(model, recipe.dms)
    if recipe.retrofit is None:
        return None
    first = recipe.quantize is not None and recipe.quantize.order == "before_retrofit"
    return prepare(
        model,
        recipe.retrofit,
        recipe.dms,
        data=data,
        tokenizer=tokenizer,
        quantization=recipe.quantize if first else None,
        resume_from=resume_from,
    )


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
        data,
        tokenizer,
        samples=config.samples,
        length=config.sample_length,
        batch_size=config.batch_size,
    )


def save(
    model: PreTrainedModel,
    target: Path,
    *,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    result: RetrofitResult | None,
) -> None:
    """Write model, tokenizer, resolved recipe and summary to `target`; complete or not there at all."""
    with staged(target) as place:
        model.save_pretrained(place)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
        (place / RECIPE_FILE).write_text(recipe_to_yaml(recipe), encoding="utf-8")
        summary = {} if result is None else result.summary()
        (place / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
