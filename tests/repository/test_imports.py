# SPDX-License-Identifier: Apache-2.0
"""Packages import only packages of lower layers, and importing the package is free."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

PACKAGE = ROOT / "modelopt_dms"

# From the ground up. A package may import those of lower layers, and itself: no circles, also not by name.
LAYERS = [
    {"kernels", "config"},
    {"runtime", "kvcache", "gates", "data"},
    {"modeling"},
    {"quantization", "evaluation"},
    {"checkpoints", "training"},
    {"exporters", "calibration", "serving"},
    {"pipeline"},
    {"cli", "__init__"},
]
LAYER = {name: step for step, names in enumerate(LAYERS) for name in names}


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_packages(path: Path) -> set[str]:
    """Packages that a module imports, at its top, in functions, or by a string."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            if node.module == "modelopt_dms":
                names = [f"modelopt_dms.{x.name}" for x in node.names]
            modules |= set(names)
        elif isinstance(node, ast.Import):
            modules |= {x.name for x in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            modules |= set(re.findall(r"^modelopt_dms\.[\w.]+$", node.value))
    return {x.split(".")[1] for x in modules if x.startswith("modelopt_dms.")} & LAYER.keys()


def test_the_package_has_seventeen_entries_each_in_a_layer() -> None:
    entries = {x.name for x in PACKAGE.iterdir() if not x.name.startswith("__pycache__")}
    assert {x.removesuffix(".py") for x in entries} == LAYER.keys()
    assert len(entries) <= 17


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda x: str(x.name))
def test_packages_import_only_lower_layers(path: Path) -> None:
    package = package_of(path)
    upward = {x for x in imported_packages(path) - {package} if LAYER[x] >= LAYER[package]}
    assert not upward, f"{package} imports {sorted(upward)}"


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
