# SPDX-License-Identifier: Apache-2.0
"""The command eval: fidelity by file, limits by exit code, and a run that goes on where it was stopped."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run

from modelopt_dms import apply_dms
from modelopt_dms.checkpoints.base import load_base
from modelopt_dms.cli.opening import beyond_model
from modelopt_dms.evaluation import run as evaluation_run
from modelopt_dms.evaluation.measure import material_of
from modelopt_dms.gates.gate import gates


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with gates that evict, saved."""
    target = tmp_path_factory.mktemp("scoring") / "model"
    model, tokenizer = load_base("embedded", dtype="float32")
    model = apply_dms(model, {"window": 16, "offset": 0.0, "scale": 10.0})
    torch.manual_seed(0)
    for gate in gates(model):
        torch.nn.init.normal_(gate.weight, std=0.3)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def test_every_file_is_a_category_of_fidelity_and_limits_set_the_exit_code(
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "code.txt").write_text(Path(__file__).read_text())
    (tmp_path / "records.txt").write_text("keep fox red\nskip owl blue\n" * 40)
    files = [x for name in ("code", "records") for x in ("--data", tmp_path / f"{name}.txt")]
    words = ("eval", directory, *files, "--fidelity", "--lengths", 128, "--count", 2)
    rows_file = tmp_path / "rows.json"
    limits = ("--fail-if", "kl<0", "--fail-if", "code.kl>1e-9")
    assert run(monkeypatch, *words, "--json", rows_file, *limits) == 3
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("failed:")]
    assert "code.kl>1e-9: code at 128 tokens has kl" in line
    rows = json.loads(rows_file.read_text())
    assert [x["category"] for x in rows] == ["code", "records"]
    for x in rows:
        assert 0 < x["value"] <= x["kl_p95"] <= x["kl_p99"] <= x["kl_max"]
        assert x["count"] == 256 and x["compression_ratio"] > 1.2
    assert run(monkeypatch, *words, "--fail-if", "top1<0") == 0


