# SPDX-License-Identifier: Apache-2.0
"""Our plugins through NVIDIA's own `tensorrt.plugin` code: what TensorRT learns is what the table of ops says.

MODELOPT_DMS_TENSORRT_PYTHON names an interpreter with NVIDIA's bindings; `make test-tensorrt` sets it.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_cases as cases
import pytest
from paths import HELPERS, ROOT

from modelopt_dms.exporters import ExportError
from modelopt_dms.exporters.tensorrt import plugins
from modelopt_dms.runtime.manifest import Manifest
from modelopt_dms.runtime.operators import OPERATORS, Argument

PYTHON = os.environ.get("MODELOPT_DMS_TENSORRT_PYTHON")
SCRIPT = HELPERS / "tensorrt_plugins.py"
NAME, BATCH = "fp8", 3
TENSORRT = {
    "float16": "HALF",
    "bfloat16": "BF16",
    "float32": "FLOAT",
    "int32": "INT32",
    "int8": "INT8",
    "bool": "BOOL",
}

needs_tensorrt = pytest.mark.skipif(PYTHON is None, reason="needs TensorRT: make test-tensorrt")


def types(arguments: tuple[Argument, ...]) -> list[str]:
    return [TENSORRT[cases.kind(x, cases.MODELS[NAME])] for x in arguments]


def shapes(arguments: tuple[Argument, ...]) -> list[list[int]]:
    known = cases.sizes(cases.MODELS[NAME], BATCH)
    return [list(cases.shape(x, known)) for x in arguments]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cases.compile_elsewhere(tmp_path_factory.mktemp("engines"), NAME)[NAME]


@pytest.fixture(scope="module")
def learned(exported: Path) -> dict[str, Any]:
    values = cases.attributes(cases.MODELS[NAME])
    nodes = {
        name: {
            "shapes": shapes(operator.inputs),
            "kinds": types(operator.inputs),
            "attributes": {key: values[key] for key in operator.attributes},
        }
        for name, operator in OPERATORS.items()
    }
    (exported / "cases.json").write_text(json.dumps(nodes))
    command = [str(PYTHON), str(SCRIPT), str(exported)]
    clean = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, capture_output=True, text=True, env=clean, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    return json.loads(found.stdout[found.stdout.index("{") :])


@pytest.mark.tensorrt
@needs_tensorrt
def test_all_ops_are_registered_without_torch(learned: dict[str, Any]) -> None:
    assert learned["registered"] == sorted(OPERATORS)
    assert learned["imported"] == []


@pytest.mark.tensorrt
@needs_tensorrt
@pytest.mark.parametrize("name", OPERATORS)
def test_tensorrt_learns_what_the_table_of_ops_says(
    name: str, learned: dict[str, Any], exported: Path
) -> None:
    operator, found = OPERATORS[name], learned[name]
    assert found["aot"]
    assert found["types"] == types(operator.outputs)
    assert found["shapes"] == shapes(operator.outputs)
    inputs = [x.name for x in operator.inputs]
    places = [-1 if x.aliases is None else inputs.index(x.aliases) for x in operator.outputs]
    assert found["aliases"] == places
    every = types(operator.inputs) + types(operator.outputs)
    assert found["formats"] == [[x, "LINEAR"] for x in every]
    assert found["tactics"] == []
    kernel = next(x for x in Manifest.load(exported).kernels if x.operator == name)
    assert found["entry"] == kernel.entry == name
    assert found["ptx"] == (exported / kernel.file).read_text()
    assert found["launch"]["block_x"] == kernel.threads
    assert found["launch"]["shared_mem"] == kernel.shared


@pytest.mark.tensorrt
@needs_tensorrt
def test_grids_and_numbers_are_those_of_the_kernels(learned: dict[str, Any]) -> None:
    made = cases.MODELS[NAME]
    lists = BATCH * made.kv_heads
    group = made.heads // made.kv_heads
    expected = {
        "DmsCacheUpdate": ((lists, 1, 1), [cases.LIST_PAGES]),
        "DmsDecodePartial": ((cases.PROGRAMS, 1, 1), [lists, cases.LIST_PAGES]),
        "DmsDecodeCombine": ((lists, group, 1), []),
        "DmsPrefillAttention": (
            (BATCH * made.heads, 1, 1),
            [cases.CHUNK, made.window, cases.LIST_PAGES, cases.LIST_PAGES],
        ),
        "DmsPrefillWrite": ((lists, 4, 1), [cases.CHUNK, cases.LIST_PAGES]),
    }
    for name, (grid, integers) in expected.items():
        launch = learned[name]["launch"]
        assert tuple(launch[f"grid_{x}"] for x in "xyz") == grid, name
        assert (launch["block_y"], launch["block_z"]) == (1, 1)
        assert learned[name]["integers"] == integers, name


@pytest.mark.tensorrt
@needs_tensorrt
def test_a_node_with_other_attributes_than_its_kernel_is_refused(learned: dict[str, Any]) -> None:
    message = learned["wrong attribute"]
    assert "ExportError: DmsCacheUpdate: a node has window=1" in message
    assert "compiled for 20" in message


def manifest(*kernels: Any) -> Manifest:
    return Manifest(cases.MODELS["bf16"], 64, 4, 128, 6, {}, kernels)


def test_no_tensorrt_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(ExportError, match=re.escape("pip install 'modelopt-dms[tensorrt]'")):
        plugins.register(manifest(), tmp_path)


@pytest.mark.parametrize("version", ["8.6.1", "10.9.0.34"])
def test_an_old_tensorrt_says_so(
    version: str,
    fake_tensorrt: Callable[[str], None],
    tmp_path: Path,
) -> None:
    fake_tensorrt(version)
    with pytest.raises(
        ExportError, match=rf"TensorRT {re.escape(version)} cannot .* 10\.10 or later"
    ):
        plugins.register(manifest(), tmp_path)


def test_a_directory_without_kernels_says_so(
    fake_tensorrt: Callable[[str], None], tmp_path: Path
) -> None:
    fake_tensorrt("11.4.0.106")
    with pytest.raises(ExportError, match="holds no kernels of DmsCacheUpdate, .*plugin_free"):
        plugins.register(manifest(), tmp_path)


@pytest.fixture
def fake_tensorrt(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def install(version: str) -> None:
        from types import ModuleType

        module, plugin = ModuleType("tensorrt"), ModuleType("tensorrt.plugin")
        module.__version__, module.plugin = version, plugin  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        monkeypatch.setitem(sys.modules, "tensorrt.plugin", plugin)

    return install
