# SPDX-License-Identifier: Apache-2.0
"""A corpus of damaged input: `tools/fuzz.py` has the rest, and docs/reliability.md how many cases were run."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from paths import ROOT

from modelopt_dms.runtime.manifest import FILE, Manifest, ManifestError

CASES = {"recipe": 60, "data": 200, "manifest": 200}


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", ROOT / "tools" / "fuzz.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", CASES)
def test_damaged_input_is_read_or_refused_in_one_error(
    kind: str, fuzz: ModuleType, tmp_path: Path
) -> None:
    faults: list[str] = []
    found = fuzz.run(kind, CASES[kind], 0, tmp_path, faults.append)
    assert not faults
    assert found["refused"] and found["read"], found


@pytest.mark.slow
def test_damaged_directories_are_read_or_refused_in_one_error(
    fuzz: ModuleType, tmp_path: Path
) -> None:
    faults: list[str] = []
    fuzz.run("config", 100, 0, tmp_path, faults.append)
    assert not faults


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "of another format"),
        ({"chunk": 0}, "chunk=0 must be a number from 1"),
        ({"chunk": True}, "chunk=True"),
        ({"files": []}, "files=\\[\\] must be a mapping"),
        ({"files": {"../x": "0"}}, "no name of a file beside it"),
        ({"phases": []}, "lacks or misnames"),
        ({"phases": {"decode": {"graph": 3, "inputs": [], "outputs": []}}}, "3 is no name"),
        ({"kernels": None}, "lacks or misnames"),
    ],
)
def test_a_damaged_manifest_is_refused(
    change: dict | list, message: str, fuzz: ModuleType, tmp_path: Path
) -> None:
    good = fuzz.Manifests(tmp_path).good
    assert Manifest.load(tmp_path).chunk == 32
    (tmp_path / FILE).write_text(json.dumps({**good, **change} if isinstance(change, dict) else []))
    with pytest.raises(ManifestError, match=message):
        Manifest.load(tmp_path)
