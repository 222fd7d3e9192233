# SPDX-License-Identifier: Apache-2.0
"""The command line from end to end on the embedded model, and one clear line for every mistake."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from modelopt_dms.config.bundled import embedded_model_dir, list_recipes
from modelopt_dms.training.trainer import RetrofitTrainer

FAST = ["retrofit.steps=2", "retrofit.batch_size=1"]
SET = [word for change in FAST for word in ("--set", change)]


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model after two steps, made by the command line."""
    target = tmp_path_factory.mktemp("cli") / "model"
    with pytest.MonkeyPatch.context() as patch:
        words = ("compress", "embedded", "--recipe", "tiny_cpu", "--output", target, *SET)
        assert run(patch, *words) == 0
    return target


def test_compress_writes_a_model_its_recipe_and_a_summary(compressed: Path) -> None:
    names = {x.name for x in compressed.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "dms_recipe.yaml"} <= names
    assert json.loads((compressed / "dms_summary.json").read_text())["retrofit"]["steps"] == 2
    assert not {x for x in names if x.startswith(".")}


def test_generate_continues_a_prompt_and_shows_the_cache(
    compressed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("generate", compressed, "--prompt", "def main(", "--max-new-tokens", 4, "--stats")
    assert run(monkeypatch, *words) == 0
    assert "resident on average" in capsys.readouterr().out


def test_eval_scores_tasks_and_files(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(__file__).read_text())
    rows_file = tmp_path / "rows.json"
    words = ("eval", compressed, "--data", text, "--tasks", "recall", "--lengths", "128")
    assert run(monkeypatch, *words, "--count", 2, "--json", rows_file) == 0
    rows = json.loads(rows_file.read_text())
    assert [(x["task"], x["metric"], x["length"]) for x in rows] == [
        ("data", "perplexity", 128),
        ("recall", "accuracy", 128),
    ]


def test_recipes_lists_all_and_shows_one_in_full(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "recipes") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in list_recipes())
    assert run(monkeypatch, "recipes", "show", "dms_cr8", "--set", "dms.window=77") == 0
    shown = capsys.readouterr().out
    assert "window: 77" in shown and "kl_direction: forward" in shown


def test_preview_counts_a_blend_and_shows_how_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("x = 1\n\x1b[31m" * 4000)
    (tmp_path / "b.txt").write_text("[bold]y\n" * 4000)
    data = ("--data", f"{tmp_path / 'a.txt'}:0.75", "--data", tmp_path / "b.txt")
    assert run(monkeypatch, "preview", *data, "--tokenizer", "embedded", "-r", "tiny_cpu") == 0
    printed = capsys.readouterr().out
    assert "120 steps x 4 samples x 512 tokens = 245,760 tokens" in printed
    assert " 75.0 %" in printed and " 25.0 %" in printed
    assert r"x = 1\n\x1b[31mx = 1" in printed and r"[bold]y\n" in printed
    assert "\x1b[31m" not in printed


def test_traces_of_the_embedded_model_are_data_for_compress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"text": "def main("}\n{"text": "x = "}\n')
    made = tmp_path / "traces.jsonl"
    words = ["traces", "embedded", "--prompts", tmp_path / "prompts.jsonl", "-o", made]
    assert run(monkeypatch, *words, "--count", 12, "--max-new-tokens", 40) == 0
    assert run(monkeypatch, *words) == 1
    assert "exists already" in capsys.readouterr().err
    changes = (*FAST, "retrofit.sequence_length=64", "dms.window=4")
    rest = [word for change in changes for word in ("--set", change)]
    target = tmp_path / "model"
    words = ["compress", "embedded", "-r", "tiny_cpu", "-o", target, "--data", made, *rest]
    assert run(monkeypatch, *words) == 0
    printed = capsys.readouterr().out
    assert "traces.jsonl" in printed and "2 steps x " in printed


def test_a_file_that_cannot_be_read_is_refused_before_anything_heavy_is_imported(
    tmp_path: Path,
) -> None:
    (tmp_path / "bad.jsonl").write_text("[" * 100_000)
    code = (
        "import sys, modelopt_dms.cli as cli\n"
        "try: cli.main()\n"
        "finally: print([x for x in ('torch', 'transformers', 'datasets') if x in sys.modules])"
    )
    words = ["compress", "embedded", "-o", "x", "--data", str(tmp_path / "bad.jsonl")]
    found = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert found.returncode == 1 and found.stdout.strip() == "[]"
    assert "bad.jsonl:1 is nested too deeply" in found.stderr.replace("\n", "")


