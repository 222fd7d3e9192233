# SPDX-License-Identifier: Apache-2.0
"""The study of real models runs end to end on the embedded one, and goes on where it stopped."""

import importlib
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from transformers import LlamaConfig, LlamaForCausalLM

import modelopt_dms as dms
from modelopt_dms.checkpoints.base import load_base
from modelopt_dms.evaluation.prose import reference_sentences
from modelopt_dms.evaluation.tasks import held_out_text

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


def test_a_running_sum_is_worked_out_step_by_step(load: Any) -> None:
    sums = load("chain_problems")
    rng = random.Random(0)
    for _ in range(50):
        text, steps, total = sums.running_sum(rng)
        assert eval(text) == total >= 0
        lines = [x.split(" = ") for x in steps.removesuffix(".").split(". ")]
        assert len(lines) == sums.TERMS - 1
        assert all(eval(a) == int(b) for a, b in lines) and int(lines[-1][1]) == total
    assert sums.stated(" 7 + 5 = 12. The answer is 12.") is None
    assert sums.stated(" The answer is 12.\n") == "12" and sums.stated("12\n") == ""
    assert sums.number(" 482") is None and sums.number(" 48213.") == "48213"
    assert sums.number(" lost\n") == "" and sums.last_word(" + ant 2 = 5\n") == "5"


