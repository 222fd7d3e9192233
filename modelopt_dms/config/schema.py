# SPDX-License-Identifier: Apache-2.0
"""A JSON schema of recipe files, for editors: the Recipe's own, with ModelOpt's imports allowed."""

from typing import Any

from modelopt_dms.config.recipe import Recipe

IMPORT = {"$import": {"description": "Name under `imports` of the unit to insert here."}}


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe file."""
    schema = Recipe.model_json_schema(mode="validation")
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "modelopt_dms recipe"
    for part in (schema, *schema.get("$defs", {}).values()):
        _allow_imports(part)
    schema["properties"]["imports"] = {
        "type": "object",
        "additionalProperties": {"type": "string"},
        "description": "Units by name; paths beside this file, among this package's recipes, or among ModelOpt's.",
    }
    return schema


def _allow_imports(part: dict[str, Any]) -> None:
    """Let an object be made of an imported unit, which may bring what is required."""
    if "properties" in part:
        part["properties"] = {**part["properties"], **IMPORT}
        part.pop("required", None)
