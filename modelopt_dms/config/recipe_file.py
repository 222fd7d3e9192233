# SPDX-License-Identifier: Apache-2.0
"""A recipe's name or file, and changes -> values, checked as far as that needs no ModelOpt (slow to import)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from modelopt_dms.config.bundled import (
    RecipeError,
    modelopt_recipes_dir,
    recipe_path,
    recipes_dir,
    suggestion,
)
from modelopt_dms.config.plain_yaml import read_yaml, read_yaml_file
from modelopt_dms.config.section import in_one_line
from modelopt_dms.config.sections import Sections

# Units may import units; nobody means more.
_DEEPEST = 10


def check_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Sections:
    """Everything that can be checked of a recipe without a model, but ModelOpt's own keys in `quantize`; in no time.

    Args:
        source: name of a shipped recipe, or path of a YAML file.
        overrides: ["dms.window=512"]; values are YAML.

    Raises:
        RecipeError: unknown name or key (suggests the nearest), a value out of range, broken YAML.
        ValueError: a compression ratio that cannot be reached at the length of the samples.
    """
    path = recipe_path(source)
    raw = read_raw(path)
    imports = raw.pop("imports", None) or {}
    data = _filled(raw, imports, path, 0)
    apply_changes(data, overrides)
    check_keys(data, Sections, "", str(path))
    try:
        found = Sections(**data)
    except ValidationError as error:
        raise invalid(str(path), error) from None
    found.check_ratios()
    return found


def to_yaml(sections: Sections) -> str:
    """A recipe without a section `quantize` in full, defaults written out; `check_recipe` reads it back."""
    return yaml.safe_dump(sections.model_dump(exclude_none=True), sort_keys=False)


def _filled(value: Any, imports: Mapping[str, Any], recipe: Path, depth: int) -> Any:
    """A value with what it imports, over which a mapping's own keys go: what ModelOpt's loader makes of it."""
    if isinstance(value, list):
        return [x for entry in value for x in _entries(entry, imports, recipe, depth)]
    if not isinstance(value, dict):
        return value
    names = value.get("$import", [])
    found: dict[str, Any] = {}
    for name in names if isinstance(names, list) else [names]:
        unit = _imported(name, imports, recipe, depth)
        if not isinstance(unit, dict):
            raise RecipeError(f"{recipe}: $import={name!r} must name a unit that is a mapping here")
        found |= unit
    own = {k: _filled(v, imports, recipe, depth) for k, v in value.items() if k != "$import"}
    return found | own


def _entries(entry: Any, imports: Mapping[str, Any], recipe: Path, depth: int) -> list[Any]:
    """An entry of a list, or what a bare import of one unit puts in its place."""
    if isinstance(entry, dict) and list(entry) == ["$import"]:
        names = entry["$import"]
        if isinstance(names, str):
            unit = _imported(names, imports, recipe, depth)
            return unit if isinstance(unit, list) else [unit]
    return [_filled(entry, imports, recipe, depth)]


def _imported(name: str, imports: Mapping[str, Any], recipe: Path, depth: int) -> Any:
    if name not in imports:
        raise RecipeError(
            f"{recipe}: $import={name!r} does not stand under imports, which has: {', '.join(imports) or 'nothing'}"
        )
    return _unit(imports[name], recipe, depth + 1)


def _unit(name: str, recipe: Path, depth: int) -> Any:
    path = Path(name)
    if not path.is_file():
        path = modelopt_recipes_dir() / (
            name if name.endswith((".yaml", ".yml")) else f"{name}.yaml"
        )
    if not path.is_file() or depth > _DEEPEST:
        reason = "imports itself" if path.is_file() else "cannot be found"
        raise RecipeError(f"{recipe}: unit {name} {reason}")
    documents = read_unit(path, recipe)
    merged = {k: v for x in documents if isinstance(x, dict) for k, v in x.items()}
    imports = merged.pop("imports", None) or {}
    if not isinstance(imports, dict) or not all(isinstance(x, str) for x in imports.values()):
        raise RecipeError(f"{recipe}: imports of unit {path} must be a mapping from names to units")
    # A list has no place for imports: they stand in a document before it.
    body = documents[-1] if documents and isinstance(documents[-1], list) else merged
    return _filled(body, imports, recipe, depth)


def read_raw(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file as it stands, keys checked and units located.

    Raises:
        RecipeError: no plain YAML, no mapping, unknown keys, or imports that are none.
    """
    try:
        documents = read_yaml_file(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {_line(error)}") from error
    if len(documents) != 1 or not isinstance(documents[0], dict):
        kinds = " and ".join(type(x).__name__ for x in documents[:3])
        raise RecipeError(f"recipe {path} must be a YAML mapping, got {kinds or 'nothing'}")
    raw = documents[0]
    check_keys(raw, Sections, "", str(path), also=("imports", "$import"))
    _check_imports(raw, "", path)
    imports = raw.get("imports") or {}
    if not isinstance(imports, dict):
        raise RecipeError(f"{path}: imports={imports!r:.80} must be a mapping from names to units")
    if imports:
        raw["imports"] = {key: _locate(value, path.parent) for key, value in imports.items()}
        _check_units(raw["imports"], path)
    return raw


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
        if not isinstance(unit, str) or not isinstance(name, str):
            raise RecipeError(
                f"{recipe}: imports.{name}={unit!r} must be a name, and the path of a unit"
            )
        if Path(unit).is_file():
            read_unit(Path(unit), recipe)


def read_unit(path: Path, recipe: Path) -> list[Any]:
    """The documents of a unit.

    Raises:
        RecipeError: no plain YAML.
    """
    try:
        return read_yaml_file(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"unit {path} of {recipe} cannot be read: {_line(error)}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).replace('in "<unicode string>", ', "in ").split())


def _locate(name: Any, beside: Path) -> Any:
    """A unit beside the recipe, else among ours; else ModelOpt's loader finds it among its own."""
    for root in (beside, recipes_dir()):
        candidate = root / (name if str(name).endswith((".yaml", ".yml")) else f"{name}.yaml")
        if candidate.is_file():
            return str(candidate.resolve())
    return name


def apply_changes(data: dict[str, Any], overrides: Mapping[str, Any] | Sequence[str]) -> None:
    """Change values in place: {"dms.window": 512} or ["dms.window=512"], whose values are YAML.

    Raises:
        RecipeError: a change that says nothing.
    """
    for key, value in _pairs(overrides):
        *names, last = key.split(".")
        section = data
        for name in names:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[last] = value


def _pairs(overrides: Mapping[str, Any] | Sequence[str]) -> Iterator[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise RecipeError(f"override {text!r} must read KEY=VALUE, for example dms.window=512")
        try:
            yield key, read_yaml(value)
        except yaml.YAMLError:
            raise RecipeError(f"override {text!r}: {value!r} is not a YAML value") from None


def check_keys(
    data: Any, schema: type[BaseModel], prefix: str, where: str, also: Sequence[str] = ()
) -> None:
    """Refuse keys that the schema does not have, before pydantic does so less helpfully.

    Raises:
        RecipeError: names the key, the nearest one and all that there are.
    """
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
                check_keys(item, nested, at, where, also)


def _schemas(annotation: Any) -> list[type[BaseModel]]:
    """The config classes in an annotation such as `RetrofitConfig | None` or `list[QuantizerCfgEntry]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [x for option in get_args(annotation) for x in _schemas(option)]


def invalid(where: str, error: ValidationError) -> RecipeError:
    """All that pydantic says, in one line."""
    return RecipeError(f"{where}: {in_one_line(error)}")
