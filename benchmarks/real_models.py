# SPDX-License-Identifier: Apache-2.0
"""What a real model still knows at every compression ratio, by draw of its calibration text, beside kvpress' presses.

    modelopt-dms fetch smollm2
    make .venv-kvpress/.ready
    python benchmarks/real_models.py --output benchmarks/results/real_models.json
    python benchmarks/real_models.py --lengths 1024 --ratios 4 --draws 1 --tasks needle --output out/one_cell.json

Models are directories given by --models (a name NAME@DRAW makes several of them draws of one), or calibrated here: one
for each --draws and kind of --calibration text. Each is set to every ratio at every length and asked prompts of RULER's
families, whose haystack is not what it was calibrated on; fidelity is KL from the base model with its full cache, by
category of text. Every row has the ratio that the cache physically had on that very text.

Presses of kvpress get the same prompts and samples, and keep exactly as many tokens of each context as DMS held there,
before a question is known: the mean over the draws, or length / ratio where there is no draw. They evict nothing
afterwards, but for those named Decoding. Their KL is over the last tokens of a sample, `tail_kl`, which DMS has too.
AdaKV masks what it leaves out, and frees nothing (`frees` is false there). transformers' QuantizedCache evicts nothing
and has fewer bits: the ratio of its rows is that of the bits, `bytes_ratio` counts its scales too.

Every row is written when it is there; the same command goes on where it stopped. GGUF weights are dequantized: teacher
and peers are that model.
"""

import argparse
import json
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, machine, save, write
from real_summary import OTHERS_OF, draw, markdown
from real_texts import calibration_documents, categories, samples
from rich.console import Console
from transformers.utils import logging as hf_logging

import modelopt_dms as dms
from modelopt_dms.checkpoints.base import load_base
from modelopt_dms.evaluation.conversations import make_conversations
from modelopt_dms.evaluation.fidelity import compare, full_hidden, summarize
from modelopt_dms.evaluation.gsm_symbolic import make_gsm_symbolic
from modelopt_dms.evaluation.names import CHATS, GSM_SYMBOLIC, RULER_OPEN, check_tasks
from modelopt_dms.evaluation.prose import read_sentences
from modelopt_dms.evaluation.ruler import FAMILIES, make_prompts
from modelopt_dms.evaluation.ruler_open import OpenPrompt, make_open_prompts
from modelopt_dms.evaluation.score import score_open, score_task, stop_ids
from modelopt_dms.gates.curve import CompressionError

FIDELITY = "fidelity"
COUNTS = {"needle": 20, "multikey": 12, "multivalue": 12, "tracking": 12, FIDELITY: 3}
OTHERS = 8  # prompts of the families that are not asked by default
TAIL = 128
# What kvpress_peer.py knows.
PRESSES = ("KeyDiff", "SnapKV", "ExpectedAttention", "TOVA", "StreamingLLM", "Knorm")
QUANTIZED = "QuantizedCache"  # transformers' own: bits, not tokens
PEERS = (
    *PRESSES,
    "AdaKV(ExpectedAttention)",
    "Decoding(KeyDiff)",
    "Decoding(TOVA)",
    f"{QUANTIZED}(4)",
    f"{QUANTIZED}(2)",
)
WRITTEN = (*RULER_OPEN, GSM_SYMBOLIC)  # tasks whose answers are generated
KVPRESS_PYTHON = Path(__file__).parent.parent / ".venv-kvpress/bin/python"
FULL = "full cache"
# What a row is about; the rest of it was measured.
KEY = ("model", "text", "seed", "dtype", "length", "task", "count", "category", "method", "ratio")

Row = dict[str, Any]


