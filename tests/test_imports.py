# SPDX-License-Identifier: Apache-2.0
"""Imports go down the staircase of the README's map, and importing the package is free."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "modelopt_dms"

# Rooms by step, from the ground up. A room may import rooms of lower steps, and itself.
STAIRCASE = [
    {"kv_quant", "config", "shelf", "output", "data", "ratio", "processes", "usage", "handover"}
    | {"registering", "modelopt_mode", "hf_quantizer", "lost_gates", "plain_yaml", "finite"},
    {"ops", "checkpoints", "names"},
    {"gate", "masks", "written", "pages", "paging", "kv_format", "recipe", "engine"},
    {"cache", "gate_kinds", "schema", "compression", "previews"},
    {"page_attention"},
    {"attention"},
    {"staging"},
    {"probe"},
    {"convert", "ranges"},
    {"mode", "paged_cache", "model_card"},
    {"quantization", "generation"},
    {"train", "packed", "nvidia"},
    {"loading", "exporters", "calibration", "traces"},
    {"flow", "evaluation"},
    {"report"},
    {"cli", "__init__"},
]
STEP = {room: step for step, rooms in enumerate(STAIRCASE) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("modelopt_dms"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {x.name for x in node.names}
        elif isinstance(node, ast.Import):
            found |= {
                x.name.split(".")[1] for x in node.names if x.name.startswith("modelopt_dms.")
            }
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda x: str(x.name))
def test_imports_only_go_down_the_staircase(path: Path) -> None:
    room = room_of(path)
    upward = {x for x in imported_rooms(path) - {room} if STEP[x] >= STEP[room]}
    assert not upward, f"{room} imports {sorted(upward)}"


def test_importing_the_package_and_its_command_line_loads_nothing_heavy() -> None:
    code = (
        "import sys, modelopt_dms, modelopt_dms.cli;"
        "print([x for x in ('torch', 'transformers', 'modelopt', 'datasets') if x in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_public_name_can_be_imported() -> None:
    import modelopt_dms

    for name in modelopt_dms.__all__:
        assert callable(getattr(modelopt_dms, name)), name