def test_chains_cost_more_reads_the_more_they_are_and_answers_count_by_question(load: Any) -> None:
    chains = load("parallel_chains")
    rows = [
        {"right": "6", "said": ["6", "6", "5", ""], "reads": [10, 20, 30, 40], "bytes": [1, 1, 1, 1]},
        {"right": "9", "said": ["8", "", "9", "7"], "reads": [10, 10, 10, 10], "bytes": [2, 2, 2, 2]},
    ]  # fmt: skip
    one, two, four = chains.curve(rows, 4)
    assert (one["chains"], two["chains"], four["chains"]) == (1, 2, 4)
    assert one["majority"] == one["pass_at"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    # Of the first question's pairs one is won; of the second's, "9" comes before "7".
    assert two["majority"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert two["pass_at"] == pytest.approx((1 - 1 / 6 + 1 / 2) / 2)
    assert four["pass_at"] == 1.0 and four["majority"] == 0.5
    assert one["kv_reads"] == 17.5 and four["kv_reads"] == 70 and two["peak_bytes"] == 3
    low, high = four["majority_interval"]
    assert (low, high) == (0.0, 1.0) and chains.interval([1.0, 1.0]) == (1.0, 1.0)


@pytest.mark.slow
def test_chains_are_sampled_from_both_caches_and_resumed(
    load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, tokenizer = load_base("embedded")
    model = dms.apply_dms(plain, {"window": 16, "target_cr": 2.0})
    how = {"samples": 2, "sample_length": 256, "batch_size": 2, "held_out": 1, "curve": [2, 4]}
    texts = held_out_text(tokenizer, 256, 3, 0)
    dms.calibrate(model, how, data=texts, progress=False)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    chains = load("parallel_chains")
    output = tmp_path / "chains.json"
    words = [str(tmp_path / "model"), "--tasks", "arithmetic", "--ratios", "2"]
    words += ["--length", "256", "--count", "2"]
    words += ["--chains", "2", "--output", str(output)]
    row, calls = chains.Answering.row, []

    def stopped(self: Any, problem: Any, number: int) -> Any:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(number)
        return row(self, problem, number)

    monkeypatch.setattr(chains.Answering, "row", stopped)
    with pytest.raises(KeyboardInterrupt):
        chains.main(words)
    monkeypatch.setattr(chains.Answering, "row", lambda *x: calls.append(x[2]) or row(*x))
    chains.main(words)
    assert calls == [0, 1, 0, 1]
    full, evicting = json.loads(output.read_text())["summary"]
    assert full["context_ratio"] == 1.0 and evicting["context_ratio"] > 1.2
    assert evicting["curve"][1]["kv_reads"] < full["curve"][1]["kv_reads"]
    assert evicting["curve"][1]["peak_bytes"] < full["curve"][1]["peak_bytes"]
    assert output.with_suffix(".png").stat().st_size > 10_000


def test_a_command_is_killed_once_when_its_journal_has_enough_answers(
    load: Any, tmp_path: Path
) -> None:
    harness = load("lm_harness")
    journal, log = tmp_path / "answers.jsonl", tmp_path / "log"
    code = (
        "import sys, time, pathlib\n"
        "p = pathlib.Path(sys.argv[1])\n"
        "n = p.read_text().count('\\n') if p.exists() else 0\n"
        "print('begins at', n, flush=True)\n"
        "for i in range(n, 5):\n"
        "    p.open('a').write(f'{i}\\n')\n"
        "    time.sleep(60 if i == 3 and n == 0 else 0)\n"
    )
    done = harness.run([sys.executable, "-c", code, str(journal)], log, journal, 3)
    assert done == {"answers_when_killed": [3]}
    assert log.read_text() == "begins at 0\nbegins at 4\n"
    assert journal.read_text() == "0\n1\n2\n3\n4\n"
    with pytest.raises(SystemExit, match="failed; see"):
        harness.run([sys.executable, "-c", "raise ValueError"], log, None, 3)


def test_answers_of_two_runs_are_compared_by_text_and_by_log_likelihood(load: Any) -> None:
    compare = load("lm_harness").compare
    one = {"a": [[["x"]], [["y"]]], "b": [[[["-1.5", "True"]], [["-2.0", "False"]]]]}
    other = {"a": [[["x"]], [["z"]]], "b": [[[["-1.5", "True"]], [["-2.25", "False"]]]]}
    assert compare(one, other) == {
        "a": {"answers": 2, "equal_texts": 1},
        "b": {"answers": 2, "largest_distance_nats": 0.25},
    }


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


def test_variants_are_compared_at_a_ratio_between_two_that_were_measured(load: Any) -> None:
    at_ratio = load("ablations").at_ratio
    rows = [{"compression_ratio": cr, "kl": kl} for cr, kl in ((6.0, 0.08), (3.0, 0.01))]
    assert at_ratio(rows, 4.5) == pytest.approx((0.08 * 0.01) ** 0.5)
    assert at_ratio(rows, 2.9) is None
    assert at_ratio([*rows, {"error": "out of reach"}], 3.0) == pytest.approx(0.01)


def test_a_change_is_judged_draw_by_draw(load: Any) -> None:
    study = load("ablations")
    base = {"0": 0.01, "1": 0.02, "2": 0.04}
    same = study.factor({x: 2 * y for x, y in base.items()}, base)
    assert same["factor"] == pytest.approx(2) and same["factor_interval"] == pytest.approx((2, 2))
    found = study.factor({"0": 0.01, "1": 0.08, "2": 0.08}, base)  # 1, 4 and 2 times
    half = 4.303 * math.log(2) / math.sqrt(3)
    assert found["factor"] == pytest.approx(2)
    assert found["factor_interval"] == pytest.approx((2 * math.exp(-half), 2 * math.exp(half)))
    assert study.factor({"0": 0.03}, base) == {"factor": pytest.approx(3)}
    assert study.factor({"7": 0.03}, base) == {}


def test_peers_hold_what_they_say(load: Any, tmp_path: Path) -> None:
    study = load("real_models")
    if not study.KVPRESS_PYTHON.exists():
        pytest.skip("make .venv-kvpress/.ready")
    sizes = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, eos_token_id=0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    context = torch.randint(1, 128, (200,)).tolist()
    asked = {"context": context, "kept": {"4.0": 50}}
    written = {**asked, "prompt": [3, 4, 5], "tokens": 40, "stop": []}
    names = ["KeyDiff", "AdaKV(ExpectedAttention)", "Decoding(KeyDiff)", "QuantizedCache(4)"]
    wanted = [[x, 4.0] for x in names]
    tasks = [
        {"wanted": wanted, "prompts": [written]},
        {"wanted": wanted, "prompts": [{**asked, "tail": context[:30]}]},
    ]
    job = tmp_path / "job.json"
    job.write_text(
        json.dumps({"model": str(tmp_path / "model"), "dtype": "float32", "tasks": tasks})
    )
    script = BENCHMARKS / "kvpress_peer.py"
    done = subprocess.run([study.KVPRESS_PYTHON, script, job], capture_output=True, check=True)
    rows = [json.loads(x) for x in done.stdout.splitlines()]
    found = {(row["number"], row["press"]): row for row in rows}
    assert len(rows) == len(found) == 2 * (1 + len(names))
    assert {len(row["written"][0]) for (number, _), row in found.items() if number == 0} == {40}
    sizes_found = {name: found[0, name]["bytes_ratio"] for name in names}
    # AdaKV masks; 4 bits of 32, and two scales of 32 bits to every 64 numbers.
    assert sizes_found == {
        "KeyDiff": 4.0,
        "AdaKV(ExpectedAttention)": 1.0,
        "Decoding(KeyDiff)": 4.0,
        "QuantizedCache(4)": pytest.approx(32 / (4 + 64 / 64)),
    }
    # It cuts again while it writes.
    assert (
        found[0, "Decoding(KeyDiff)"]["resident"]
        < 50 + 16
        < found[0, "KeyDiff"]["resident"]
        == 50 + 42
    )
    assert found[0, "AdaKV(ExpectedAttention)"]["resident"] == 50 + 42
    assert found[1, "none"]["tail_kl"] == 0.0
    distances = {name: found[1, name]["tail_kl"] for name in names}
    assert distances["Decoding(KeyDiff)"] == distances["KeyDiff"] > 1e-6
    assert 0 < distances["QuantizedCache(4)"] < distances["KeyDiff"]
    assert distances["AdaKV(ExpectedAttention)"] > 1e-6
