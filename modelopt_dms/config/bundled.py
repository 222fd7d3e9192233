# SPDX-License-Identifier: Apache-2.0
"""Where the files that ship with the package lie: recipes and the embedded model. Imports nothing heavy."""

import difflib
from importlib.util import find_spec
from pathlib import Path

import yaml

_PACKAGE = Path(__file__).parents[1]


# What suits a model that nobody has said a recipe for, and one that reads short contexts only.
DEFAULT_RECIPE, DEFAULT_SHORT_RECIPE = "calibrated_cr4", "calibrated_cr4-1k"


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the key, its value and what is accepted."""


def _shipped(in_wheel: str, in_clone: str) -> Path:
    installed = _PACKAGE / in_wheel
    return installed if installed.is_dir() else _PACKAGE.parent / in_clone


def recipes_dir() -> Path:
    """The directory of the shipped recipes."""
    return _shipped("recipes", "recipes")


def embedded_model_dir() -> Path:
    """The directory of the small model that the package carries."""
    return _shipped("embedded_model", "examples/embedded_model")


def list_recipes() -> dict[str, str]:
    """Shipped recipes by name, with their one-line description."""
    found = sorted(recipes_dir().glob("*.yaml"))
    return {x.stem: yaml.safe_load(x.read_text("utf-8"))["metadata"]["description"] for x in found}


def modelopt_recipes_dir() -> Path:
    """The directory of ModelOpt's own recipes; finding it imports nothing."""
    found = find_spec("modelopt_recipes")
    assert found is not None and found.submodule_search_locations is not None
    return Path(found.submodule_search_locations[0])


def recipe_path(name: str | Path) -> Path:
    """The file of a recipe given by name or by path; "general/ptq/..." are ModelOpt's own.

    Raises:
        RecipeError: neither a shipped name nor a file; suggests the nearest name.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"recipe file {path} does not exist")
        return path
    for shipped in (recipes_dir() / f"{name}.yaml", modelopt_recipes_dir() / f"{name}.yaml"):
        if shipped.is_file() and path.parts[0] not in ("units", "configs"):
            return shipped
    names = list(list_recipes())
    raise RecipeError(
        f"unknown recipe {str(name)!r}{suggestion(str(name), names)}; shipped: {', '.join(names)}"
    )


def suggestion(given: str, accepted: list[str]) -> str:
    """A clause that names the accepted word nearest to a given one, or nothing."""
    near = difflib.get_close_matches(given, accepted, n=1, cutoff=0.6)
    return f", did you mean {near[0]!r}?" if near else ""
