# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness on a real model, full cache and DMS, from local rows; a run is killed and goes on.

    python benchmarks/lm_harness.py DIR --plain PLAIN --gsm8k rows.jsonl --hellaswag rows.jsonl

DIR is a DMS directory, PLAIN the model it was made from (directory or a name that `fetch` knows). Rows of GSM8K have
"question" and "answer" as in the data set, or "prompt" and "upstream_answer"; rows of HellaSwag "ctx_a", "ctx_b" and
"label", or "ctx" and "expected_index". Tasks are lm-eval's, with these rows in place of the hub's: scoring,
few-shot examples (the rows behind the first `--count`) and stop words are its own.

    hf          lm-eval's own command on the plain model, without this package
    full cache  our command, DIR at a compression ratio of 1
    DMS         our command, DIR at `--cr`; its answers are compared in length with those of the full cache

Each of our runs is killed (SIGKILL) when the first batch of answers is on disk, and started again. A run whose results
are in `--work` already is not repeated.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from machine import RESULTS, machine, write
from transformers import AutoTokenizer

from modelopt_dms.checkpoints.base import load_base
from modelopt_dms.evaluation.answer_lengths import AnswerLengths

FEW = 5  # examples in front of a question, as GSM8K's task of lm-eval has them
MOST = 20  # rows that examples are drawn from
DONE = "done.json"  # beside lm-eval's results, when they are complete
TASKS = ("gsm8k", "hellaswag")
Row = dict[str, Any]


def gsm8k_row(row: Row) -> Row:
    """A row as lm-eval's task reads it."""
    if "upstream_answer" in row:
        return {"question": row["prompt"], "answer": row["upstream_answer"]}
    return {"question": row["question"], "answer": row["answer"]}


def hellaswag_row(row: Row) -> Row:
    """A row as lm-eval's task reads it."""
    if "ctx_a" in row:
        return {x: row[x] for x in ("activity_label", "ctx_a", "ctx_b", "endings", "label")}
    about = {x: row[x] for x in ("activity_label", "endings")}
    return about | {"ctx_a": row["ctx"], "ctx_b": "", "label": row["expected_index"]}


def read(path: Path) -> list[Row]:
    """Rows of a file of JSON lines."""
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines() if x.strip()]


def write_tasks(folder: Path, args: argparse.Namespace) -> list[str]:
    """lm-eval's tasks with local rows; returns their names."""
    import lm_eval

    shipped = Path(lm_eval.__file__).parent / "tasks"
    names = []
    for task in TASKS:
        path = getattr(args, task)
        if path is None:
            continue
        rows = read(path)
        make = gsm8k_row if task == "gsm8k" else hellaswag_row
        count = args.count if task == "gsm8k" else args.scored
        parts = {"test": rows[:count], "train": rows[count : count + MOST]}
        for part, own in parts.items():
            text = "".join(json.dumps(make(x)) + "\n" for x in own)
            (folder / f"{task}-{part}.jsonl").write_text(text, encoding="utf-8")
        files = {part: str((folder / f"{task}-{part}.jsonl").resolve()) for part in parts}
        own_task: Row = {
            "include": str(shipped / task / f"{task}.yaml"),
            "task": f"{task}_rows",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder.resolve() / "cache")},
            "test_split": "test",
            "validation_split": None,
            "training_split": "train",
            "tag": None,
        }
        if task == "gsm8k":
            until = ["Question:", "</s>", "<|im_end|>"]
            how = {"until": until, "do_sample": False, "max_gen_toks": args.new_tokens}
            own_task |= {
                "generation_kwargs": how,
                "fewshot_split": "train",
                "num_fewshot": args.few,
            }
        (folder / f"{task}_rows.yaml").write_text(yaml.safe_dump(own_task, sort_keys=False))
        names.append(f"{task}_rows")
    return names


def words(args: argparse.Namespace, names: list[str], output: Path) -> list[str]:
    """What all runs have in common."""
    return [
        "--tasks", ",".join(names), "--include_path", str(args.work), "--batch_size", str(args.batch),
        "--device", "cpu", "--log_samples", "--output_path", str(output),
    ]  # fmt: skip


def run(command: list[str], log: Path, journal: Path | None, kill_at: int) -> Row:
    """A command, killed once as soon as its journal has so many answers, if it has one."""
    kills: list[int] = []
    while True:
        with log.open("a") as file:
            done = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
            while done.poll() is None:
                time.sleep(0.2)
                if journal is not None and not kills and answers_in(journal) >= kill_at:
                    os.killpg(done.pid, signal.SIGKILL)
                    done.wait()
        if done.returncode == 0:
            return {"answers_when_killed": kills}
        if kills or done.returncode != -signal.SIGKILL or journal is None:
            raise SystemExit(f"{' '.join(command)} failed; see {log}")
        kills.append(answers_in(journal))


def answers_in(journal: Path) -> int:
    """Lines behind the settings."""
    return max(0, journal.read_text().count("\n") - 1) if journal.exists() else 0


