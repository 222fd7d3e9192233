# SPDX-License-Identifier: Apache-2.0
"""YAML (or a name) -> a validated Recipe, with ModelOpt's imports and the user's overrides."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from modelopt.torch.opt.config import ModeloptBaseConfig, ModeloptField
from modelopt.torch.opt.config_loader import load_config
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from modelopt_dms.config.bundled import RecipeError, recipe_path, recipes_dir, suggestion
from modelopt_dms.config.calibrate import CalibrateConfig
from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.config.export import ExportConfig
from modelopt_dms.config.plain_yaml import read_yaml, read_yaml_file
from modelopt_dms.config.quantize import QuantizationConfig, quantization_to_dict
from modelopt_dms.config.retrofit import RetrofitConfig
from modelopt_dms.config.section import in_one_line


class Metadata(ModeloptBaseConfig):
    """What a reader of a list of recipes sees."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    description: str = ModeloptField(default="", title="Description")
    """One line: what you get."""
    recipe_type: Literal["ptq"] | None = ModeloptField(default=None, title="ModelOpt's recipe type")
    """Stands in ModelOpt's own recipes."""


class Recipe(ModeloptBaseConfig):
    """Everything `compress` does to a model. One of ModelOpt's own PTQ recipes is a Recipe too, without `dms`."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    metadata: Metadata = ModeloptField(default=Metadata(), title="Metadata")
    """For readers."""
    dms: DMSConfig | None = ModeloptField(default=None, title="DMS")
    """What a DMS model is; stored with the model. Without it the recipe only quantizes."""
    calibrate: CalibrateConfig | None = ModeloptField(default=None, title="Calibration")
    """How the gates are fitted to what future queries attend to, in one pass and without training."""
    retrofit: RetrofitConfig | None = ModeloptField(default=None, title="Retrofit")
    """How the gates learn, from scratch or from what calibration made of them."""
    quantize: QuantizationConfig | None = ModeloptField(default=None, title="Quantization")
    """Weights, activations and KV cache, in ModelOpt's words."""
    export: ExportConfig | None = ModeloptField(default=None, title="Export")
    """What else is written to the output directory."""

    @model_validator(mode="before")
    @classmethod
    def _dms_unless_it_only_quantizes(cls, data: Any) -> Any:
        gated = ("calibrate", "retrofit")
        if isinstance(data, Mapping) and ("quantize" not in data or any(x in data for x in gated)):
            return {"dms": {}, **data}
        return data

    @model_validator(mode="after")
    def _something_learns(self) -> "Recipe":
        learns = self.calibrate is not None or self.retrofit is not None
        if learns and self.dms is not None and not self.dms.evict:
            raise ValueError(
                "dms.evict=False evicts nothing, so there is nothing to calibrate or retrofit; use dms.evict=True, or "
                "leave the sections calibrate and retrofit out"
            )
        if self.calibrate is not None and self.dms is not None and self.dms.gate == "neuron":
            raise ValueError(
                "dms.gate='neuron' has no weights of its own to calibrate; use dms.gate='adapter', or only retrofit"
            )
        if self.retrofit is None or self.dms is None:
            return self
        if self.retrofit.train != "all" and self.dms.gate == "neuron":
            raise ValueError(
                "dms.gate='neuron' has no parameters of its own to train; use retrofit.train='all'"
            )
        early = self.quantize is not None and self.quantize.order == "before_retrofit"
        if self.retrofit.train == "lora" and early:
            raise ValueError(
                "retrofit.train='lora' cannot merge into quantized weights; use quantize.order='after_retrofit'"
            )
        if self.retrofit.cr_range is not None:
            if self.calibrate is None:
                raise ValueError(
                    "retrofit.cr_range needs the thresholds of calibrated gates; add a section calibrate"
                )
            highest = max([*self.calibrate.curve, self.dms.target_cr])
            if self.retrofit.cr_range[1] > highest:
                raise ValueError(
                    f"retrofit.cr_range={self.retrofit.cr_range} goes beyond what calibrate.curve measures, {highest:g}"
                )
        return self


class _Sections(ModeloptBaseConfig):
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
    for key, value in _pairs(overrides):
        _set(data, key, value)
    _check_keys(data, Recipe, "", where)
    try:
        return Recipe(**data)
    except ValidationError as error:
        raise _invalid(where, error) from None


def recipe_to_yaml(recipe: Recipe) -> str:
    """The recipe in full, every default but those of single quantizers written out; `load_recipe` reads it back."""
    return yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """As `recipe_to_yaml`, as plain values; sections that the recipe does not have are left out."""
    data = recipe.model_dump(exclude_none=True)
    if recipe.quantize is not None:
        data["quantize"] = quantization_to_dict(recipe.quantize)
    return data


