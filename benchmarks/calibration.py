# SPDX-License-Identifier: Apache-2.0
"""What calibration gives without training, against zero-shot heuristics; and how many steps it saves a retrofit.

    python benchmarks/calibration.py --output benchmarks/results/calibration.json

Part one, the embedded model at 2048 tokens: gates calibrated once and set to one compression ratio after the other,
against a sliding window with 4 sinks and random eviction with as many resident tokens at the end, and against presses
of kvpress with as many at the end of the context (they keep all that follows). kvpress asks for an older transformers;
its package, unmodified, is used if it can be imported:

    pip install --no-deps kvpress "cachetools<6" fire termcolor peft

Part two: retrofits of so many steps from calibrated gates and from zero. Afterwards thresholds of all are moved to the
same compression ratio, as measured on the same held-out samples, and compared there.
"""

import argparse
import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from machine import machine
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.utils import logging as hf_logging

import modelopt_dms as dms
from modelopt_dms.calibration.measuring import HeldOut, trace_curve
from modelopt_dms.config.bundled import embedded_model_dir
from modelopt_dms.config.output_dir import write_json
from modelopt_dms.data.packing import Samples, pad
from modelopt_dms.evaluation import peers
from modelopt_dms.evaluation.measure import QUESTIONS, measure
from modelopt_dms.evaluation.names import TEXT
from modelopt_dms.evaluation.score import score_task
from modelopt_dms.evaluation.tasks import TASKS, make_episodes, training_documents
from modelopt_dms.gates.thresholds import store_curve

WINDOW = 48
SAMPLE_LENGTH = 1024
LENGTH = 2048
RATIOS = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
PRESSES = ("KnormPress", "SnapKVPress", "TOVAPress", "ExpectedAttentionPress", "KeyDiffPress")
TRAINING: dict[str, Any] = {
    "sequence_length": SAMPLE_LENGTH,
    "batch_size": 2,
    "learning_rate": 5e-3,
    "warmup_steps": 5,
    "kl_chunk_tokens": 4096,
}
# Zero-initialised gates follow a ramp; calibrated ones are at the ratio already, and learn more gently.
FROM_ZERO = {"ramp_fraction": 0.6}
FROM_CALIBRATED = {"ramp_fraction": 0.0, "learning_rate": 1e-3}


def calibrated(base: PreTrainedModel, documents: list[list[int]], target: float) -> Any:
    """A converted copy with calibrated gates, and what calibrating it took."""
    model = dms.apply_dms(copy.deepcopy(base), _facts(target)).eval()
    config = {"samples": 64, "sample_length": SAMPLE_LENGTH, "batch_size": 4}
    return model, dms.calibrate(model, config, data=documents, progress=False)


def _facts(target: float) -> dict[str, Any]:
    return {"window": WINDOW, "scale": 10.0, "target_cr": target}


