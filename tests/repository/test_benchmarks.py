# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run end to end on tiny shapes, and write what they promise."""

import ast
import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
from paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
MACHINE = {"cpu", "cores", "date", "commit", "python", "torch", "transformers"}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch):
    def by_name(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module(name)

    return by_name


def test_every_kernel_and_format_is_measured_and_right(load, tmp_path: Path) -> None:
    output = tmp_path / "kernels.json"
    # Without flex: PyTorch compiles it, which takes longer than all the rest.
    peers = ["sdpa", "sdpa, group as rows", "flashinfer"]
    load("measure_kernels").main(["--quick", "--peers", *peers, "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["machine"].keys() >= MACHINE
    assert found["copy_bytes_per_s"] > 0
    assert output.with_suffix(".png").stat().st_size > 10_000
    rows = found["rows"]
    assert not [row for row in rows if "error" in row]
    timed = [row for row in rows if "us" in row]
    for op in ("decode", "append", "pack", "chunked"):
        formats = {row["format"] for row in timed if row["op"] == op}
        assert formats == {"bf16", "fp8", "nvfp4"}, op
    assert {row["lengths"] for row in timed if row["op"] == "decode"} == {"uniform", "ragged"}
    assert {row["impl"] for row in timed if row["op"] == "train"} >= {"ours", "flash"}
    assert {row["impl"] for row in timed if row["op"] == "decode"} >= {"ours", "sdpa"}
    absent = {row["impl"] for row in rows if row.get("absent")}
    assert absent == set(found["absent_peers"]) & set(peers)
    for row in timed:
        assert math.isfinite(row["us"]) and row["us"] > 0
    assert {"target", "limit", "worst", "reached"} == found["targets"][0].keys()


def test_a_wrong_kernel_is_not_timed(load, tmp_path: Path, monkeypatch) -> None:
    measure = load("measure_kernels")
    right = measure.dispatch.pack

    def wrong(k, v, *rest, impl="auto"):
        return right(k if impl == "reference" else 1.1 * k, v, *rest, impl="reference")

    monkeypatch.setattr(measure.dispatch, "pack", wrong)
    output = tmp_path / "kernels.json"
    with pytest.raises(SystemExit) as stopped:
        measure.main(["--quick", "--parts", "pack", "--output", str(output)])
    assert stopped.value.code == 1
    for row in json.loads(output.read_text())["rows"]:
        assert "us" not in row and "wrong" in row["error"]


def test_whole_models_are_measured_dense_and_compressed(load, tmp_path: Path) -> None:
    output = tmp_path / "end_to_end.json"
    load("end_to_end").main(["--quick", "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["machine"].keys() >= MACHINE
    assert output.with_suffix(".png").stat().st_size > 10_000
    rows = found["rows"]
    assert not [row for row in rows if "error" in row]
    assert {(row["impl"], row["format"], row["cr"]) for row in rows} == {
        ("generate", "bf16", 1),
        ("dms", "bf16", 1),
        ("dms", "bf16", 4),
        ("dms", "fp8", 4),
    }
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms_per_step"])
        assert row["context"] / row["resident_tokens"] == pytest.approx(row["cr"], rel=0.1)
        assert row["limit_ms"] > 0
    eight, sixteen = (
        row["kv_bytes"] / row["resident_tokens"]
        for row in (rows[-1], next(x for x in rows if x["cr"] == 4 and x["batch"] == 2))
    )
    assert eight == sixteen / 4  # float32 on a CPU
    largest = [entry for entry in found["comparison"] if "throughput over generate" in entry]
    assert len(largest) == 1
    same = [entry for entry in found["comparison"] if "speedup" in entry]
    assert [entry["format"] for entry in same] == ["bf16", "fp8"]


def test_the_script_named_kernels_can_be_imported_in_place_of_hugging_faces_package() -> None:
    tree = ast.parse((BENCHMARKS / "kernels.py").read_text())
    assert not [x for x in tree.body if isinstance(x, ast.Import | ast.ImportFrom)]
