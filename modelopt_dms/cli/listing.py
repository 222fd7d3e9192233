# SPDX-License-Identifier: Apache-2.0
"""Commands about the shipped recipes: list, show, schema."""

import json
from typing import Annotated

import typer
from rich.table import Table

from modelopt_dms.cli.options import out
from modelopt_dms.config.bundled import list_recipes

recipes_app = typer.Typer(help="List the shipped recipes, or show one in full.")


@recipes_app.callback()
def recipes(context: typer.Context) -> None:
    """List the shipped recipes."""
    if context.invoked_subcommand is None:
        table = Table("recipe", "what you get")
        for name, description in list_recipes().items():
            table.add_row(name, description)
        out.print(table)
        out.print(
            "ModelOpt's own PTQ recipes work, too: general/ptq/fp8_default-kv_fp8 and others. "
            "`recipes show NAME` prints one in full.",
            highlight=False,
        )


@recipes_app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name or YAML file.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change it, e.g. dms.window=512.")
    ] = None,
) -> None:
    """Print a recipe in full, imports and defaults resolved."""
    from modelopt_dms.config.recipe import load_recipe, recipe_to_yaml

    out.print(
        recipe_to_yaml(load_recipe(name, changes or [])), end="", highlight=False, markup=False
    )


@recipes_app.command()
def schema() -> None:
    """Print the JSON schema of recipe files, for an editor."""
    from modelopt_dms.config.schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))