def test_a_stopped_evaluation_goes_on_behind_the_rows_it_has(
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured: list[tuple[str, int]] = []
    stops = [("text", 1)]
    real = evaluation_run.parts_of

    def counted(model: Any, tokenizer: Any, task: str, *rest: Any) -> list[Any]:
        def run(number: int, part: Any) -> Any:
            if (task, number) in stops:
                stops.clear()
                raise KeyboardInterrupt
            measured.append((task, number))
            return part()

        parts = real(model, tokenizer, task, *rest)
        return [partial(run, number, part) for number, part in enumerate(parts)]

    monkeypatch.setattr(evaluation_run, "parts_of", counted)
    rows_file, whole = tmp_path / "rows.json", tmp_path / "whole.json"
    # Nine texts are two batches.
    words = ("eval", directory, "--tasks", "recall,text", "--lengths", 128, "--count", 9)
    assert run(monkeypatch, *words, "--json", rows_file) == 130
    assert not rows_file.exists()
    said = " ".join(capsys.readouterr().err.split())
    assert "1 result and 1 part of the next are in" in said
    assert run(monkeypatch, *words, "--json", rows_file) == 0
    assert len(measured) == len(set(measured))  # nothing was measured twice
    assert {("recall", 0), ("text", 0), ("text", 1)} <= {*measured}
    assert "there already, of 2 results: 1 result and 1 part of the next" in capsys.readouterr().out
    assert run(monkeypatch, *words, "--json", whole) == 0
    assert json.loads(whole.read_text()) == json.loads(rows_file.read_text())


def test_a_length_without_room_is_an_error_before_anything_is_measured(
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measured(*_: Any) -> Any:
        raise AssertionError("something was measured")

    monkeypatch.setattr(evaluation_run, "parts_of", measured)
    monkeypatch.setattr(evaluation_run, "distance", measured)
    short = tmp_path / "short.txt"
    short.write_text("keep fox red\n" * 30)
    for words, message in (
        (("--tasks", "recall,vt", "--lengths", 128), "length=128 has no room for a vt prompt"),
        (("--fidelity", "--data", short, "--lengths", "64,4000"), "no document has 4000 tokens"),
    ):
        assert run(monkeypatch, "eval", directory, *words) == 1
        assert message in " ".join(capsys.readouterr().err.split())


def test_rows_can_be_printed(
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("--tasks", "recall", "--lengths", 128, "--count", 1, "--json", "-")
    assert run(monkeypatch, "eval", directory, *words) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["task"] == "recall" and row["length"] == 128
    assert not [*tmp_path.iterdir()]


def test_too_little_text_and_too_long_contexts_are_said(
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, rows = tmp_path / "short.txt", tmp_path / "rows.json"
    text.write_text("keep fox red\nskip owl blue\n" * 40)
    words = ("eval", directory, "--data", text, "--lengths", 128, "--count", 50, "--json", rows)
    assert run(monkeypatch, *words) == 0
    (row,) = json.loads(rows.read_text())
    assert 1 <= row["samples"] < 50
    said = " ".join(capsys.readouterr().err.split())
    assert f"data at 128 tokens: {row['samples']} samples, as there is no more text" in said
    assert "was made for" not in said
    config = json.loads((directory / "config.json").read_text())
    longer = config["max_position_embeddings"] + 1
    assert f"--lengths: {longer:,} tokens, and" in str(
        beyond_model(str(directory), longer, "--lengths")
    )


def test_files_that_no_sample_is_of_are_named(
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    long, short, late = (tmp_path / f"{x}.txt" for x in ("long", "short", "late"))
    for path, lines in ((long, 40), (short, 1), (late, 40)):
        path.write_text("keep fox red\nskip owl blue\n" * lines)
    files = [x for path in (short, long, late) for x in ("--data", path)]
    words = ("eval", directory, *files, "--lengths", 128, "--count", 1)
    assert run(monkeypatch, *words) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"data at 128 tokens: no sample is of {short}: its longest document has" in said
    assert f"no sample is of {late}: all 1 samples were found before it" in said
    assert f"of {long}" not in said


def test_long_texts_are_tokenized_without_a_warning() -> None:
    tokenizer = load_base("embedded")[1]
    tokenizer.model_max_length = 64
    for task in ("recall", "text", "needle", "cwe"):
        material_of(tokenizer, task, 1024, 1, 0)
    # Where transformers notes that it has printed the warning.
    assert not tokenizer.deprecation_warnings


def test_fidelity_of_a_model_without_gates_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "eval", "embedded", "--fidelity") == 1
    assert "is its own full cache" in capsys.readouterr().err.replace("\n", " ")


def test_wrong_tasks_and_limits_are_refused_before_anything_heavy_is_imported() -> None:
    cases = {
        "tasks ['nedle'] are unknown, must be among recall": ["--tasks", "recall,nedle"],
        "name one twice": ["--tasks", "vt,vt"],
        "'99999999999' must be a whole number of at least 64 tokens, and at most 16,777,216": [
            "--lengths",
            "512,99999999999",
        ],
        "must be [TASK.]FIGURE": ["--fail-if", "kl=3"],
        "only --fidelity measures": ["--fail-if", "kl>3"],
        "recal will not be measured, only recall": [
            "--tasks",
            "recall",
            "--fail-if",
            "recal.accuracy<1",
        ],
    }
    code = (
        "import sys, json, modelopt_dms.cli as cli\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.argv = ['modelopt-dms', 'eval', 'embedded', *words]\n"
        "    try: cli.main()\n"
        "    except SystemExit as stop: print(stop.code)\n"
        "print([x for x in ('torch', 'transformers', 'datasets') if x in sys.modules])"
    )
    words = [sys.executable, "-c", code, json.dumps([*cases.values()])]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.stdout.split("\n")[:-1] == ["1"] * 6 + ["[]"]
    lines = [x for x in done.stderr.splitlines() if x.startswith("error:")]
    for message, line in zip(cases, lines, strict=True):
        assert message in line