def results(output: Path) -> tuple[Row, dict[str, list[Any]]]:
    """Scores and our figures of the newest results, and what was answered by task."""
    newest = max(output.rglob("results_*.json"), key=lambda x: x.stat().st_mtime)
    found = json.loads(newest.read_text())
    scores = {
        task: {x: v for x, v in own.items() if isinstance(v, float) and "stderr" not in x}
        for task, own in found["results"].items()
    }
    answers: dict[str, list[Any]] = {}
    for task in scores:
        file = max(output.rglob(f"samples_{task}_*.jsonl"), key=lambda x: x.stat().st_mtime)
        rows = {x["doc_id"]: x["resps"] for x in read(file)}
        answers[task] = [rows[x] for x in sorted(rows)]
    return {"scores": scores, "cache": found["config"].get("modelopt_dms")}, answers


def compare(one: dict[str, list[Any]], other: dict[str, list[Any]]) -> Row:
    """How alike answers are: equal texts, and the largest distance of log-likelihoods."""
    found: Row = {}
    for task, ours in one.items():
        if isinstance(ours[0][0][0], str):
            same = sum(a == b for a, b in zip(ours, other[task], strict=True))
            found[task] = {"answers": len(ours), "equal_texts": same}
            continue
        pairs = [
            (float(a[0][0]), float(b[0][0]))
            for x, y in zip(ours, other[task], strict=True)
            for a, b in zip(x, y, strict=True)
        ]
        farthest = max(abs(a - b) for a, b in pairs)
        found[task] = {"answers": len(pairs), "largest_distance_nats": farthest}
    return found


def lengths(place: Path, full: list[str], evicting: list[str]) -> Row:
    """How much longer answers get, request by request; tokens as lm-eval's adapter counts them."""
    tokenizer = AutoTokenizer.from_pretrained(place)

    def count(texts: list[str]) -> list[int]:
        return [len(tokenizer(x, add_special_tokens=False)["input_ids"]) for x in texts]

    found = AnswerLengths()
    found.add(count(evicting), count(full))
    return found.row()


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="DMS directory")
    parser.add_argument("--plain", default="smollm2", help="the model that it was made from")
    parser.add_argument("--gsm8k", type=Path, help="rows, JSON lines")
    parser.add_argument("--hellaswag", type=Path, help="rows, JSON lines")
    parser.add_argument("--count", type=int, default=20, help="rows of GSM8K")
    parser.add_argument("--scored", type=int, default=20, help="rows of HellaSwag")
    parser.add_argument("--few", type=int, default=FEW, help="examples in front of a question")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--cr", type=float, default=4.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--work", type=Path, default=Path("out/lm_harness"))
    parser.add_argument("--output", type=Path, default=RESULTS / "lm_harness.json")
    args = parser.parse_args(argv)
    if args.gsm8k is None and args.hellaswag is None:
        parser.error("--gsm8k or --hellaswag must name a file")
    return args


def plain_directory(args: argparse.Namespace) -> Path:
    """The plain model as transformers reads it."""
    place = args.work / "plain"
    if not (place / "config.json").exists():
        model, tokenizer = load_base(args.plain, dtype=args.dtype)
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return place


def main(argv: list[str] | None = None) -> None:
    """Run, compare, save."""
    args = arguments(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    names = write_tasks(args.work, args)
    plain = f"pretrained={plain_directory(args)},dtype={args.dtype}"
    ours = [sys.executable, "-m", "modelopt_dms", "lm-eval", "run", "--model", "hf"]
    theirs = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", plain]
    given = f"pretrained={args.model},dtype={args.dtype}"
    runs = {
        "hf": (theirs, None),
        "full cache": ([*ours, "--model_args", f"{given},cr=1"], "full"),
        f"DMS, CR {args.cr:g}": ([*ours, "--model_args", f"{given},cr={args.cr:g}"], "dms"),
    }
    names_shown = ("count", "scored", "few", "new_tokens", "batch", "cr", "dtype")
    settings = {name: getattr(args, name) for name in names_shown} | {"model": args.model.name}
    found: Row = {"machine": machine(), "settings": settings, "runs": {}}
    answers: dict[str, dict[str, list[Any]]] = {}
    for name, (command, short) in runs.items():
        output = args.work / (short or "hf")
        journal = None if short is None else args.work / f"{short}.jsonl"
        last = [] if journal is None else [f"{command[-1]},resume={journal}"]
        whole = [*(command[:-1] + last if last else command), *words(args, names, output)]
        if not (output / DONE).exists():
            done = run(whole, args.work / f"{output.name}.log", journal, args.batch)
            write(output / DONE, done)
        done = json.loads((output / DONE).read_text())
        scores, answers[name] = results(output)
        found["runs"][name] = done | scores
        print(name, json.dumps(found["runs"][name]), flush=True)
    found["full cache against hf"] = compare(answers["full cache"], answers["hf"])
    print(json.dumps(found["full cache against hf"]))
    if args.gsm8k is not None:
        texts = [[x[0][0] for x in answers[name]["gsm8k_rows"]] for name in (*runs,)[1:]]
        found["lengths of answers"] = lengths(args.work / "plain", *texts)
    write(args.output, found)


if __name__ == "__main__":
    main()
