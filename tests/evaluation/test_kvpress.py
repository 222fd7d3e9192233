# SPDX-License-Identifier: Apache-2.0
"""Results of eval are those of kvpress' evaluation in name and shape, and its own functions read them."""

import csv
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import run
from paths import EMBEDDED, ROOT

from modelopt_dms.config.output_dir import OutputError
from modelopt_dms.data import DataError
from modelopt_dms.data.files import read_table
from modelopt_dms.evaluation import kvpress_prompts
from modelopt_dms.evaluation.kvpress_results import (
    Prediction,
    Setting,
    check_directory,
    metrics,
    write_results,
)

# evaluation/evaluate.py of kvpress 0.5.5, as it stands in its source distribution.
COLUMNS = {
    "answer", "answer_prefix", "compression_ratio", "max_new_tokens", "predicted_answer", "question", "task"
}  # fmt: skip
CONFIG = [
    "dataset", "data_dir", "model", "device", "press_name", "compression_ratio", "key_channel_compression_ratio",
    "fraction", "max_new_tokens", "max_context_length", "query_aware", "needle_depth", "compression_interval",
    "target_size", "hidden_states_buffer_size", "output_dir", "log_level", "model_kwargs", "trust_remote_code",
    "press_init_command", "seed", "fp8",
]  # fmt: skip
SETTING = Setting(
    "ruler", "4096", "Qwen/Qwen3-8B", "dms", 0.75, "DMS", "cpu", "bfloat16", 0
)  # fmt: skip


def prediction(task: str, said: str, *answers: str) -> Prediction:
    return Prediction("What, then?", 'It "is"', answers, task, 128, said, 0.7421875)


PREDICTIONS = [
    prediction("vt", " ABCDE,\n and fghij.", "ABCDE", "FGHIJ", "KLMNO"),
    prediction("vt", "nothing", "ABCDE", "FGHIJ", "KLMNO"),
    prediction("qa_1", "In Paris\x07, the city", "paris", "Lutetia"),
    prediction("niah_single_2", " 48213.", "48213"),
]


def test_scores_are_rulers() -> None:
    assert metrics(PREDICTIONS) == {
        "niah_single_2": {"string_match": 100.0},
        "qa_1": {"string_match": 100.0},
        "vt": {"string_match": 33.33},
    }
    # A control character in the middle of an answer is taken out, as kvpress does.
    assert prediction("qa_1", "Par\x07is", "paris").score() == 1.0


