# SPDX-License-Identifier: Apache-2.0
"""The front door's flow: recipe -> gates -> retrofit -> a model that forgets, saved if asked for."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.convert import plan_conversion
from modelopt_dms.mode import apply_dms
from modelopt_dms.recipe import Recipe, load_recipe, recipe_to_yaml
from modelopt_dms.train import RetrofitResult, prepare, retrofit

RECIPE_FILE = "dms_recipe.yaml"
SUMMARY_FILE = "dms_summary.json"
WORK_DIR = "retrofit"
STAGING_DIR = ".staging"


class OutputError(ValueError):
    """An output directory that cannot be written to without losing something."""


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
    target = None if output_dir is None else check_output(output_dir)
    plan_conversion(model, recipe.dms)
    prepared = None
    if recipe.retrofit is not None:
        prepared = prepare(
            model,
            recipe.retrofit,
            recipe.dms,
            data=data,
            tokenizer=tokenizer,
            resume_from=None if target is None or not resume else target / WORK_DIR,
        )
    apply_dms(model, recipe.dms)
    result = None
    if recipe.retrofit is not None:
        result = retrofit(
            model,
            recipe.retrofit,
            data=prepared,
            output_dir=None if target is None else target / WORK_DIR,
            resume=resume,
            progress=progress,
        )
    model.eval()
    if target is not None:
        save(model, target, recipe=recipe, tokenizer=tokenizer, result=result)
    return model


def check_output(output_dir: str | Path) -> Path:
    """The output directory, if a run can start or go on there without losing anything.

    Raises:
        OutputError: it is a file, holds something else or a finished model, or cannot be written.
    """
    target = Path(output_dir)
    if target.exists() and not target.is_dir():
        raise OutputError(f"output_dir={target} is a file; expected a directory")
    nearest = next(x for x in (target, *target.absolute().parents) if x.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"output_dir={target} cannot be written: {nearest} is read-only")
    present = {x.name for x in target.iterdir()} if target.exists() else set()
    if "config.json" in present:
        raise OutputError(
            f"output_dir={target} already holds a model; choose another directory or remove it"
        )
    foreign = sorted(present - {WORK_DIR})
    # A run that was stopped while it moved its files here has left the rest of them in staging.
    if foreign and STAGING_DIR not in present:
        raise OutputError(
            f"output_dir={target} holds files that are not ours ({', '.join(foreign[:3])}); choose an empty directory"
        )
    return target


def save(
    model: PreTrainedModel,
    target: Path,
    *,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    result: RetrofitResult | None,
) -> None:
    """Write model, tokenizer, resolved recipe and summary to `target`; complete or not there at all."""
    staging = target / STAGING_DIR
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    model.save_pretrained(staging)
    if tokenizer is not None:
        tokenizer.save_pretrained(staging)
    (staging / RECIPE_FILE).write_text(recipe_to_yaml(recipe))
    summary = {} if result is None else result.summary()
    (staging / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
    # config.json goes last: without it the directory is not a model, and the next run starts over.
    for path in sorted(staging.iterdir(), key=lambda x: x.name == "config.json"):
        os.replace(path, target / path.name)
    staging.rmdir()
