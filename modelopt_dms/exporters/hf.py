# SPDX-License-Identifier: Apache-2.0
"""ModelOpt's unified Hugging Face checkpoint of a DMS model: packed weights, KV scales, gates, and what DMS is."""

import copy
import json
from pathlib import Path
from typing import Any

from modelopt.torch.export import export_hf_checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.checkpoints.unified_hf import PACKED_FILE
from modelopt_dms.checkpoints.written import check_written
from modelopt_dms.config.output_dir import atomic_dir, check_output
from modelopt_dms.config.progress import phase
from modelopt_dms.config.recipe import Recipe, recipe_to_yaml
from modelopt_dms.exporters import ExportError
from modelopt_dms.modeling.config_marks import GUARD_OF_EXPORTS, QUANT_METHOD, unmark
from modelopt_dms.quantization.apply import quantization_of, quantizes
from modelopt_dms.quantization.ranges import put_weights_on_grids

RECIPE_FILE = "dms_recipe.yaml"


def export_hf(
    model: PreTrainedModel,
    output_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    recipe: Recipe | None = None,
) -> Path:
    """Write a model as ModelOpt's unified Hugging Face checkpoint; `modelopt_dms.load` reads it back.

    Weights of a quantized one are packed; of another, this is what `save_pretrained` writes. ModelOpt packs in place,
    so this works on a copy and needs the memory of a second model.

    Args:
        model: compressed, quantized or not; it is not changed.
        output_dir: new or empty.
        tokenizer: written along with the model.
        recipe: written along with the model.

    Raises:
        ExportError: quantizers that ModelOpt cannot pack or that `modelopt_dms.quantize` did not put there, or
            offloaded weights.
        OutputError: the directory cannot be written to without losing something.
    """
    target = check_output(output_dir)
    with atomic_dir(target) as place:
        if quantizes(model):
            write_packed(model, place)
        else:
            model.save_pretrained(place)
            check_written(place, model)
        write_companions(place, tokenizer, recipe)
    return target


def write_packed(model: PreTrainedModel, place: Path) -> None:
    """Write weights, scales, gates and configs of a quantized model into a directory.

    Raises:
        ExportError: quantizers that ModelOpt cannot pack or that `modelopt_dms.quantize` did not put there, or
            offloaded weights.
    """
    if quantization_of(model) is None:
        raise ExportError(
            "the model was quantized by mtq.quantize alone: what is read back would compute something else, because "
            "ranges are rounded in a checkpoint and quantizers of gates and norms are not in it; quantize the original "
            "by modelopt_dms.quantize, which takes the same arguments"
        )
    offloaded = next((name for name, x in model.named_parameters() if x.is_meta), None)
    if offloaded is not None:
        raise ExportError(
            f"{offloaded} is offloaded; packing needs all weights in memory: load the model without a device_map"
        )
    packed: Any = copy.deepcopy(model)
    packed.config.architectures = [_plain_name(model)]
    unmark(packed.config)
    # ModelOpt computes with weight / scale in float32, but packs it rounded to the model's dtype first: in bfloat16,
    # some codes come out a step off. Weights that lie on the grid already get the right code both ways.
    put_weights_on_grids(packed)
    try:
        with phase("pack weights"):
            export_hf_checkpoint(packed, dtype=model.dtype, export_dir=place)
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ExportError(
            f"ModelOpt's unified checkpoint cannot hold this quantization ({error}); use save_pretrained"
        ) from error
    _add_dms(place / PACKED_FILE, model)
    mark_for_engines(place)
    check_written(place, model)


def mark_for_engines(place: Path) -> None:
    """Let engines read a checkpoint as what it is to them; `from_pretrained` still refuses to run it without gates."""
    path = place / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("quantization_config", {}).get("quant_method") == QUANT_METHOD:
        del content["quantization_config"]
    # Engines build models of a config, and put in the gates themselves.
    content.pop("attn_implementation", None)
    content["fusion_config"] = {GUARD_OF_EXPORTS: True}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_companions(
    place: Path, tokenizer: PreTrainedTokenizerBase | None, recipe: Recipe | None
) -> None:
    """Write what goes along with a model, where there is any."""
    if tokenizer is not None:
        tokenizer.save_pretrained(place)
    if recipe is not None:
        (place / RECIPE_FILE).write_text(recipe_to_yaml(recipe), encoding="utf-8")


def _plain_name(model: PreTrainedModel) -> str:
    """Name of the transformers class under what ModelOpt may have made of it."""
    return next(x.__name__ for x in type(model).__mro__ if x.__module__.startswith("transformers."))


def _add_dms(path: Path, model: PreTrainedModel) -> None:
    """What a serving engine must know to evict, next to what it must know to dequantize."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["dms"] = getattr(model.config, "dms_config", None)
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