def _mistakes(compressed: Path, place: Path) -> dict[str, tuple[list[object], str]]:
    (place / "empty.txt").touch()
    (place / "bad.jsonl").write_text('{"text": "x"}\n{oops\n')
    (place / "short.txt").write_text("too short")
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    (place / "sharegpt.jsonl").write_text(json.dumps({"conversations": turns}))
    (place / "full").mkdir()
    (place / "full" / "thesis.tex").touch()
    (place / "broken").mkdir()
    for file in compressed.glob("*.json"):
        shutil.copy(file, place / "broken")
    (place / "broken" / "model.safetensors").write_bytes(b"\xff" * 100)
    go: list[object] = ["compress", "embedded", "-r", "tiny_cpu", *SET, "-o"]
    new = place / "new"
    return {
        "unknown recipe": (["compress", "embedded", "-r", "tiny", "-o", new], "unknown recipe"),
        "unknown key": ([*go, new, "--set", "dms.windo=3"], "did you mean 'window'"),
        "window": ([*go, new, "--set", "dms.window=0"], "dms.window=0"),
        "ratio": ([*go, new, "--set", "dms.target_cr=0.9"], "dms.target_cr=0.9"),
        "unreachable": ([*go, new, "--set", "dms.window=400"], "cannot be reached"),
        "missing data": ([*go, new, "--data", place / "no.txt"], "does not exist"),
        "empty data": ([*go, new, "--data", place / "empty.txt"], "is empty"),
        "bad data": ([*go, new, "--data", place / "bad.jsonl"], "bad.jsonl:2 is not JSON"),
        "format": ([*go, new, "--data", place / "sharegpt.jsonl"], "--format sharegpt"),
        "other format": (
            [*go, new, "--data", place / "sharegpt.jsonl", "--format", "alpaca"],
            "sharegpt.jsonl:1 has columns conversations; format=alpaca expects instruction, output",
        ),
        "short data": ([*go, new, "--data", place / "short.txt"], "too short"),
        "occupied output": ([*go, place / "full"], "thesis.tex"),
        "finished output": ([*go, compressed], "already holds a model"),
        "file output": ([*go, place / "empty.txt"], "is a file"),
        "not a model": (["generate", place / "full", "-p", "x"], "has no config.json"),
        "corrupted weights": (["generate", place / "broken", "-p", "x"], "cannot be read"),
        "lengths": (["eval", compressed, "--lengths", "12"], "at least 64"),
        "weight": ([*go, new, "--data", "a.jsonl:-1"], "a.jsonl:-1 has weight -1"),
        "weighted file": ([*go, new, "--data", "no.jsonl:2"], "no.jsonl does not exist"),
        "nothing to preview": (["preview", "--tokenizer", "embedded"], "--data is missing"),
        "prompts": (["traces", "x", "--prompts", "no.txt", "-o", "t.jsonl"], "--prompts no.txt"),
        "traces": (
            ["traces", "x", "--prompts", place / "short.txt", "-o", new],
            "must be a .jsonl file",
        ),
        "task": (["eval", compressed, "--tasks", "recal"], "recal"),
    }