class Rows:
    """The rows of a file: those of earlier runs, and each new one as soon as it is there."""

    def __init__(self, path: Path, settings: Row) -> None:
        self.path = path
        self.content: Row = (
            json.loads(path.read_text()) if path.exists() else {"runs": [], "rows": []}
        )
        self.content["machine"] = machine()
        self.content["runs"].append({"machine": machine(), "settings": settings})
        self.known = {_key(row) for row in self.rows}

    @property
    def rows(self) -> list[Row]:
        """All rows."""
        return self.content["rows"]

    def missing(self, keys: list[Row]) -> list[Row]:
        """Those that are not there yet."""
        return [key for key in keys if _key(key) not in self.known]

    def add(self, key: Row, found: Row) -> None:
        """Add a row and write all."""
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self.rows.append({**key, **found, "date": date, "run": len(self.content["runs"]) - 1})
        self.known.add(_key(key))
        write(self.path, self.content)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


class Study:
    """Prompts and samples of one dtype, and rows about them."""

    def __init__(self, args: argparse.Namespace, dtype: str, rows: Rows, console: Console) -> None:
        self.args, self.dtype, self.rows, self.console = args, dtype, rows, console
        plain, self.tokenizer = load_base(args.model, dtype=dtype)
        self.stop = stop_ids(plain, self.tokenizer)
        self.haystack = None if args.haystack is None else read_sentences(args.haystack)
        self.texts = categories(self.tokenizer, args.text, args.seed)
        self.prompts: dict[tuple[str, int], list[Any]] = {}
        self.samples: dict[tuple[str, int], list[list[int]]] = {}
        self.references: dict[tuple[str, int], list[torch.Tensor]] = {}

    def keys(self, method: str, length: int, ratio: float) -> list[Row]:
        """Of the rows that one setting of one method has."""
        common = {
            "model": Path(self.args.model).name,
            "text": "reference" if self.args.haystack is None else self.args.haystack.name,
            "seed": self.args.seed,
            "dtype": self.dtype,
            "length": length,
            "method": method,
            "ratio": ratio,
        }
        found = []
        for task in self.args.tasks:
            count = self.args.count or COUNTS.get(task, OTHERS)
            names = self.texts if task == FIDELITY else (None,)
            found += [{**common, "task": task, "count": count, "category": x} for x in names]
        return found

    def episodes(self, key: Row) -> list[Any]:
        """The prompts of a row: Episode, or OpenPrompt of the families whose answers are generated."""
        place = (key["task"], key["length"])
        if place not in self.prompts:
            task = key["task"]
            where = (task, self.tokenizer, key["length"], key["count"], self.args.seed)
            make: Any = make_prompts
            if task in RULER_OPEN:
                make = make_open_prompts
            elif task in CHATS:
                make = make_conversations
            # Problems have no haystack.
            self.prompts[place] = (
                make_gsm_symbolic(*where) if task == GSM_SYMBOLIC else make(*where, self.haystack)
            )
        return self.prompts[place]

    def sampled(self, key: Row) -> list[list[int]]:
        """The samples of a row."""
        place = (key["category"], key["length"])
        if place not in self.samples:
            text = self.texts[key["category"]]
            self.samples[place] = samples(
                self.tokenizer, text, key["length"], key["count"], self.args.seed
            )
        return self.samples[place]

    def reference(self, key: Row) -> list[torch.Tensor]:
        """Hidden states of the base model on the samples of a row: a retrofit may have changed every weight."""
        place = (key["category"], key["length"])
        if place not in self.references:
            base = dms.apply_dms(load_base(self.args.model, dtype=self.dtype)[0], {}).eval()
            for category in self.texts:
                other = {**key, "category": category}
                self.references[category, key["length"]] = [
                    full_hidden(base, ids) for ids in self.sampled(other)
                ]
        return self.references[place]

    def measure(self, model: Any, method: str, length: int, ratio: float) -> None:
        """The missing rows of a model that is set to a ratio."""
        for key in self.rows.missing(self.keys(method, length, ratio)):
            try:
                if ratio != 1.0:
                    dms.set_compression(model, ratio, length=length)
            except CompressionError as error:
                self.add(key, {"error": str(error)})
                continue
            measured = self.fidelity if key["task"] == FIDELITY else self.answers
            self.add(key, measured(model, key))

    def add(self, key: Row, found: Row) -> None:
        """A row, also for who watches."""
        self.rows.add(key, found)
        shown: Row = {
            x: found[x] for x in ("right", "asked", "kl", "tail_kl", "error") if x in found
        }
        if "compression_ratio" in found:
            shown["CR"] = round(found["compression_ratio"], 2)
        about = (key["dtype"], key["length"], key["ratio"], key["method"], key["task"])
        self.console.print(*about, key["category"] or "", shown)

    def answers(self, model: Any, key: Row) -> Row:
        """Answers to prompts, one by one: the presses need to know what was kept of each."""
        right = asked = 0
        kept, seen, lived = [], 0.0, 0.0
        for episode in self.episodes(key):
            if isinstance(episode, OpenPrompt):
                score, count = score_open(model, self.tokenizer, [episode]), len(episode.wanted)
            else:
                score = score_task(model, [episode], chunk=len(episode.context_ids))
                count = score.count
            right, asked = right + round(score.value * count), asked + count
            kept.append(score.context.resident_tokens)
            seen, lived = seen + score.end.context_tokens, lived + score.end.resident_tokens
        return {"right": right, "asked": asked, "compression_ratio": seen / lived, "kept": kept}

    def fidelity(self, model: Any, key: Row) -> Row:
        """Distance from the base model with its full cache."""
        texts = self.sampled(key)
        pairs = zip(texts, self.reference(key), strict=True)
        compared = [compare(model, ids, reference) for ids, reference in pairs]
        kl = torch.cat([x.kl[-TAIL:] for x in compared]).double()
        found = asdict(summarize(compared))
        found |= {"tail_kl": kl.mean().item(), "tail_kl_p99": kl.quantile(0.99).item()}
        found["tail_top1"] = torch.cat([x.same[-TAIL:] for x in compared]).double().mean().item()
        kept = [x.resident_tokens(len(ids) - TAIL) for x, ids in zip(compared, texts, strict=True)]
        return {**found, "tail": len(kl), "kept": kept}

    def peers(self, length: int) -> None:
        """The missing rows of all presses at a length, by a process of their own."""
        wanted: dict[tuple[Any, ...], list[Row]] = {}
        for name in self.args.presses:
            for ratio in self.ratios_of(name):
                for key in self.rows.missing(self.keys(label(name), length, ratio)):
                    # One that works while it writes is as without that where nothing is written.
                    if key["task"] in WRITTEN or not name.startswith("Decoding"):
                        wanted.setdefault((key["task"], key["category"]), []).append(key)
        if not wanted:
            return
        plain = self.args.work / f"plain-{Path(self.args.model).name}-{self.dtype}"
        if not (plain / "config.json").exists():
            load_base(self.args.model, dtype=self.dtype)[0].save_pretrained(plain)
        tasks = list(wanted.values())
        job = {"model": str(plain), "dtype": self.dtype, "tasks": [self._job(x) for x in tasks]}
        write(self.args.work / "job.json", job)
        command = [
            self.args.kvpress,
            Path(__file__).parent / "kvpress_peer.py",
            self.args.work / "job.json",
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                found = json.loads(line)
                task = tasks[found.pop("number")]
                if "written" in found:
                    found |= self._judged(task[0], found.pop("written"))
                name, ratio = found.pop("press"), found.pop("ratio")
                for key in task:
                    if (key["method"], key["ratio"]) == (label(name), ratio):
                        self.add(key, {**found, **self._held(key)})
                if name == "none":  # the same prompts on the full cache of the other transformers
                    key = {**task[0], "method": "kvpress, full cache", "ratio": 1.0}
                    if self.rows.missing([key]):
                        self.add(key, found)
        if process.returncode != 0:
            raise SystemExit(f"{command[1]} ended with {process.returncode}; its message is above")

    def ratios_of(self, name: str) -> list[float]:
        """Those that are asked of a method: of a quantized cache, the one that its bits have, scales not counted."""
        if not name.startswith(QUANTIZED):
            return [float(x) for x in self.args.ratios]
        bits = int(name.removeprefix(f"{QUANTIZED}(").rstrip(")"))
        return [8.0 * getattr(torch, self.dtype).itemsize / bits]

    def _held(self, key: Row) -> Row:
        """What a peer held of the contexts of a row: tokens, unless it holds all."""
        if key["method"].startswith("transformers"):
            return {}
        kept = self._kept(key)
        found: Row = {
            "kept": kept,
            "context_compression_ratio": sum(self._contexts(key)) / sum(kept),
        }
        return found | ({"frees": False} if "AdaKV" in key["method"] else {})

    def _judged(self, key: Row, written: list[list[int]]) -> Row:
        """How many of the wanted words stand in what a press let the model write, prompt by prompt."""
        right = asked = 0
        for prompt, ids in zip(self.episodes(key), written, strict=True):
            said = str(self.tokenizer.decode(ids, skip_special_tokens=True))
            right += round(prompt.share(said) * len(prompt.wanted))
            asked += len(prompt.wanted)
        return {"right": right, "asked": asked}

    def _job(self, keys: list[Row]) -> Row:
        """One task for the presses, with what each may keep of every context."""
        kept = {str(key["ratio"]): self._kept(key) for key in keys}
        prompts: list[Row] = []
        if keys[0]["task"] == FIDELITY:
            for ids in self.sampled(keys[0]):
                prompts.append({"context": ids[:-TAIL], "tail": ids[-TAIL:]})
        else:
            for x in self.episodes(keys[0]):
                if isinstance(x, OpenPrompt):
                    question = {"prompt": x.prompt_ids, "tokens": x.tokens, "stop": self.stop}
                    prompts.append({"context": x.context_ids, **question})
                    continue
                turns = [[q.prompt_ids, q.answer_ids] for q in x.questions]
                prompts.append({"context": x.context_ids, "turns": turns})
        for i, prompt in enumerate(prompts):
            prompt["kept"] = {ratio: counts[i] for ratio, counts in kept.items()}
        methods = [(key["method"].partition(" ")[2], key["ratio"]) for key in keys]
        return {"wanted": methods, "prompts": prompts}

    def _kept(self, key: Row) -> list[int]:
        """Tokens of each context that DMS kept, the mean over draws; without any, what the ratio says."""
        same = [x for x in KEY if x != "method"]
        found = [
            row["kept"]
            for row in self.rows.rows
            if "kept" in row
            and not row["method"].startswith(OTHERS_OF)
            and all(row[x] == key[x] for x in same)
        ]
        if found:
            return [round(sum(x) / len(x)) for x in zip(*found, strict=True)]
        return [round(x / key["ratio"]) for x in self._contexts(key)]

    def _contexts(self, key: Row) -> list[int]:
        """Tokens of each context of a row."""
        if key["task"] == FIDELITY:
            return [len(x) - TAIL for x in self.sampled(key)]
        return [len(x.context_ids) for x in self.episodes(key)]


def label(name: str) -> str:
    """What a peer is called in rows."""
    owner = "transformers" if name.startswith(QUANTIZED) else "kvpress"
    return f"{owner} {name}"


def methods(args: argparse.Namespace) -> Iterator[tuple[str, Path, tuple[str, int] | None]]:
    """Name, directory, and kind and seed of calibration text where the model is made here."""
    for path in args.models:
        yield path.name, path, None
    for kind in args.calibration:
        for draw_number in range(args.draws):
            name = f"{Path(args.recipe).stem}@{kind}-{draw_number}"
            yield name, args.work / Path(args.model).name / name, (kind, draw_number)


def make(args: argparse.Namespace, dtype: str, path: Path, drawn: tuple[str, int] | None) -> Any:
    """A DMS model: loaded, or calibrated if it is not there."""
    if drawn is None:
        return dms.load(path, dtype=dtype).eval()
    path = path.with_name(f"{path.name}-{dtype}")
    if (path / "config.json").exists():
        return dms.load(path, dtype=dtype).eval()
    model, tokenizer = load_base(args.model, dtype=dtype)
    # None is the mix that the package makes itself.
    mixed = drawn[0] == "mix"
    data = None if mixed else calibration_documents(*drawn, args.calibration_paths)
    overrides = [*args.set, f"calibrate.seed={drawn[1]}"]
    return dms.compress(
        model, args.recipe, tokenizer=tokenizer, data=data, overrides=overrides, output_dir=path
    )


def run(args: argparse.Namespace, rows: Rows, console: Console) -> None:
    """All rows that are missing."""
    for dtype in args.dtype:
        study = Study(args, dtype, rows, console)
        places = [(length, ratio) for length in args.lengths for ratio in args.ratios]
        if any(rows.missing(study.keys(FULL, length, 1.0)) for length in args.lengths):
            # Gates that evict nothing: accuracy of the full cache, and the floor that rounding puts under KL.
            plain = dms.apply_dms(load_base(args.model, dtype=dtype)[0], {"window": 64}).eval()
            for length in args.lengths:
                study.measure(plain, FULL, length, 1.0)
            del plain
        for name, path, drawn in methods(args):
            if any(rows.missing(study.keys(name, *place)) for place in places):
                model = make(args, dtype, path, drawn)
                for place in places:
                    study.measure(model, name, *place)
                del model
        if args.presses and not args.kvpress.exists():
            console.print(
                f"{args.kvpress.name} is not there: no presses (make .venv-kvpress/.ready)"
            )
        elif args.presses:
            for length in args.lengths:
                study.peers(length)


def named_path(text: str) -> tuple[str, Path]:
    """NAME=PATH."""
    name, _, path = text.partition("=")
    if not path or not Path(path).exists():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH of something that exists")
    return name, Path(path)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="name, directory or .gguf file")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--ratios", type=float, nargs="+", default=[2.0, 4.0, 8.0, 16.0])
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=[*FAMILIES, *RULER_OPEN, *CHATS, GSM_SYMBOLIC, FIDELITY],
        default=[*COUNTS],
    )
    parser.add_argument(
        "--count", type=int, help="prompts or samples of a task; 3 to 20 by default"
    )
    parser.add_argument("--seed", type=int, default=7, help="of prompts and samples")
    parser.add_argument(
        "--haystack", type=Path, help="text file or directory; else Python's reference"
    )
    parser.add_argument(
        "--text", type=named_path, nargs="*", default=[], metavar="NAME=PATH", help="categories"
    )
    parser.add_argument("--models", type=Path, nargs="*", default=[], help="DMS model directories")
    parser.add_argument("--recipe", default="calibrated_cr4-1k")
    parser.add_argument(
        "--draws", type=int, default=3, help="models to calibrate, of each kind of text"
    )
    parser.add_argument(
        "--calibration",
        nargs="*",
        default=["mix", "docstrings"],
        metavar="KIND",
        help="text to calibrate on: mix (built in), docstrings, code, NAME=PATH",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="recipe")
    parser.add_argument("--presses", nargs="*", default=list(PRESSES), choices=PEERS)
    parser.add_argument(
        "--kvpress", type=Path, default=KVPRESS_PYTHON, help="an interpreter that has it"
    )
    parser.add_argument("--work", type=Path, default=Path("out/real_models"))
    parser.add_argument("--output", type=Path, default=RESULTS / "real_models.json")
    args = parser.parse_args(argv)
    if GSM_SYMBOLIC in args.tasks:
        check_tasks([GSM_SYMBOLIC])  # that its package is there
    args.text = dict(args.text)
    args.calibration_paths = dict(named_path(x) for x in args.calibration if "=" in x)
    args.calibration = [x.partition("=")[0] for x in args.calibration]
    return args


def _shown(value: Any) -> Any:
    """A setting without the paths of a machine."""
    if isinstance(value, dict):
        return {name: _shown(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_shown(x) for x in value]
    return value.name if isinstance(value, Path) else value


def main(argv: list[str] | None = None) -> None:
    """Measure, save, print."""
    args = arguments(argv)
    hf_logging.disable_progress_bar()
    console = Console(width=160)
    settings = {name: _shown(x) for name, x in vars(args).items()}
    settings["model"] = Path(args.model).name
    rows = Rows(args.output, settings)
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        run(args, rows, console)
    finally:
        if rows.rows:
            save(args.output, rows.content, draw)
    print(markdown(rows.rows))


if __name__ == "__main__":
    main()
