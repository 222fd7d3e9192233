# SPDX-License-Identifier: Apache-2.0
"""The study of real models runs end to end on the embedded one, and goes on where it stopped."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT

from modelopt_dms.evaluation.prose import reference_sentences

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.slow
def test_a_small_cell_is_measured_once_and_resumed(
    load: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "rows.json"
    (tmp_path / "page.html").write_text("<p>Ein Satz.</p><style>p {}</style>" * 400)
    (tmp_path / "book.txt").write_text(" ".join(reference_sentences()))
    settings = {"calibrate.samples": 2, "calibrate.sample_length": 256, "calibrate.held_out": 1}
    settings |= {"calibrate.curve": "[2, 4]", "dms.window": 16}
    command = ["--model", "embedded", "--dtype", "float32", "--lengths", "400", "--draws", "1"]
    command += ["--ratios", "2", "90", "--tasks", "multivalue", "fidelity", "--count", "1"]
    command += [
        "--recipe",
        "calibrated_cr4",
        "--calibration",
        f"book={tmp_path / 'book.txt'}",
        "--presses",
    ]
    command += ["--text", f"german={tmp_path / 'page.html'}", "--work", str(tmp_path / "work")]
    command += ["--output", str(output)]
    command += [x for name, value in settings.items() for x in ("--set", f"{name}={value}")]
    study = load("real_models")
    study.main(command)
    found = json.loads(output.read_text())
    rows = found["rows"]
    assert {row["method"] for row in rows} == {"full cache", "calibrated_cr4@book-0"}
    assert {row["category"] for row in rows} == {None, "prose", "code", "german"}
    for row in rows:
        if row["ratio"] == 90.0:
            assert "cr=90 must be at least 1" in row["error"]
        elif row["task"] == "multivalue":
            assert 0 <= row["right"] <= row["asked"] and len(row["kept"]) == 1
        elif row["method"] == "full cache":
            assert row["compression_ratio"] == 1.0 and row["kl_max"] < 1e-5 and row["kept"] == [272]
        else:
            assert row["compression_ratio"] > 1.2 and row["kl"] > 0 and row["tail"] == 128
    assert output.with_suffix(".png").stat().st_size > 10_000
    assert str(tmp_path) not in output.read_text()
    assert "| float32 | 400 | 2 | calibrated_cr4 | 1 |" in capsys.readouterr().out

    study.main(command)
    again = json.loads(output.read_text())
    assert again["rows"] == rows and len(again["runs"]) == 2


def test_presses_keep_what_draws_kept_on_average(load: Any, tmp_path: Path) -> None:
    study = load("real_models")
    args = study.arguments(["--tasks", "needle", "--count", "2", "--output", str(tmp_path / "rows.json"), "--dtype",
                            "float32", "--model", "embedded"])  # fmt: skip
    rows = study.Rows(args.output, {})
    one = study.Study(args, "float32", rows, study.Console(quiet=True))
    (key,) = one.keys("kvpress TOVA", 400, 4.0)
    contexts = [len(x.context_ids) for x in one.episodes(key)]
    assert one._kept(key) == [round(x / 4) for x in contexts]
    rows.add({**key, "method": "a@1"}, {"kept": [100.0, 50.0]})
    rows.add({**key, "method": "a@2"}, {"kept": [110.0, 51.0]})
    rows.add({**key, "method": "a@3", "ratio": 8.0}, {"kept": [1.0, 1.0]})
    assert one._kept(key) == [105, 50]
    job = one._job([key, {**key, "method": "kvpress Knorm"}])
    assert job["wanted"] == [("TOVA", 4.0), ("Knorm", 4.0)]
    assert [x["kept"] for x in job["prompts"]] == [{"4.0": 105}, {"4.0": 50}]


def test_presses_write_answers_that_are_searched_for_the_wanted_words(
    load: Any, tmp_path: Path
) -> None:
    study = load("real_models")
    args = study.arguments(["--tasks", "qa_2", "--count", "2", "--output", str(tmp_path / "rows.json"), "--dtype",
                            "float32", "--model", "embedded"])  # fmt: skip
    one = study.Study(args, "float32", study.Rows(args.output, {}), study.Console(quiet=True))
    (key,) = one.keys("kvpress TOVA", 400, 4.0)
    prompts = one.episodes(key)
    for sent, own in zip(one._job([key])["prompts"], prompts, strict=True):
        assert (sent["context"], sent["prompt"]) == (own.context_ids, own.prompt_ids)
        assert sent["tokens"] == 32 and one.tokenizer.eos_token_id in sent["stop"]
    said = [one.tokenizer(f" the {prompts[0].wanted[0]}")["input_ids"], [7, 8]]
    assert one._judged(key, said) == {"right": 1, "asked": 2}


def test_votes_and_passes_of_parallel_chains_are_counted(load: Any) -> None:
    chains = load("parallel_chains")
    said = ["4", "6", "6", "", "6", "5", "", ""]
    assert chains.majority(said, "6", 1) == 3 / 8
    # Of ties the first counts, and a chain that did not end has no vote.
    assert chains.majority(said, "6", 2) == 2 / 4
    assert chains.majority(said, "6", 4) == 1.0 and chains.majority(said, "6", 8) == 1.0
    assert chains.pass_at(3, 8, 1) == pytest.approx(3 / 8)
    assert chains.pass_at(3, 8, 2) == pytest.approx(1 - (5 / 8) * (4 / 7))
    assert chains.pass_at(0, 8, 8) == 0.0 and chains.pass_at(1, 8, 8) == 1.0


def test_intervals_are_wilsons(load: Any) -> None:
    wilson = load("real_summary").wilson
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 12)[0] == 0.0


def test_samples_are_as_long_as_asked_for_or_refused(load: Any) -> None:
    texts = load("real_texts")

    def words(text: str) -> dict[str, list[int]]:
        return {"input_ids": torch.arange(len(text.split())).tolist()}

    assert [len(x) for x in texts.samples(words, "ab " * 500, 30, 3, seed=0)] == [30, 30, 30]
    with pytest.raises(ValueError, match="has no 30 tokens"):
        texts.samples(words, "ab " * 20, 30, 1, seed=0)
    with pytest.raises(ValueError, match="must be 'docstrings', 'code' or NAME=PATH"):
        texts.calibration_documents("poems", 0, {})