MISTAKES = [
    "unknown recipe",
    "unknown key",
    "window",
    "ratio",
    "unreachable",
    "missing data",
    "empty data",
    "bad data",
    "format",
    "other format",
    "short data",
    "occupied output",
    "finished output",
    "file output",
    "not a model",
    "corrupted weights",
    "lengths",
    "weight",
    "weighted file",
    "nothing to preview",
    "prompts",
    "traces",
    "task",
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(
    mistake: str,
    compressed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words, message = _mistakes(compressed, tmp_path)[mistake]
    before = sorted(compressed.rglob("*"))
    assert run(monkeypatch, *words) == 1
    printed = capsys.readouterr().err
    (line,) = [x for x in printed.splitlines() if x.startswith("error:")]
    assert message in line and "Traceback" not in printed
    assert not (tmp_path / "new").exists()
    assert sorted(compressed.rglob("*")) == before


def test_a_compressed_model_is_not_compressed_again(
    compressed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("x = 1\n" * 4000)
    words = ("compress", compressed, "-r", "tiny_cpu", "-o", tmp_path / "new", "--data", text)
    assert run(monkeypatch, *words) == 1
    assert "already has DMS gates" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_embedded_model_is_an_ordinary_small_checkpoint() -> None:
    directory = embedded_model_dir()
    assert sum(x.stat().st_size for x in directory.rglob("*")) <= 8 * 2**20
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert len(AutoTokenizer.from_pretrained(directory)) <= model.config.vocab_size


@pytest.mark.slow
def test_quantize_and_export_from_one_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """DMS and quantization on the embedded model, exported by the recipe and once more by hand; both generate."""
    changes = (*FAST, "retrofit.sequence_length=512", "dms.window=16", "quantize.samples=8")
    words = [word for change in changes for word in ("--set", change)]
    recipe = "nvfp4_default-kv_nvfp4-dms_cr8"
    made = tmp_path / "made"
    assert run(monkeypatch, "compress", "embedded", "-r", recipe, "-o", made, *words) == 0
    assert run(monkeypatch, "export", made, "--output", tmp_path / "again") == 0
    texts = set()
    for place in (made, made / "exported", tmp_path / "again"):
        capsys.readouterr()
        words = ["--prompt", "def main(", "--max-new-tokens", "4", "--stats"]
        assert run(monkeypatch, "generate", place, *words) == 0
        printed = capsys.readouterr().out
        assert "than keeping every token in bfloat16" in printed
        texts.add(printed)
    assert len(texts) == 1
    assert run(monkeypatch, "export", tmp_path / "again", "-o", tmp_path / "x", "--format", "gguf")
    assert "format='gguf'" in capsys.readouterr().err


def test_a_stock_recipe_of_modelopt_runs_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = "general/ptq/fp8_default-kv_fp8"
    words = ("compress", "embedded", "-r", stock, "-o", tmp_path / "q", "--set")
    assert run(monkeypatch, *words, "quantize.samples=4") == 0
    assert run(monkeypatch, "generate", tmp_path / "q", "-p", "x", "--max-new-tokens", 2) == 0


def test_a_model_that_is_not_quantized_is_exported_as_it_is(
    compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(monkeypatch, "export", compressed, "-o", tmp_path / "x") == 0
    weights = [(x / "model.safetensors").read_bytes() for x in (compressed, tmp_path / "x")]
    assert weights[0] == weights[1]


def test_the_schema_is_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "recipes", "schema") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "modelopt_dms recipe"


def test_an_interrupted_compress_goes_on_when_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["compress", "embedded", "-r", "tiny_cpu", "-o", tmp_path / "new", *SET]
    words += ["--set", "retrofit.save_steps=1"]
    real, calls = RetrofitTrainer.compute_loss, [0]

    def stop(self: RetrofitTrainer, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(RetrofitTrainer, "compute_loss", stop)
    assert run(monkeypatch, *words) == 130
    assert run(monkeypatch, *words) == 0
    assert calls[0] == 3, "the first step was not taken again"


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["calibration/sums.safetensors", "retrofit/checkpoint-2"])
def test_a_killed_compress_given_again_writes_the_same_model(tmp_path: Path, moment: str) -> None:
    changes = (
        "calibrate={samples: 8, sample_length: 256, batch_size: 1, save_steps: 1}",
        "retrofit={steps: 5, sequence_length: 256, batch_size: 1, save_steps: 1}",
    )
    command = [sys.executable, "-m", "modelopt_dms", "compress", "embedded", "-r", "tiny_cpu"]
    command += [word for change in changes for word in ("--set", change)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen([*command, "-o", str(killed)], stderr=subprocess.DEVNULL)
    while not (killed / moment).exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "config.json").exists(), "killed too late"
    for target in (killed, whole):
        subprocess.run([*command, "-o", str(target)], check=True, capture_output=True)
    for name in ("model.safetensors", "config.json", "dms_recipe.yaml"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def test_what_cannot_be_meant_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("not yours")
    for arguments, message in (
        (["eval", "embedded", "--json", str(mine)], "exists and holds no results"),
        (["generate", "embedded", "--prompt", "hi", "--cr", "2"], "carries no curve"),
        (["compress", "embedded", "-o", str(tmp_path / "o"), "--format", "alpaca"], "no --data"),
        (["generate", "embedded", "--prompt", "hi", "--device", "cuda"], "has no CUDA device"),
    ):
        if "cuda" in arguments and torch.cuda.is_available():
            continue
        assert run(monkeypatch, *arguments) != 0
        said = capsys.readouterr().err
        assert message in " ".join(said.split()) and "Traceback" not in said
    assert mine.read_text() == "not yours"
