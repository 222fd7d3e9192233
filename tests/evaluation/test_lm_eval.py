# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness scores a DMS model on its own cache, and what is said about that cache is true."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import run

lm_eval = pytest.importorskip("lm_eval", reason="pip install lm-eval==0.4.13")

from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import modelopt_dms as dms  # noqa: E402
from modelopt_dms.checkpoints.base import load_base  # noqa: E402
from modelopt_dms.config.output_dir import OutputError  # noqa: E402
from modelopt_dms.evaluation.answer_lengths import AnswerLengths  # noqa: E402
from modelopt_dms.evaluation.lm_eval import DMSLM  # noqa: E402
from modelopt_dms.gates.gate import gates  # noqa: E402
from modelopt_dms.kvcache.hf_cache import KVStats  # noqa: E402

TEXTS = [" ".join(f"w{i * 7 % 50} = {i}" for i in range(n)) for n in (12, 20, 31)]
CHOICES = ["yes", "none of them = 5"]
NEW_TOKENS = 5
WINDOW = 16


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with gates that evict, saved."""
    target = tmp_path_factory.mktemp("lm_eval") / "model"
    model, tokenizer = load_base("embedded")
    model = dms.apply_dms(
        model, {"window": WINDOW, "offset": 0.0, "scale": 10.0, "decision_shift": 1}
    )
    torch.manual_seed(0)
    for gate in gates(model):
        torch.nn.init.normal_(gate.weight, std=0.3)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task that generates and one that scores, over one local file."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": x, "answer": 0}) + "\n" for x in TEXTS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    measured = {"aggregation": "mean", "higher_is_better": True}
    generation = {"until": ["no such text"], "max_gen_toks": NEW_TOKENS, "do_sample": False}
    kinds: dict[str, dict[str, Any]] = {
        "local_generate": {
            "output_type": "generate_until",
            "doc_to_target": "w1",
            "generation_kwargs": generation,
            "metric_list": [{"metric": "exact_match", **measured}],
        },
        "local_choice": {
            "output_type": "multiple_choice",
            "doc_to_target": "{{answer}}",
            "doc_to_choice": CHOICES,
            "metric_list": [{"metric": "acc", **measured}],
        },
    }
    for name, own in kinds.items():
        text = yaml.safe_dump({"task": name, **common, **own})
        (folder / f"{name}.yaml").write_text(text)
    return folder


def answers(model: HFLM, tasks: Path) -> dict[str, Any]:
    """What a model answered to every request of both tasks."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names: list[Any] = ["local_generate", "local_choice"]
    found = lm_eval.simple_evaluate(
        model=model, tasks=names, task_manager=manager, bootstrap_iters=0
    )
    return {name: [x["resps"] for x in found["samples"][name]] for name in names}


def scores(found: dict[str, Any]) -> list[float]:
    """Log-likelihoods of all choices."""
    return [likelihood for resps in found["local_choice"] for [(likelihood, _)] in resps]


def caches(directory: Path, generate: bool) -> Iterator[KVStats]:
    """The reference: every sequence by itself, on a cache, without lm-eval."""
    model, tokenizer = dms.load(directory), load_base("embedded")[1]
    for text in TEXTS:
        if generate:
            ids = tokenizer(text, return_tensors="pt")
            limit = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
            model.generate(**ids, do_sample=False, **limit)
            yield dms.kv_stats(model)
            continue
        for choice in CHOICES:
            ids = tokenizer(f"{text} {choice}", return_tensors="pt")["input_ids"][:, :-1]
            with torch.no_grad():
                model(ids, use_cache=True)
            yield dms.kv_stats(model)


def check(row: dict[str, Any], expected: list[KVStats]) -> None:
    """Compare what was reported with the caches of the same sequences."""
    n = len(expected)
    kept = sum(x.dense_bytes / x.compression_ratio for x in expected)
    ratio = sum(x.dense_bytes for x in expected) / kept
    assert row["sequences"] == n
    assert row["compression_ratio"] == pytest.approx(ratio) and ratio > 1.2
    assert row["context_tokens"] == pytest.approx(sum(x.context_tokens for x in expected) / n)
    assert row["resident_tokens"] == pytest.approx(sum(x.resident_tokens for x in expected) / n)


