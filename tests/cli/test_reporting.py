# SPDX-License-Identifier: Apache-2.0
"""The command report, and the report that compress writes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_line import run

from modelopt_dms.cli import reporting

SMALL = ("samples=4", "held_out=2", "sample_length=256", "curve=[2,4]", "batch_size=2")
CALIBRATED = [x for change in SMALL for x in ("--set", f"calibrate.{change}")]


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("report") / "toy-cr4"
    with pytest.MonkeyPatch.context() as patch:
        words = ("compress", "embedded", "-r", "calibrated_cr4-1k", "-o", target, *CALIBRATED)
        assert run(patch, *words, "--set", "dms.window=16") == 0
    return target


def test_compress_leaves_a_report_beside_the_model(compressed: Path) -> None:
    page = (compressed / "report.html").read_text(encoding="utf-8")
    assert "What toy-cr4 forgets" in page and "modelopt-dms report" in page
    assert '<section id="capacity">' in page and "H200 SXM 141 GB" in page
    assert '<section id="answers">' in page and '<section id="growth">' not in page
    assert "calibrate, on held-out samples of 256 tokens" in page


def test_a_report_shows_the_users_own_text_and_the_peers_of_a_results_file(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, page, figures = tmp_path / "mine.txt", tmp_path / "page.html", tmp_path / "figures.json"
    text.write_text("keep fox red\nskip owl blue\n" * 80)
    row = {"method": "kvpress SnapKV", "task": "needle", "category": None, "length": 1024}
    rows = [{**row, "ratio": 4.0, "right": 3, "asked": 20}, {**row, "method": "full cache"}]
    rows.append({**rows[0], "method": "kvpress AdaKV(SnapKV)", "frees": False})
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    words = ("report", compressed, "-o", page, "--text", text, "--json", figures)
    given = (
        *words,
        "--peers",
        tmp_path / "rows.json",
        "--count",
        0,
        "--new-tokens",
        0,
        "--length",
        256,
        "--gpu",
        "b200",
    )
    assert run(monkeypatch, *given) == 0
    found = json.loads(figures.read_text())
    assert "".join(found["retention"]["tokens"]).count("fox red") >= 20
    assert found["retention"]["source"] == "mine.txt" and len(found["retention"]["tokens"]) == 256
    assert found["capacity"]["gpu"].startswith("B200") and found["capacity"]["length"] == 256
    assert found["capacity"]["rows"][0]["compression_ratio"][0] == 1.0
    measured = found["cache"]["compression_ratio"]
    assert found["capacity"]["ratio"] == pytest.approx(measured, abs=0.01)
    shown = {"task": "needle", "length": 1024, "ratio": 4.0, "result": "3 of 20"}
    assert found["peers"] == [
        {"method": "kvpress SnapKV", **shown},
        {"method": "kvpress AdaKV(SnapKV) (masks, frees nothing)", **shown},
    ]
    written = page.read_text(encoding="utf-8")
    assert "kvpress SnapKV" in written and "--peers" in written


def test_what_cannot_be_meant_is_one_line_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    (tmp_path / "mine.html").write_text("<p>not yours")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "rows.json").write_text("[]")
    cases = {
        "mine.html exists and is no report of ours": ["-o", "mine.html"],
        "no/page.html's folder": ["-o", "no/page.html"],
        "--ratios: '4,one' must be numbers above 1": ["--ratios", "4,one"],
        "--gpu 'h9' is not known": ["--gpu", "h9"],
        "--text none.txt does not exist": ["--text", "none.txt"],
        "--text empty.txt is empty": ["--text", "empty.txt"],
        "--peers rows.json is no results file": ["--peers", "rows.json"],
        "has no config.json": [],
    }
    code = (
        "import sys, json, modelopt_dms.cli as cli\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['modelopt-dms', 'report', '.', *words]\n"
        "    try: cli.main()\n"
        "    except SystemExit as stop: print(stop.code)\n"
        "print([x for x in ('torch', 'transformers', 'datasets') if x in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([*cases.values()])],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.split("\n")[:-1] == ["1"] * len(cases) + ["[]"]
    lines = [x for x in done.stderr.splitlines() if x.startswith("error:")]
    for message, line in zip(cases, lines, strict=True):
        assert message.replace("no/page.html's folder", "no does not exist") in line
    assert (tmp_path / "mine.html").read_text() == "<p>not yours"


def test_the_figures_can_be_printed(
    compressed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--json", "-", "--count", 0, "--new-tokens", 0, "--length", 256)
    assert run(monkeypatch, "report", compressed, "-o", "r.html", *words) == 0
    assert "retention" in json.loads(capsys.readouterr().out)
    assert [x.name for x in tmp_path.iterdir()] == ["r.html"]


def test_a_directory_that_cannot_be_written_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # A superuser, as in containers, may write anywhere.
    monkeypatch.setattr("os.access", lambda _, mode, **__: not mode & os.W_OK)
    assert run(monkeypatch, "report", tmp_path, "-o", tmp_path / "r.html") == 1
    assert f"{tmp_path} is read-only" in capsys.readouterr().err


def test_a_report_that_fails_after_compress_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise TypeError("forward() got an unexpected keyword argument 'logits_to_keep'")

    monkeypatch.setattr(reporting, "check_evicts", fail)
    odd: Any = SimpleNamespace(config=SimpleNamespace())
    reporting.report_after_compress(odd, odd, tmp_path)
    assert "no report was written: TypeError: forward() got" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