def test_folders_and_files_have_kvpress_names_and_columns(tmp_path: Path) -> None:
    place = write_results(tmp_path, SETTING, PREDICTIONS)
    assert place == tmp_path / "ruler__4096__Qwen--Qwen3-8B__dms__0.75"
    assert {x.name for x in place.iterdir()} == {"predictions.csv", "metrics.json", "config.yaml"}
    with (place / "predictions.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert set(rows[0]) == COLUMNS
    assert rows[0]["answer"] == "['ABCDE' 'FGHIJ' 'KLMNO']"
    assert rows[0]["predicted_answer"] == " ABCDE,\n and fghij."
    config = yaml.safe_load((place / "config.yaml").read_text())
    assert [*config] == CONFIG
    assert (config["compression_ratio"], config["data_dir"]) == (0.75, "4096")
    # A second run does not overwrite the first one.
    assert write_results(tmp_path, SETTING, PREDICTIONS) == place / "1"
    assert write_results(tmp_path, SETTING, PREDICTIONS) == place / "2"


def test_a_place_that_cannot_hold_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file; expected a directory"):
        check_directory(tmp_path / "file")
    with pytest.raises(OutputError, match="does not exist"):
        check_directory(tmp_path / "no/results")


def test_a_table_without_a_column_is_refused_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"context": "a", "other": 1}\n')
    assert read_table(file, ["context"]) == [{"context": "a"}]
    with pytest.raises(DataError, match="row 0 has no question; expects context, question"):
        read_table(file, ["context", "question"])
    with pytest.raises(DataError, match=r"is not a \.parquet or \.jsonl file"):
        read_table(tmp_path / "rows.csv", ["context"])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command writes about the embedded model, which is plain: two families, and a data set."""
    folder = tmp_path_factory.mktemp("kvpress")
    row = {"context": "keep fox red\n" * 30, "question": "ask", "answer_prefix": " fox"}
    row |= {"answer": ["red"], "task": "qa_fox", "max_new_tokens": 3}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    words = ("eval", EMBEDDED, "--tasks", "needle,multivalue", "--lengths", "400", "--count", "1")
    # Its tokenizer has no English words: a prompt is 400 of its tokens, and 8 are written.
    words += ("--kvpress", folder / "out", "--kvpress-data", f"ruler/64={folder / 'rows.jsonl'}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kvpress_prompts, "NEEDLE_TOKENS", 8)
        named = ("--kvpress-model", "me/embedded", "--json", folder / "rows.json")
        assert run(patch, *words, *named) == 0
    return folder


def test_the_command_writes_a_folder_a_data_set_with_what_was_generated(results: Path) -> None:
    own = results / "out/modelopt_dms-ruler__400__me--embedded__no_press__0.00"
    theirs = results / "out/ruler__64__me--embedded__no_press__0.00"
    assert {x.name for x in (results / "out").iterdir()} == {own.name, theirs.name}
    with (own / "predictions.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [x["task"] for x in rows] == ["niah_single_2", "niah_multivalue"]
    assert rows[0]["question"].startswith("What is the special magic number for ")
    assert rows[0]["answer_prefix"].startswith("The special magic number for ")
    assert {x["compression_ratio"] for x in rows} == {"0.0"}
    found = json.loads((results / "rows.json").read_text())
    scores = json.loads((own / "metrics.json").read_text())
    for row in found[:2]:
        task = row["predictions"][0]["task"]
        assert scores[task]["string_match"] == round(100 * row["value"], 2)
    with (theirs / "predictions.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["question"], row["answer"], row["max_new_tokens"]) == ("ask", "['red']", "3")
    assert [*json.loads((theirs / "metrics.json").read_text())] == ["qa_fox"]


KVPRESS = Path(os.environ.get("MODELOPT_DMS_KVPRESS_VENV") or ROOT / ".venv-kvpress")


@pytest.mark.slow
@pytest.mark.skipif(
    not (KVPRESS / "evaluation/evaluate.py").exists(), reason="make .venv-kvpress/.ready"
)
def test_kvpress_own_evaluation_names_saves_and_scores_them_alike(
    results: Path, tmp_path: Path
) -> None:
    made = write_results(tmp_path, SETTING, PREDICTIONS)
    for place in (made, *(results / "out").iterdir()):
        press = place.name.split("__")[3]
        script = ROOT / "tests/helpers/kvpress_evaluation.py"
        command = [KVPRESS / "bin/python", script, KVPRESS / "evaluation", place, press]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
        found: Any = json.loads(done.stdout)
        assert found["name"] == place.name
        assert found["config"] == (place / "config.yaml").read_text()
        assert set(found["columns"]) == COLUMNS and found["same_rows"]
        assert found["metrics"] == (place / "metrics.json").read_text()


def test_what_cannot_be_meant_is_refused_before_a_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = {
        "--kvpress: tasks recall are not of RULER; accepted: needle,": ["--tasks", "recall", "--kvpress", "out"],
        "--kvpress-data ruler=x.jsonl: --kvpress is missing": ["--kvpress-data", "ruler=x.jsonl"],
        "--kvpress-data 'x.jsonl' must be NAME=FILE": ["--kvpress", "out", "--kvpress-data", "x.jsonl"],
        "x.jsonl does not exist": ["--kvpress", "out", "--kvpress-data", "ruler=x.jsonl"],
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for message, words in cases.items():
        assert run(monkeypatch, "eval", EMBEDDED, *words) == 1
        assert message in " ".join(capsys.readouterr().err.split())
    assert not [*tmp_path.iterdir()]
