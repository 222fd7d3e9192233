# SPDX-License-Identifier: Apache-2.0
"""The command `plan`: table, figures, picture, and one line for every mistake, without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run


def test_plan_prints_a_table_and_writes_figures_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures, picture = tmp_path / "plan.json", tmp_path / "not" / "there" / "plan.svg"
    words = ("Qwen3-8B", "--gpu", "h200", "--context", "32k", "-r", "fp8_default-kv_fp8-dms_cr8")
    assert run(monkeypatch, "plan", *words, "--json", figures, "--picture", picture) == 0
    printed = capsys.readouterr().out
    assert "A model, not a measurement" in printed and "DMS 8x, FP8 *" in printed
    asked = "asks for 8 at 32,768 tokens, which evicts 88.9% of all but the 517 tokens"
    assert asked in printed
    found = json.loads(figures.read_text())
    assert found["kind"] == "model, not a measurement" and found["context"] == 32768
    assert {x["tp"] for x in found["rows"]} == {1, 2, 4, 8}
    fit = {x["variant"]: x["sequences"] for x in found["rows"] if x["tp"] == 1}
    assert fit["dense"] < fit["DMS 8x"] < fit["DMS 8x, FP8 *"] < fit["DMS 8x, NVFP4"]
    assert "not a measurement" in picture.read_text()


def test_plan_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, modelopt_dms.cli as cli\n"
        "try: cli.main()\n"
        "finally: print([x for x in ('torch', 'transformers', 'modelopt') if x in sys.modules])"
    )
    words = [sys.executable, "-c", code, "plan", "Qwen3-8B", "-r", "dms_cr8"]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    assert found.stdout.strip().splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["Qwen3-9B"], "did you mean 'Qwen3-8B'?"),
        (["Qwen3-8B", "--gpu", "h300"], "did you mean 'h200'?"),
        (["Qwen3-8B", "--context", "long"], "--context 'long' must be a number of tokens"),
        (["Qwen3-8B", "--context", "0"], "--context 0 must be 1 to"),
        (["Qwen3-8B", "--tp", "2,x"], "--tp '2,x' must be numbers of GPUs"),
        (["Qwen3-8B", "--tp", "0"], "--tp 0 must be numbers of 1 to"),
        (["Qwen3-8B", "--batch", "0"], "--batch 0 must be at least 1"),
        (["Qwen3-8B", "--memory-utilization", "1.5"], "--memory-utilization 1.5 must be"),
        (["Qwen3-8B", "-r", "dms_cr9"], "unknown recipe 'dms_cr9'"),
        (["Qwen3-8B", "--picture", "x.gif"], "must end in .svg or .png"),
        (["Qwen3-8B", "--tp", "3"], "--tp 3: Qwen3-8B has 32 query heads and 8 KV heads"),
        (["Qwen3-14B", "--tp", "1,16"], "--tp 16: Qwen3-14B has 40 query heads and 8 KV heads"),
        (["smollm2"], "smollm2 is not here yet; run: modelopt-dms fetch smollm2"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("MODELOPT_DMS_CACHE", str(tmp_path))
    assert run(monkeypatch, "plan", *words) == 1
    printed = capsys.readouterr().err
    assert message in printed.replace("\n", "") and len(printed.strip().splitlines()) == 1


def test_configs_that_cannot_be_planned_say_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.json"
    for text, message in (
        ("{", "cannot be read"),
        ("[]", "must hold a JSON object"),
        ('{"model_type": "deepseek_v3"}', "model_type='deepseek_v3' is not planned for"),
        ('{"model_type": "llama"}', "its config has no hidden_size"),
    ):
        config.write_text(text)
        assert run(monkeypatch, "plan", tmp_path) == 1
        assert message in capsys.readouterr().err.replace("\n", "")
