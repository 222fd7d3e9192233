# SPDX-License-Identifier: Apache-2.0
"""Commands about the shipped recipes: list, show, schema."""

import json
from typing import Annotated

import typer
from rich.table import Column, Table

from modelopt_dms.cli.options import JsonOpt, check_json, show
from modelopt_dms.config.bundled import list_recipes

recipes_app = typer.Typer(help="List the shipped recipes, or show one in full.")


@recipes_app.callback()
def recipes(context: typer.Context, json_file: JsonOpt = None) -> None:
    """List the shipped recipes."""
    if context.invoked_subcommand is None:
        check_json(json_file)
        table = Table(Column("recipe", no_wrap=True), "what you get")
        for name, description in list_recipes().items():
            table.add_row(name, description)
        show(
            list_recipes(),
            json_file,
            table,
            "ModelOpt's own PTQ recipes work, too: general/ptq/fp8_default-kv_fp8 and others. "
            "`recipes show NAME` prints one in full.",
        )


@recipes_app.command("show")
def print_recipe(
    name: Annotated[str, typer.Argument(help="Name or YAML file.")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change it, e.g. dms.window=512.")
    ] = None,
) -> None:
    """Print a recipe in full, imports and defaults resolved."""
    from modelopt_dms.config.recipe_file import check_recipe, to_yaml

    found = check_recipe(name, changes or [])
    if found.quantize is None:
        text = to_yaml(found)
    else:
        from modelopt_dms.config.recipe import load_recipe, recipe_to_yaml

        text = recipe_to_yaml(load_recipe(name, changes or []))
    # Not by rich, which would wrap lines: this is a file.
    print(text, end="")


@recipes_app.command()
def schema() -> None:
    """Print the JSON schema of recipe files, for an editor."""
    from modelopt_dms.config.schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=2))
