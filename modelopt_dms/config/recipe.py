# SPDX-License-Identifier: Apache-2.0
"""YAML (or a name) -> a validated Recipe, with ModelOpt's imports and the user's overrides."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from modelopt.torch.opt.config import ModeloptBaseConfig, ModeloptField
from modelopt.torch.opt.config_loader import load_config
from pydantic import Field, ValidationError

from modelopt_dms.config.bundled import RecipeError, recipe_path
from modelopt_dms.config.quantize import QuantizationConfig, quantization_to_dict
from modelopt_dms.config.recipe_file import apply_changes, check_keys, invalid, read_raw
from modelopt_dms.config.sections import Sections


class Recipe(Sections):
    """Everything `compress` does to a model. One of ModelOpt's own PTQ recipes is a Recipe too, without `dms`."""

    quantize: QuantizationConfig | None = Field(default=None, title="Quantization")
    """Weights, activations and KV cache, in ModelOpt's words."""


class _Imported(ModeloptBaseConfig):
    """Tells ModelOpt's loader of imports what is a list; values are checked afterwards, with the overrides."""

    metadata: Any = ModeloptField(default=None)
    dms: Any = ModeloptField(default=None)
    calibrate: Any = ModeloptField(default=None)
    retrofit: Any = ModeloptField(default=None)
    quantize: QuantizationConfig | None = ModeloptField(default=None)
    export: Any = ModeloptField(default=None)


def load_recipe(
    source: str | Path | Recipe, overrides: Mapping[str, Any] | Sequence[str] = ()
) -> Recipe:
    """Load a recipe by name, by path, or as an object, and change it.

    Args:
        source: name of a shipped recipe, path of a YAML file, or a Recipe (which is not modified).
        overrides: {"dms.window": 512} or ["dms.window=512"]; values of the second form are YAML.

    Raises:
        RecipeError: unknown name or key (suggests the nearest), a value out of range, broken YAML.
    """
    if isinstance(source, Recipe):
        data, where = recipe_to_dict(source), "the recipe"
    else:
        path = recipe_path(source)
        data, where = _read(path), str(path)
    apply_changes(data, overrides)
    check_keys(data, Recipe, "", where)
    try:
        return Recipe(**data)
    except ValidationError as error:
        raise invalid(where, error) from None


def recipe_to_yaml(recipe: Recipe) -> str:
    """The recipe in full, every default but those of single quantizers written out; `load_recipe` reads it back."""
    return yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """As `recipe_to_yaml`, as plain values; sections that the recipe does not have are left out."""
    data = recipe.model_dump(exclude_none=True, warnings=False)
    if recipe.quantize is not None:
        data["quantize"] = quantization_to_dict(recipe.quantize)
    return data


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file, its imports resolved by ModelOpt's loader."""
    raw = read_raw(path)
    check_keys(raw, Recipe, "", str(path), also=("imports", "$import"))
    with tempfile.TemporaryDirectory() as place:
        located = Path(place) / path.name
        located.write_text(yaml.safe_dump(raw), encoding="utf-8")
        try:
            resolved = load_config(located, schema_type=_Imported)
        except (ValueError, yaml.YAMLError) as error:
            if isinstance(error.__cause__, ValidationError):
                raise invalid(str(path), error.__cause__) from None
            raise RecipeError(str(error).replace(str(located), str(path))) from None
    return resolved.model_dump(exclude_unset=True)
