# SPDX-License-Identifier: Apache-2.0
"""Every example runs, with numbers small enough for a test."""

import io
import json
import math
from pathlib import Path

import pytest
from paths import ROOT
from rich.console import Console
from scripts import load

import modelopt_dms
from modelopt_dms.evaluation.report import results_table

FIELDS = {
    "method",
    "task",
    "metric",
    "value",
    "context_tokens",
    "resident_tokens",
    "kv_bytes",
    "compression_ratio",
}


@pytest.fixture(scope="module")
def demo_output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo")
    load("examples/demo_embedded.py").main(["--quick", "--output", str(output)])
    return output


def test_the_demo_compares_four_methods_on_four_tasks(demo_output: Path) -> None:
    results = json.loads((demo_output / "results.json").read_text())
    rows = results["rows"]
    assert {(row["method"], row["task"]) for row in rows} == {
        (method, task)
        for method in ("full", "dms", "sliding_window", "random")
        for task in ("recall", "tracking", "arithmetic", "text")
    }
    for row in rows:
        assert row.keys() >= FIELDS
        assert row["metric"] == ("perplexity" if row["task"] == "text" else "accuracy")
        assert math.isfinite(row["value"])
        assert row["resident_tokens"] <= row["context_tokens"]
    assert results["seed"] == 0
    assert results["seconds"]["total"] > 0
    assert {"python", "torch", "transformers", "modelopt-dms"} <= results["versions"].keys()


def test_the_demo_gives_every_peer_the_live_tokens_of_dms(demo_output: Path) -> None:
    rows = json.loads((demo_output / "results.json").read_text())["rows"]
    for task in ("recall", "tracking", "arithmetic", "text"):
        live = {row["method"]: row["resident_tokens"] for row in rows if row["task"] == task}
        assert live["sliding_window"] == pytest.approx(live["dms"], abs=1)
        assert live["random"] == pytest.approx(live["dms"], rel=0.1)
        assert live["full"] >= live["dms"]


def test_the_demo_leaves_a_picture_a_loadable_model_and_nothing_half_written(
    demo_output: Path,
) -> None:
    assert (demo_output / "live_length.png").read_bytes().startswith(b"\x89PNG")
    assert {x.name for x in demo_output.iterdir()} == {"live_length.png", "model", "results.json"}
    model = modelopt_dms.load(demo_output / "model")
    assert model.config.dms_config["target_cr"] >= 4


def test_the_demo_runs_again_over_its_own_output_but_not_over_another_model(
    demo_output: Path, tmp_path: Path
) -> None:
    demo = load("examples/demo_embedded.py")
    demo.clear(demo_output / "model")
    assert not (demo_output / "model").exists()
    other = tmp_path / "model"
    other.mkdir()
    (other / "config.json").write_text("{}")
    demo.clear(other)
    assert (other / "config.json").exists()


def test_the_quickstart_runs(capsys: pytest.CaptureFixture[str]) -> None:
    load("examples/quickstart.py").main(["--steps", "2", "--documents", "40"])
    assert "compression" in capsys.readouterr().out


def test_the_benchmark_compares_caches_of_one_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = load("benchmarks/cpu.py")
    monkeypatch.setattr(bench, "SHAPE", (2, 64, 4, 2, 16))
    arguments = "--tokens 512 --batches 2 --distinct 512 --window 16 --steps 3 --threads 1 --ratios 4 --repeats 1"
    bench.main([*arguments.split(), "--output", str(tmp_path / "cpu.json")])
    found = json.loads((tmp_path / "cpu.json").read_text())
    dense, dms = found["rows"]
    assert (dense["cache"], dms["cache"]) == ("DynamicCache", "DMS, CR 4")
    assert dense["kv_bytes"] == 2 * 2 * 2 * 2 * 16 * 4 * (512 + 6)
    assert dms["compression_ratio"] == pytest.approx(4, rel=0.3)
    assert {"cpu", "date", "torch", "commit"} <= found["machine"].keys()


def test_the_composition_table_has_every_technique_alone_and_all_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = load("benchmarks/composition.py")
    arguments = "--recipes dms_cr4 kv_nvfp4-dms_cr8 --steps 2 --window 8 --sequence-length 128"
    arguments += " --documents 12 --length 256 --episodes 1"
    places = ["--output", str(tmp_path / "rows.json"), "--work", str(tmp_path / "work")]
    bench.main([*arguments.split(), *places])
    none, dms, both = json.loads((tmp_path / "rows.json").read_text())["rows"]
    values = 2 * 2 * 4 * 2 * 32  # bytes of bf16: keys and values, 4 layers, 2 KV heads of 32
    assert none["kv_bytes_per_token"] == values
    assert dms["dms_alone"]["accuracy"] == dms["accuracy"]
    assert both["quantization_alone"]["compression_ratio"] == 1.0
    # Half a byte a value and a scale in 16; slack is less than a third at this length.
    row = values / 2 * (0.5 + 1 / 16)
    assert row <= both["quantization_alone"]["kv_bytes_per_token"] <= 1.33 * row
    assert both["kv_reduction"] == pytest.approx(values / both["kv_bytes_per_token"])
    assert both["weight_bytes"] == none["weight_bytes"] + 4 * 4 * 2 * 128  # the gates, float32


@pytest.mark.slow
def test_the_calibration_benchmark_compares_equal_budgets_and_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = load("benchmarks/calibration.py")
    monkeypatch.setattr(bench, "SAMPLE_LENGTH", 400)
    monkeypatch.setitem(bench.TRAINING, "sequence_length", 400)
    monkeypatch.setattr(bench, "LENGTH", 400)
    few = ["--episodes", "1", "--documents", "12", "--ratios", "3", "--target", "4"]
    steps = ["--calibrated-steps", "0", "--zero-steps", "1"]
    bench.main([*few, *steps, "--output", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    full, row = found["sweep"]["rows"]
    assert full["calibrated"]["compression_ratio"] == 1.0
    assert row["calibrated"]["accuracy"] > row["sliding_window"]["accuracy"]
    assert row["calibrated"]["perplexity"] < row["random"]["perplexity"]
    assert [(x["start"], x["steps"]) for x in found["retrofits"]] == [
        ("calibrated", 0),
        ("zero", 1),
    ]
    assert found["retrofits"][0]["kl"] < found["retrofits"][1]["kl"]
    assert (tmp_path / "found.png").exists()


def test_the_overhead_benchmark_times_both_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load("benchmarks/overhead.py")
    monkeypatch.setitem(bench.SHAPES, "tiny", (1, 32, 2, 1, 16, 64))
    taken = bench.seconds("tiny", 300, 1)
    assert taken["plain"] > 0 and taken["retrofit"] > 0


def test_the_table_fits_a_terminal_of_80_columns(demo_output: Path) -> None:
    rows = json.loads((demo_output / "results.json").read_text())["rows"]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(results_table(rows))
    assert "…" not in console.export_text()