@pytest.mark.slow
def test_the_command_scores_a_directory_and_reports_the_cache_that_it_was_scored_on(
    directory: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["run", "--model", "hf", "--model_args", f"pretrained={directory}", "--device", "cpu"]
    words += ["--tasks", "local_generate,local_choice", "--include_path", str(tasks)]
    assert run(monkeypatch, "lm-eval", *words, "--output_path", tmp_path) == 0
    [file] = tmp_path.glob("*/results*.json")
    found = json.loads(file.read_text())["config"]["modelopt_dms"]
    generated = list(caches(directory, generate=True))
    check(found["generate_until"], generated)
    assert found["generate_until"]["kv_bytes"] == sum(x.kv_bytes for x in generated) / 3
    check(found["loglikelihood"], list(caches(directory, generate=False)))
    assert found["loglikelihood"]["kv_bytes"] is None
    said = capsys.readouterr().out
    for kind, row in found.items():
        assert f"{directory}: {kind}: compression ratio {row['compression_ratio']:.2f}; " in said


def test_padding_of_a_batch_is_not_counted(directory: Path, tasks: Path) -> None:
    model = DMSLM(pretrained=str(directory), device="cpu", batch_size=3)
    answers(model, tasks)
    check(model.summary()["generate_until"], list(caches(directory, generate=True)))
    check(model.summary()["loglikelihood"], list(caches(directory, generate=False)))


def test_with_eviction_off_answers_are_those_of_the_plain_model_in_lm_evals_own_hf(
    directory: Path, tasks: Path
) -> None:
    plain, tokenizer = load_base("embedded")
    expected = answers(HFLM(pretrained=plain, tokenizer=tokenizer), tasks)
    model = dms.load(directory)
    with dms.eviction_off(model):
        kept = DMSLM(pretrained=model, tokenizer=tokenizer)
        found = answers(kept, tasks)
    assert found["local_generate"] == expected["local_generate"]
    assert scores(found) == pytest.approx(scores(expected), abs=1e-4)
    assert {x["compression_ratio"] for x in kept.summary().values()} == {1.0}
    evicting = DMSLM(pretrained=model, tokenizer=tokenizer)
    assert scores(answers(evicting, tasks)) != pytest.approx(scores(expected), abs=1e-2)


def test_lengths_of_answers_are_compared_request_by_request_with_the_full_cache(
    directory: Path, tasks: Path
) -> None:
    plain, tokenizer = load_base("embedded")
    full = answers(HFLM(pretrained=plain, tokenizer=tokenizer), tasks)["local_generate"]
    model = DMSLM(pretrained=str(directory), device="cpu", answer_lengths=True)
    found = answers(model, tasks)["local_generate"]
    # Counted as without it: the second run is not.
    check(model.summary()["generate_until"], list(caches(directory, generate=True)))

    def lengths(resps: list[Any]) -> list[int]:
        return [len(tokenizer(x, add_special_tokens=False)["input_ids"]) for [[x]] in resps]

    # lm-eval sorts requests by their length; samples stand in the order of the file.
    assert model.lengths is not None
    assert sorted(zip(model.lengths.evicting, model.lengths.full, strict=True)) == sorted(
        zip(lengths(found), lengths(full), strict=True)
    )
    assert model.summary()["generate_until"]["answer_lengths"]["requests"] == len(TEXTS)
    assert "times as long on average" in model.lines()[-1]
    with pytest.raises(ValueError, match="this model has no gates"):
        DMSLM(pretrained=plain, tokenizer=tokenizer, answer_lengths=True)


class Killed(Exception):
    """Takes the place of a kill."""


def test_a_run_that_was_killed_goes_on_behind_its_answers_and_counts_them(
    directory: Path,
    tasks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    where = {"pretrained": str(directory), "device": "cpu", "answer_lengths": True}
    whole = DMSLM(**where)
    expected = answers(whole, tasks)
    file = tmp_path / "answers.jsonl"
    run = DMSLM._model_generate
    calls = 0

    def killed(self: DMSLM, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:  # the second answer of the full cache: three evicting ones are there
            raise Killed
        return run(self, *args, **kwargs)

    monkeypatch.setattr(DMSLM, "_model_generate", killed)
    with pytest.raises(Killed):
        answers(DMSLM(**where, resume=str(file)), tasks)
    with file.open("a") as written:
        written.write('["generate_until", "of a line that was be')
    calls = 10
    with caplog.at_level("INFO"):
        resumed = DMSLM(**where, resume=str(file))
    assert "4 answers are there already" in caplog.text
    assert answers(resumed, tasks) == expected
    assert calls == 12  # the two that were left
    assert resumed.summary() == whole.summary()
    again = DMSLM(**where, resume=str(file))
    assert answers(again, tasks) == expected and calls == 12
    assert again.summary() == whole.summary()
    with pytest.raises(OutputError, match="is of a run with another answer_lengths"):
        DMSLM(pretrained=str(directory), device="cpu", resume=str(file))


def test_what_is_no_file_of_answers_is_not_written_to(directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(OutputError, match="holds no answers of ours"):
        DMSLM(pretrained=str(directory), device="cpu", resume=str(file))
    assert file.read_text() == "mine"
    with pytest.raises(OutputError, match="its folder does not exist"):
        DMSLM(pretrained=str(directory), device="cpu", resume=str(tmp_path / "no/answers.jsonl"))
    with pytest.raises(ValueError, match="resume needs a model by its name or directory"):
        DMSLM(pretrained=dms.load(directory), tokenizer=str(directory), resume=str(file))


def test_lm_evals_own_cache_of_answers_gets_those_of_the_evicting_model_only(
    directory: Path, tasks: Path
) -> None:
    kept: list[Any] = []

    class Hook:
        def add_partial(self, kind: str, request: Any, answer: Any) -> None:
            kept.append(answer)

    model = DMSLM(pretrained=str(directory), device="cpu", answer_lengths=True)
    model.set_cache_hook(Hook())
    found = answers(model, tasks)["local_generate"]
    assert sorted(x for x in kept if isinstance(x, str)) == sorted(x for [[x]] in found)


def test_longer_answers_are_counted_by_request() -> None:
    lengths = AnswerLengths()
    lengths.add([10, 15, 30, 0, 8, 10, 10, 10, 10, 10], [10, 10, 10, 4, 8, 10, 10, 10, 10, 10])
    row = lengths.row()
    assert row["mean_tokens"] == 11.3 and row["mean_tokens_full"] == 9.2
    assert row["ratio_mean"] == pytest.approx((1 + 1.5 + 3 + 0.25 + 6) / 10)
    assert (row["ratio_p90"], row["share_much_longer"]) == (1.5, 0.2)
    with pytest.raises(ValueError, match="cannot be compared"):
        lengths.add([1], [])


def test_a_generation_past_our_cache_is_refused(directory: Path, tasks: Path) -> None:
    model = DMSLM(pretrained=str(directory), device="cpu")
    plain, _ = load_base("embedded")
    model._model.generate = plain.generate
    with pytest.raises(RuntimeError, match=r"layers \[0, 1, 2, 3\] generated on a cache that"):
        answers(model, tasks)


@pytest.mark.parametrize("cr", ["much", True])
def test_a_ratio_that_is_no_number_is_refused(directory: Path, cr: Any) -> None:
    with pytest.raises(ValueError, match=f"cr={cr!r} must be a number"):
        DMSLM(pretrained=str(directory), device="cpu", cr=cr)


def test_help_and_mistakes_are_lm_evals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "lm-eval", "run", "--help") == 0
    assert "--model_args" in capsys.readouterr().out
    assert run(monkeypatch, "lm-eval", "--help") == 0
    assert "Language Model Evaluation Harness" in capsys.readouterr().out
    assert run(monkeypatch, "lm-eval", "run", "--no_such_option") == 2


def test_without_lm_eval_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("modelopt_dms.cli.harness.find_spec", lambda name: None)
    assert run(monkeypatch, "lm-eval", "run") == 1
    assert "pip install lm-eval==0.4.13" in capsys.readouterr().err


@pytest.mark.slow  # a process that imports torch and lm_eval
def test_lm_eval_without_our_package_refuses_and_says_what_to_import(
    directory: Path, tasks: Path
) -> None:
    words = ["--model", "hf", "--model_args", f"pretrained={directory}", "--tasks", "local_choice"]
    words += ["--include_path", str(tasks), "--device", "cpu"]
    command = [sys.executable, "-m", "lm_eval", "run", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode != 0
    assert "import modelopt_dms first" in done.stderr
