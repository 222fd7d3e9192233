# SPDX-License-Identifier: Apache-2.0
"""What each choice of the method is worth on a real model, one change at a time, gates calibrated, three draws.

    modelopt-dms fetch smollm2
    python benchmarks/ablations.py --output benchmarks/results/ablations.json

Every variant is calibrated anew on each draw of the built-in mix, on fewer samples than the recipe takes so that three
draws of all variants take two hours, and read at several ratios: fidelity on prose, code and chats that calibration
does not read (real_texts.py), and needles where it can generate. As variants reach different ratios on the same text,
KL is also given at one ratio: log KL is interpolated linearly between the two measured ratios around it. A draw that is
hard for one variant is hard for all, so each is compared with the recipe draw by draw. Every row is written when it is
there; the same command goes on where it stopped.

`immediate` decides when a token leaves the window, from what is read then, instead of when it comes: the ablation of
section 5 of the paper, which a cache of this package cannot hold, so that it has no needles.
"""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import RESULTS, save, write
from real_models import Row, Rows, Study
from real_summary import wilson
from rich.console import Console
from torch import Tensor
from transformers.utils import logging as hf_logging

import modelopt_dms as dms
from modelopt_dms.checkpoints.base import load_base
from modelopt_dms.evaluation.fidelity import compare, summarize
from modelopt_dms.gates.gate import EvictionGate
from modelopt_dms.gates.thresholds import CompressionError

RECIPE = "calibrated_cr4-1k"
SMALLER = ["calibrate.samples=12", "calibrate.held_out=4", "calibrate.curve=[3, 4, 6]"]
# The ratio at which variants are compared, and the one whose needles are asked.
AT = 4.0
HIGHER = 6.0  # another, which not every variant reaches
TICKS = (0.02, 0.03, 0.05, 0.1, 0.2, 0.4)
IMMEDIATE = "immediate"
# Of so many draws: the 97.5 % point of Student's t distribution.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
VARIANTS: dict[str, list[str]] = {
    "recipe": [],
    IMMEDIATE: [],
    "window 1": ["dms.window=1"],
    "window 16": ["dms.window=16"],
    "window 128": ["dms.window=128"],
    "window 192": ["dms.window=192"],
    "gate residual": ["dms.gate=residual"],
    "decisions per layer": ["dms.granularity=layer"],
    "decision shift 1": ["dms.decision_shift=1"],
    "first tokens not protected": ["dms.protect_first=0"],
    "every head keeps as much": ["calibrate.budget=uniform"],
}