def evaluate(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Accuracy over the tasks, perplexity, and what lived at the end."""
    scores = [measure(model, tokenizer, x, LENGTH, args.episodes, args.seed) for x in TASKS]
    text = measure(model, tokenizer, TEXT, LENGTH, args.episodes, args.seed)
    questions = sum(x.count for x in scores)
    parts = [*scores, text]
    return {
        "accuracy": sum(x.value * x.count for x in scores) / questions,
        "questions": questions,
        "perplexity": text.value,
        "compression_ratio": len(parts) / sum(1 / x.end.compression_ratio for x in parts),
        "resident_tokens": {
            x: s.end.resident_tokens for x, s in zip((*TASKS, TEXT), parts, strict=True)
        },
        "context_resident_tokens": {
            x: s.context.resident_tokens for x, s in zip((*TASKS, TEXT), parts, strict=True)
        },
    }


def heuristics(
    model: PreTrainedModel, base: PreTrainedModel, tokenizer: Any, ours: dict[str, Any], args: Any
) -> dict[str, dict[str, float]]:
    """Accuracy and perplexity of what was never fitted, task by task with the resident tokens that ours had."""
    found: dict[str, dict[str, float]] = {}

    def add(name: str, scored: dict[str, Any]) -> None:
        tasks = [scored[x] for x in TASKS]
        right = sum(x.value * x.count for x in tasks) / sum(x.count for x in tasks)
        found[name] = {"accuracy": right}
        if TEXT in scored:
            found[name]["perplexity"] = scored[TEXT].value

    live = ours["resident_tokens"]
    asked: tuple[str, ...] = (*TASKS, TEXT)
    add(
        "sliding_window",
        {
            x: measure(
                peers.sliding_window(model, live[x]), tokenizer, x, LENGTH, args.episodes, args.seed
            )
            for x in asked
        },
    )
    fraction = {x: peers.fraction_for_budget(live[x], LENGTH, WINDOW) for x in live}
    add(
        "random",
        {
            x: measure(
                peers.random_eviction(model, fraction[x], args.seed),
                tokenizer,
                x,
                LENGTH,
                args.episodes,
                args.seed,
            )
            for x in asked
        },
    )
    for name, press in presses():
        scored: dict[str, Any] = {}
        for task in TASKS:
            # What `measure` asks; perplexity is left out: a press acts at the end of a prompt only.
            episodes = make_episodes(task, tokenizer, LENGTH, args.episodes, args.seed, QUESTIONS)
            ratio = 1.0 - ours["context_resident_tokens"][task] / LENGTH
            pressed: Any = Pressed(base, press(compression_ratio=ratio))
            scored[task] = score_task(pressed, episodes, chunk=LENGTH)
        add(f"kvpress {name}", scored)
    return found


def presses() -> Iterator[tuple[str, Any]]:
    """Kvpress' classes by name, if it is there."""
    try:
        import kvpress
    except ImportError:
        return
    for name in PRESSES:
        yield name, getattr(kvpress, name)


class Pressed:
    """A plain model whose prompt, its first forward, is compressed by a press of kvpress."""

    def __init__(self, model: PreTrainedModel, press: Any) -> None:
        self.model, self.press, self.device = model, press, model.device
        self.seen = 0

    def __call__(self, input_ids: torch.Tensor, past_key_values: Any, **kwargs: Any) -> Any:
        """As the model's forward."""
        first = past_key_values is None
        cache = DynamicCache(config=self.model.config) if first else past_key_values
        self.seen = input_ids.shape[1] if first else self.seen + input_ids.shape[1]
        positions = torch.arange(self.seen - input_ids.shape[1], self.seen)[None]
        options = {"past_key_values": cache, "position_ids": positions, **kwargs}
        if not first:
            return self.model(input_ids=input_ids, **options)
        with _cache_positions(self.model, positions[0]), self.press(self.model):
            return self.model(input_ids=input_ids, **options)


@contextmanager
def _cache_positions(model: PreTrainedModel, positions: torch.Tensor) -> Iterator[None]:
    """Kvpress reads `cache_position`, which transformers no longer passes."""

    def add(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "cache_position": positions}

    layers: Any = model.get_decoder().layers
    handles = [x.self_attn.register_forward_pre_hook(add, with_kwargs=True) for x in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sweep(base: PreTrainedModel, tokenizer: Any, documents: Any, args: Any, console: Any) -> Any:
    """Part one: rows by compression ratio."""
    model, result = calibrated(base, documents, 4.0)
    console.print(f"calibrated on {result.tokens} tokens in {result.seconds:.0f} s")
    plain = {"ratio": 1.0, "calibrated": evaluate(peers.full_cache(model), tokenizer, args)}
    rows = [plain]
    for ratio in args.ratios:
        dms.set_compression(model, ratio, length=LENGTH)
        ours = evaluate(model, tokenizer, args)
        row = {"ratio": ratio, "calibrated": ours}
        row |= heuristics(model, base, tokenizer, ours, args)
        rows.append(row)
        shown = {k: round(100 * x["accuracy"], 1) for k, x in row.items() if isinstance(x, dict)}
        console.print(f"CR {ours['compression_ratio']:.2f}: {shown}")
    return {"seconds": result.seconds, "tokens": result.tokens, "rows": rows}


def retrofits(
    base: PreTrainedModel, tokenizer: Any, documents: Any, args: Any, console: Any
) -> list[dict[str, Any]]:
    """Part two: rows by start and steps, all set to one compression ratio."""
    texts = [x.ids for x in training_documents(tokenizer, 16, SAMPLE_LENGTH, args.seed + 1000)]
    held_out = pad([torch.tensor(x, dtype=torch.int32).numpy() for x in texts], SAMPLE_LENGTH)
    rows = []
    start, result = calibrated(base, documents, args.target)
    for begin, budgets in (("calibrated", args.calibrated_steps), ("zero", args.zero_steps)):
        for steps in budgets:
            seconds = 0.0
            if begin == "calibrated":
                model, seconds = copy.deepcopy(start), result.seconds
            else:
                model = dms.apply_dms(copy.deepcopy(base), _facts(args.target))
            if steps:
                how = FROM_CALIBRATED if begin == "calibrated" else FROM_ZERO
                options = {**TRAINING, **how, "steps": steps, "seed": args.seed}
                config = dms.RetrofitConfig(**options)
                seconds += dms.retrofit(model, config, data=documents, progress=False).seconds
            rows.append(
                {
                    "start": begin,
                    "steps": steps,
                    "seconds": seconds,
                    **at_ratio(model.eval(), held_out, tokenizer, args),
                }
            )
            console.print({k: x for k, x in rows[-1].items() if "live" not in k})
    return rows


def at_ratio(model: PreTrainedModel, held_out: Samples, tokenizer: Any, args: Any) -> Any:
    """A model's quality at the one compression ratio: KL on held-out samples, accuracy, perplexity."""
    ratios = [args.target * x for x in (0.5, 0.7, 0.85, 1.0, 1.2, 1.5)]
    curve = trace_curve(HeldOut(model, held_out, length=SAMPLE_LENGTH, batch_size=8), ratios)
    store_curve(model, curve)
    point = dms.set_compression(model, args.target, length=LENGTH)
    return {"kl": point.kl, **evaluate(model, tokenizer, args)}


def draw(found: dict[str, Any], path: Path, target: float) -> None:
    """A PNG: left accuracy over compression ratio, right KL over steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    rows = found["sweep"]["rows"]
    names = [k for k, x in rows[-1].items() if isinstance(x, dict)]
    for name in names:
        style = "o-" if name == "calibrated" else ".--"
        accuracy = [100 * x[name]["accuracy"] for x in rows if name in x]
        left.plot([x["ratio"] for x in rows if name in x], accuracy, style, label=name)
    left.set_xlabel(f"compression ratio at {LENGTH} tokens")
    left.set_ylabel("questions answered, %")
    left.set_title("without any training")
    for begin in ("calibrated", "zero"):
        points = [(x["steps"], x["kl"]) for x in found["retrofits"] if x["start"] == begin]
        right.plot(*zip(*points, strict=True), "o-", label=f"from {begin}")
    right.set_yscale("log")
    right.set_xlabel("steps of the retrofit")
    right.set_ylabel(f"KL from the full cache at CR {target:g}, nats a token")
    right.set_title("with a retrofit")
    for axes in (left, right):
        axes.legend(fontsize=8)
    figure.savefig(path, format="png", dpi=110)


def tables(found: dict[str, Any]) -> Sequence[Table]:
    """What a reader wants to see."""
    rows = found["sweep"]["rows"]
    names = [k for k, x in rows[-1].items() if isinstance(x, dict)]
    one = Table("CR", *names, title="accuracy % (perplexity) without training")
    for row in rows:
        cells = [
            f"{100 * row[x]['accuracy']:.1f}"
            + (f" ({row[x]['perplexity']:.2f})" if "perplexity" in row[x] else "")
            if x in row
            else ""
            for x in names
        ]
        one.add_row(f"{row['calibrated']['compression_ratio']:.2f}", *cells)
    two = Table(
        "start", "steps", "seconds", "CR", "KL", "accuracy", "perplexity", title="retrofits"
    )
    for row in found["retrofits"]:
        two.add_row(
            row["start"],
            str(row["steps"]),
            f"{row['seconds']:.0f}",
            f"{row['compression_ratio']:.2f}",
            f"{row['kl']:.4f}",
            f"{100 * row['accuracy']:.1f} %",
            f"{row['perplexity']:.2f}",
        )
    return one, two


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("out/calibration.json"))
    parser.add_argument("--ratios", type=float, nargs="+", default=RATIOS)
    parser.add_argument("--target", type=float, default=8.0, help="ratio that retrofits aim at")
    parser.add_argument("--calibrated-steps", type=int, nargs="*", default=[0, 20, 40, 80])
    parser.add_argument("--zero-steps", type=int, nargs="*", default=[30, 60, 120, 240])
    parser.add_argument("--documents", type=int, default=300)
    parser.add_argument("--episodes", type=int, default=8, help="per task")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    hf_logging.disable_progress_bar()
    console = Console(width=150)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_dir())
    base = AutoModelForCausalLM.from_pretrained(embedded_model_dir(), dtype=torch.float32).eval()
    made = training_documents(tokenizer, args.documents, SAMPLE_LENGTH, args.seed)
    documents = [x.ids for x in made]
    found = {
        "machine": machine(),
        "settings": {k: x for k, x in vars(args).items() if k != "output"},
        "sweep": sweep(base, tokenizer, documents, args, console),
        "retrofits": retrofits(base, tokenizer, documents, args, console),
    }
    write_json(args.output, found)
    draw(found, args.output.with_suffix(".png"), args.target)
    for table in tables(found):
        console.print(table)


if __name__ == "__main__":
    main()
