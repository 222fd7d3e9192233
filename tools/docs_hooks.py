# SPDX-License-Identifier: Apache-2.0
"""MkDocs hooks: what the code says by itself (recipe keys, recipes, commands, public names) is written into the pages.

A page asks for a part by a line `<!-- generated: NAME -->`, with a name of `PARTS`.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

ROOT = Path(__file__).parent.parent
PICTURES = "benchmarks/results"
MARKER = re.compile(r"^<!-- generated: ([a-z ]+) -->$", re.MULTILINE)


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures of measurements, which lie beside their figures and not in docs/."""
    from mkdocs.structure.files import File

    for picture in sorted((ROOT / PICTURES).glob("*.png")):
        name = f"{PICTURES}/{picture.name}"
        files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Write the generated parts, and point to pictures where the site has them."""
    return filled(markdown).replace(f"](../{PICTURES}/", f"]({PICTURES}/")


def filled(markdown: str) -> str:
    """A page with its generated parts."""
    return MARKER.sub(lambda found: PARTS[found[1]](), markdown)


def recipe_keys() -> str:
    """A table of the keys of every section of a recipe, from the schema that recipes are checked with."""
    from modelopt_dms.config.recipe import Recipe

    schema = Recipe.model_json_schema(mode="validation")
    parts = []
    for section, field in Recipe.model_fields.items():
        model = next(
            x for x in (field.annotation, *get_args(field.annotation)) if inspect.isclass(x)
        )
        parts += [
            f"### {section}",
            field.description or "",
            "| key | values | default | |\n|---|---|---|---|",
        ]
        properties = schema["$defs"][model.__name__]["properties"]
        parts[-1] += "".join(
            f"\n| `{key}` | {_values(x)} | {_default(x)} | {_cell(x.get('description', ''))} |"
            for key, x in properties.items()
        )
    return "\n\n".join(parts)


def _values(schema: dict[str, Any]) -> str:
    """What a key takes, in words."""
    if "enum" in schema:
        return ", ".join(f"`{x}`" for x in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "anyOf" in schema:
        options = [_values(x) for x in schema["anyOf"] if x.get("type") != "null"]
        return " or ".join(dict.fromkeys(options))
    names = {"array": "list", "object": "mapping", None: "mapping"}
    bounds = [
        f"{sign} {schema[key]}"
        for key, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
            ("exclusiveMaximum", "<"),
        )
        if key in schema
    ]
    kind = schema.get("type")
    if isinstance(kind, list):
        return " or ".join(names.get(x, str(x)) for x in kind)
    return " ".join([names.get(kind, str(kind)), ", ".join(bounds)]).strip()


def _default(schema: dict[str, Any]) -> str:
    if schema.get("default") in (None, ""):
        return ""
    text = str(schema["default"])
    # ModelOpt's own defaults fill a page.
    return f"`{text}`" if len(text) <= 60 else "see ModelOpt"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def shipped_recipes() -> str:
    """A table of the shipped recipes and what each says about itself."""
    from modelopt_dms.config.bundled import list_recipes

    lines = ["| recipe | what you get |", "|---|---|"]
    return "\n".join(lines + [f"| `{name}` | {_cell(x)} |" for name, x in list_recipes().items()])


def commands() -> str:
    """Every command with its arguments and options, from the command line itself."""
    import typer.main

    from modelopt_dms.cli import app

    return "\n\n".join(_commands(typer.main.get_command(app), "modelopt-dms"))


def _commands(command: Any, name: str) -> Iterator[str]:
    if name.count(" "):
        yield f"## {name}"
        yield _cell((command.help or "").split("\n\n")[0])
    shown = [x for x in command.params if not getattr(x, "hidden", False)]
    if shown:
        yield "\n".join(["| | default | |", "|---|---|---|", *map(_option, shown)])
    for sub, found in getattr(command, "commands", {}).items():
        yield from _commands(found, f"{name} {sub}")


def _option(param: Any) -> str:
    written = param.opts + param.secondary_opts
    name = ", ".join(f"`{x if x.startswith('-') else x.upper()}`" for x in written)
    default = "required" if param.required else getattr(param.default, "value", param.default)
    plain = default is None or default is False or default == ""
    return f"| {name} | {'' if plain else default} | {_cell(param.help or '')} |"


def public_names() -> str:
    """What `import modelopt_dms` offers, each name where it is defined, for mkdocstrings."""
    from pydantic import BaseModel

    import modelopt_dms

    found = [getattr(modelopt_dms, name) for name in modelopt_dms.__all__]
    groups = {
        "Functions": [x for x in found if not inspect.isclass(x)],
        "Classes": [x for x in found if inspect.isclass(x)],
    }
    parts = []
    for title, members in groups.items():
        parts.append(f"## {title}")
        for x in members:
            parts.append(f"::: {x.__module__}.{x.__qualname__}")
            if inspect.isclass(x) and issubclass(x, BaseModel):
                # Fields of recipes have a table.
                parts[-1] += "\n    options: {members: false, show_signature: false}"
                parts.append("Fields: [every key of a recipe](recipes.md#every-key).")
    return "\n\n".join(parts)


PARTS = {
    "recipe keys": recipe_keys,
    "recipes": shipped_recipes,
    "commands": commands,
    "public names": public_names,
}