@contextmanager
def late_decisions(late: bool) -> Iterator[None]:
    """Gates read, for token t, what comes in at t + window: the decision is taken when it takes effect."""
    plain = EvictionGate.read

    def read(self: EvictionGate, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        hidden = plain(self, args, kwargs)
        gone = min(self.window, hidden.shape[1] - 1)
        # Of the last tokens nothing is decided that takes effect.
        return hidden.roll(-gone, dims=1)

    if late:
        EvictionGate.read = read  # type: ignore[method-assign]
    try:
        yield
    finally:
        EvictionGate.read = plain  # type: ignore[method-assign]


def key_of(study: Study, name: str, draw_number: int, task: str, ratio: float, count: int) -> Row:
    """What a row is about; a row of fidelity has all categories."""
    return {
        "model": Path(study.args.model).name,
        "text": "reference",
        "seed": study.args.seed,
        "dtype": study.dtype,
        "length": study.args.length,
        "task": task,
        "count": count,
        "category": None,
        "method": f"{name}@{draw_number}",
        "ratio": ratio,
    }


def distances(study: Study, model: Any, key: Row) -> Row:
    """Fidelity by category, and of all together."""
    found, every = {}, []
    for category in study.texts:
        own = {**key, "category": category}
        pairs = zip(study.sampled(own), study.reference(own), strict=True)
        compared = [compare(model, ids, reference) for ids, reference in pairs]
        one = summarize(compared)
        found[category] = {"kl": one.kl, "compression_ratio": one.compression_ratio}
        every += compared
    whole = summarize(every)
    shown = {"kl": whole.kl, "kl_p99": whole.kl_p99, "top1": whole.top1}
    return {**shown, "compression_ratio": whole.compression_ratio, "categories": found}


def measure(study: Study, name: str, draw_number: int) -> None:
    """The missing rows of a variant and a draw."""
    args = study.args
    keys = [
        key_of(study, name, draw_number, "fidelity", ratio, args.samples) for ratio in args.ratios
    ]
    if name != IMMEDIATE:
        keys.append(key_of(study, name, draw_number, "needle", AT, args.needles))
    if not study.rows.missing(keys):
        return
    overrides = [*SMALLER, *VARIANTS[name], *args.set, f"calibrate.seed={draw_number}"]
    base, tokenizer = load_base(args.model, dtype=study.dtype)
    with late_decisions(name == IMMEDIATE):
        try:
            model = dms.compress(base, RECIPE, tokenizer=tokenizer, data=None, overrides=overrides)
        except ValueError as error:  # a window that leaves nothing to evict at this length
            for key in study.rows.missing(keys):
                study.add(key, {"error": str(error)})
            return
        for key in study.rows.missing(keys):
            try:
                dms.set_compression(model, key["ratio"], length=args.length)
            except CompressionError as error:
                study.add(key, {"error": str(error)})
                continue
            measured = distances if key["task"] == "fidelity" else Study.answers
            study.add(key, measured(study, model, key))


def at_ratio(rows: list[Row], ratio: float) -> float | None:
    """KL at a ratio that was reached, between the two measured ones around it; None if there are not two."""
    points = sorted((x["compression_ratio"], x["kl"]) for x in rows if "kl" in x)
    for (low, kl_low), (high, kl_high) in zip(points, points[1:], strict=False):
        if low <= ratio <= high:
            part = (ratio - low) / (high - low)
            return math.exp((1 - part) * math.log(kl_low) + part * math.log(kl_high))
    return None


def factor(values: dict[str, float], base: dict[str, float]) -> Row:
    """What a change does to KL: its geometric mean over draws that both have, and its 95 % interval (Student's t)."""
    logs = [math.log(values[x] / base[x]) for x in values if x in base]
    if not logs:
        return {}
    mean = sum(logs) / len(logs)
    found: Row = {"factor": math.exp(mean)}
    if len(logs) in STUDENT:
        spread = math.sqrt(sum((x - mean) ** 2 for x in logs) / (len(logs) - 1))
        half = STUDENT[len(logs)] * spread / math.sqrt(len(logs))
        found["factor_interval"] = (math.exp(mean - half), math.exp(mean + half))
    return found


def summary(rows: list[Row], ratio: float = AT) -> list[Row]:
    """One line a variant: KL at the ratio over draws, what that is of the recipe's, and needles."""
    lines = []
    base: dict[str, float] = {}
    for name in VARIANTS:
        own = [x for x in rows if x["method"].partition("@")[0] == name]
        draws = sorted({x["method"].partition("@")[2] for x in own})
        of_draw = {y: [x for x in own if x["method"] == f"{name}@{y}"] for y in draws}
        found = {y: at_ratio(x, ratio) for y, x in of_draw.items()}
        known = {y: x for y, x in found.items() if x is not None}
        base = base or known  # the recipe comes first
        needles = [x for x in own if x["task"] == "needle" and "right" in x]
        line: Row = {"variant": name, "draws": len(draws)}
        line |= {f"kl_at_cr_{ratio:g}": [*known.values()], **factor(known, base)}
        if needles:
            right, asked = (sum(x[part] for x in needles) for part in ("right", "asked"))
            line["needles"] = [x["right"] for x in needles]
            line["needle_interval"] = wilson(right, asked)
            line["needle_ratios"] = [x["compression_ratio"] for x in needles]
        lines.append(line)
    return lines


def draw(figure: Any, content: Row) -> None:
    """KL at the ratio: every draw as a dot, and their geometric mean."""
    lines = [x for x in content["summary"] if x[f"kl_at_cr_{AT:g}"]]
    axes = figure.subplots()
    for place, line in enumerate(lines):
        values = line[f"kl_at_cr_{AT:g}"]
        axes.plot([min(values), max(values)], [place] * 2, "-", color="C0", linewidth=1)
        axes.plot(values, [place] * len(values), "o", color="C0", markersize=4)
        axes.plot(mean_of(line), place, "k|", markersize=16)
    axes.axvline(mean_of(lines[0]), color="0.6", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(lines)), [x["variant"] for x in lines])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{x:g}" for x in TICKS])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel(
        f"KL from the full cache at CR {AT:g}, nats per token; dots: draws; bars: means"
    )
    figure.set_size_inches(8, 4)


def mean_of(line: Row) -> float:
    """The geometric mean over draws."""
    values = line[f"kl_at_cr_{AT:g}"]
    return math.exp(sum(map(math.log, values)) / len(values))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="name, directory or .gguf file")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--ratios", type=float, nargs="+", default=[3.0, 4.0, 6.0])
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS], default=[*VARIANTS])
    parser.add_argument("--draws", type=int, default=3, help="calibrations of each variant")
    parser.add_argument("--samples", type=int, default=2, help="of each category of text")
    parser.add_argument("--needles", type=int, default=12)
    parser.add_argument("--seed", type=int, default=7, help="of prompts and samples")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="recipe")
    parser.add_argument("--output", type=Path, default=RESULTS / "ablations.json")
    args = parser.parse_args(argv)
    # What Study reads of real_models.py's command line.
    args.haystack, args.text = None, {}
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure, save, print."""
    args = arguments(argv)
    hf_logging.disable_progress_bar()
    console = Console(width=160)
    settings = {x: str(y) if isinstance(y, Path) else y for x, y in vars(args).items()}
    rows = Rows(args.output, settings | {"output": args.output.name})
    study = Study(args, args.dtype, rows, console)
    for draw_number in range(args.draws):
        for name in args.variants:
            measure(study, name, draw_number)
            rows.content["summary"] = summary(rows.rows)
            rows.content[f"summary_at_cr_{HIGHER:g}"] = summary(rows.rows, HIGHER)
            write(args.output, rows.content)
    save(args.output, rows.content, draw)
    for line in rows.content["summary"]:
        console.print(line)


if __name__ == "__main__":
    main()