def _read(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file, its imports resolved by ModelOpt's loader."""
    try:
        documents = read_yaml_file(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {_line(error)}") from error
    if len(documents) != 1 or not isinstance(documents[0], dict):
        kinds = " and ".join(type(x).__name__ for x in documents[:3])
        raise RecipeError(f"recipe {path} must be a YAML mapping, got {kinds or 'nothing'}")
    raw = documents[0]
    _check_keys(raw, Recipe, "", str(path), also=("imports", "$import"))
    _check_imports(raw, "", path)
    imports = raw.get("imports")
    if isinstance(imports, dict):
        raw["imports"] = {key: _locate(value, path.parent) for key, value in imports.items()}
        _check_units(raw["imports"], path)
    with tempfile.TemporaryDirectory() as place:
        located = Path(place) / path.name
        located.write_text(yaml.safe_dump(raw), encoding="utf-8")
        try:
            resolved = load_config(located, schema_type=_Sections)
        except (ValueError, yaml.YAMLError) as error:
            if isinstance(error.__cause__, ValidationError):
                raise _invalid(str(path), error.__cause__) from None
            raise RecipeError(str(error).replace(str(located), str(path))) from None
    return resolved.model_dump(exclude_unset=True)


def _check_imports(data: Any, at: str, recipe: Path) -> None:
    """Refuse what ModelOpt's loader takes for the name of a unit, and is none."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data):
        names = value if isinstance(value, list) else [value]
        if key == "$import" and not (names and all(isinstance(x, str) for x in names)):
            raise RecipeError(
                f"{recipe}: {at}$import={value!r} must be a name that stands under imports, or a list of names"
            )
        if isinstance(value, (dict, list)):
            _check_imports(value, f"{at}{key}.", recipe)


def _check_units(imports: dict[str, Any], recipe: Path) -> None:
    """Refuse units that are no plain YAML before ModelOpt's loader, which takes anything, reads them."""
    for name, unit in imports.items():
        if not isinstance(unit, str):
            raise RecipeError(f"{recipe}: imports.{name}={unit!r} must be the path of a unit")
        if Path(unit).is_file():
            try:
                read_yaml_file(Path(unit))
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                raise RecipeError(
                    f"unit {unit} of {recipe} cannot be read: {_line(error)}"
                ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).replace('in "<unicode string>", ', "in ").split())


def _locate(name: Any, beside: Path) -> Any:
    """A unit beside the recipe, else among ours; else ModelOpt's loader finds it among its own."""
    for root in (beside, recipes_dir()):
        candidate = root / (name if str(name).endswith((".yaml", ".yml")) else f"{name}.yaml")
        if candidate.is_file():
            return str(candidate.resolve())
    return name


def _pairs(overrides: Mapping[str, Any] | Sequence[str]) -> list[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        return list(overrides.items())
    pairs = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise RecipeError(f"override {text!r} must read KEY=VALUE, for example dms.window=512")
        try:
            pairs.append((key, read_yaml(value)))
        except yaml.YAMLError:
            raise RecipeError(f"override {text!r}: {value!r} is not a YAML value") from None
    return pairs


def _set(data: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(data.get(section), dict):
            data[section] = {}
        data = data[section]
    data[last] = value


def _check_keys(
    data: Any, schema: type[BaseModel], prefix: str, where: str, also: Sequence[str] = ()
) -> None:
    """Refuse keys that the schema does not have, before pydantic does so less helpfully."""
    if not isinstance(data, Mapping):
        return
    accepted = list(schema.model_fields)
    for key, value in data.items():
        if key in also:
            continue
        if key not in accepted:
            place = f"section {prefix[:-1]!r}" if prefix else "the recipe"
            raise RecipeError(
                f"{where}: unknown key {prefix + str(key)!r}{suggestion(str(key), accepted) or ';'} "
                f"{place} has: {', '.join(accepted)}"
            )
        items = list(enumerate(value)) if isinstance(value, list) else [(None, value)]
        for nested in _schemas(schema.model_fields[key].annotation):
            for index, item in items:
                at = f"{prefix}{key}." if index is None else f"{prefix}{key}[{index}]."
                _check_keys(item, nested, at, where, also)


def _schemas(annotation: Any) -> list[type[BaseModel]]:
    """The config classes in an annotation such as `RetrofitConfig | None` or `list[QuantizerCfgEntry]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [x for option in get_args(annotation) for x in _schemas(option)]


def _invalid(where: str, error: ValidationError) -> RecipeError:
    return RecipeError(f"{where}: {in_one_line(error)}")
