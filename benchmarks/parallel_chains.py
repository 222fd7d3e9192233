# SPDX-License-Identifier: Apache-2.0
"""Accuracy against KV reads and peak KV bytes with parallel chains of thought: majority vote and pass@k.

    python benchmarks/parallel_chains.py DIR --output benchmarks/results/parallel_chains.json

DIR is a DMS directory; `chain_problems.py` has the tasks. A context is read once, then several chains of each question
are sampled from copies of its cache. KV reads are the tokens that a head reads from the cache, summed over the written
tokens of all chains; peak bytes are those of resident rows of all chains at their ends. The full cache is the same
weights without gates. Intervals are of a bootstrap over questions, 95 %.

Every question is on disk when it is answered; the same command goes on where it stopped.
"""

import argparse
import copy
import math
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from chain_problems import TASKS, Problem, make_problems
from machine import RESULTS, machine, save
from rich.console import Console
from transformers import AutoTokenizer

import modelopt_dms as dms
from modelopt_dms.evaluation.footprint import footprint
from modelopt_dms.evaluation.plain_twin import plain_twin
from modelopt_dms.evaluation.resume import RowStore
from modelopt_dms.evaluation.score import read_contexts, stop_ids
from modelopt_dms.gates.thresholds import set_compression
from modelopt_dms.kvcache.hf_cache import DMSLayer, cache_argument

FULL = "full cache"
RESAMPLED = 2000  # of the bootstrap
SCORES = ("majority", "pass_at")


@dataclass(frozen=True)
class Chains:
    """Sampled answers to one question.

    Attributes:
        said: the answer of each chain; "" if it gave none.
        texts: what each wrote.
        reads: tokens that a head read for each chain.
        bytes: of resident rows of each chain at its end.
        context: tokens of the context, and those of it that a head held.
    """

    said: list[str]
    texts: list[str]
    reads: list[float]
    bytes: list[float]
    context: tuple[float, float]


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, read: Any, problem: Problem, args: argparse.Namespace, seed: int
) -> Chains:
    """Chains of one question, from a cache that has read its context, and is not changed."""
    cache = copy.deepcopy(read)
    before = footprint(cache)
    chains = args.chains
    cache.batch_repeat_interleave(chains)
    fed = torch.tensor([problem.question] * chains)
    stop = stop_ids(model, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = [[] for _ in range(chains)]
    said, texts = [""] * chains, [""] * chains
    reads, kept = torch.zeros(2, chains, dtype=torch.float64)
    running = torch.ones(chains, dtype=torch.bool)
    for _ in range(problem.limit):
        given = cache_argument(type(model).forward, cache)
        logits = model(input_ids=fed, use_cache=True, logits_to_keep=1, **given).logits[:, -1]
        live = resident(cache, chains)
        reads += torch.where(running, live, 0.0)
        kept = torch.where(running, live, kept)
        fed = torch.multinomial(
            (logits.float() / args.temperature).softmax(-1), 1, generator=generator
        )
        for i, token in enumerate(fed[:, 0].tolist()):
            if not running[i]:
                continue
            ids[i].append(token)
            texts[i] = str(tokenizer.decode(ids[i]))
            final = problem.final(texts[i] + ("\n" if token in stop else ""))
            if final is not None:
                running[i], said[i] = False, final
        if not running.any():
            break
    total = (kept * _row_bytes(cache)).tolist()
    held = (before.context_tokens, before.resident_tokens)
    return Chains(said, texts, reads.tolist(), total, held)


def resident(cache: Any, chains: int) -> torch.Tensor:
    """Tokens that a head holds of each sequence, mean over layers and heads [B]."""
    if isinstance(cache.layers[0], DMSLayer):
        live = [x.slots.live.double().mean(1) for x in cache.layers]
        return torch.stack(live).mean(0)
    return torch.full((chains,), float(footprint(cache).resident_tokens), dtype=torch.float64)


def _row_bytes(cache: Any) -> float:
    """Bytes of one token in all layers and heads."""
    if isinstance(cache.layers[0], DMSLayer):
        return float(sum(x.slots.usage.row_bytes * x.slots.K for x in cache.layers))
    sizes = (
        x.keys.element_size() * x.keys.shape[1] * (x.keys.shape[3] + x.values.shape[3])
        for x in cache.layers
    )
    return float(sum(sizes))


def pass_at(right: int, n: int, k: int) -> float:
    """Chance that one of k chains is right, of n of which so many are (arXiv 2107.03374)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(said: list[str], right: str, k: int) -> float:
    """Share of the groups of k chains whose most frequent answer is right; ties go to the one said first."""
    groups = [said[i : i + k] for i in range(0, len(said) - k + 1, k)]
    won = [Counter(x for x in group if x).most_common(1) for group in groups]
    return sum(bool(x) and x[0][0] == right for x in won) / len(groups)


class Answering:
    """One cache at one setting; a context that follows itself is read once."""

    def __init__(self, model: Any, tokenizer: Any, args: argparse.Namespace) -> None:
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.context: Any = None
        self.cache: Any = None

    def row(self, problem: Problem, number: int) -> dict[str, Any]:
        """The row of one question: what its chains answered and cost."""
        if self.context is not problem.context:
            self.context = problem.context
            self.cache, _ = read_contexts(self.model, [problem.context])
        seed = self.args.seed + number
        x = sample(self.model, self.tokenizer, self.cache, problem, self.args, seed)
        return {
            "right": problem.right,
            "said": x.said,
            "reads": x.reads,
            "bytes": x.bytes,
            "context_tokens": x.context[0],
            "resident_tokens": x.context[1],
            "first_chain": x.texts[0],
        }


def curve(rows: list[dict[str, Any]], chains: int) -> list[dict[str, Any]]:
    """Accuracy and cost with 1, 2, 4, ... chains, over the questions of one cache."""
    points = []
    for k in (2**i for i in range(chains.bit_length())):
        hits = [sum(said == row["right"] for said in row["said"]) for row in rows]
        values = {
            "majority": [majority(row["said"], row["right"], k) for row in rows],
            "pass_at": [pass_at(n, chains, k) for n in hits],
        }
        point: dict[str, Any] = {"chains": k}
        for name, x in values.items():
            point |= {name: sum(x) / len(x), f"{name}_interval": interval(x)}
        for name, key in (("kv_reads", "reads"), ("peak_bytes", "bytes")):
            point[name] = k * sum(sum(row[key]) / chains for row in rows) / len(rows)
        points.append(point)
    return points


def interval(values: list[float]) -> tuple[float, float]:
    """Of a mean: the middle 95 % of means of resampled values."""
    rng = random.Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(RESAMPLED))
    return means[RESAMPLED // 40], means[-RESAMPLED // 40 - 1]


def summarize(rows: list[dict[str, Any]], chains: int) -> list[dict[str, Any]]:
    """A line for each task and cache: what it held of the contexts, how chains ended, and its curve."""
    found = []
    for task, name in dict.fromkeys((row["task"], row["category"]) for row in rows):
        own = [row for row in rows if (row["task"], row["category"]) == (task, name)]
        held = sum(row["resident_tokens"] for row in own)
        found.append(
            {
                "task": task,
                "cache": name,
                "questions": len(own),
                "context_ratio": sum(row["context_tokens"] for row in own) / held,
                "chains_with_an_answer": sum(bool(x) for row in own for x in row["said"])
                / (len(own) * chains),
                "curve": curve(own, chains),
            }
        )
    return found


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Majority vote and pass@k of the first task over KV reads and peak bytes, a line for each cache."""
    axes = figure.subplots(1, 4, sharey=True)
    settings = [(y, x) for y in SCORES for x in ("kv_reads", "peak_bytes")]
    labels = {
        "kv_reads": "KV reads, tokens",
        "peak_bytes": "peak KV bytes",
        "majority": "majority vote right, %",
        "pass_at": "pass@k, %",
    }
    for one, (y, x) in zip(axes, settings, strict=True):
        shown = [x for x in content["summary"] if x["task"] == content["summary"][0]["task"]]
        for line, marker in zip(shown, "os^Dv", strict=False):
            points = line["curve"]
            ys = [100 * p[y] for p in points]
            xs = [p[x] for p in points]
            low, high = zip(*(p[f"{y}_interval"] for p in points), strict=True)
            (drawn,) = one.plot(xs, ys, f"{marker}-", label=line["cache"])
            one.fill_between(
                xs, [100 * v for v in low], [100 * v for v in high], alpha=0.12, color=drawn.get_color()
            )  # fmt: skip
        one.set_xscale("log", base=2)
        one.set_xlabel(labels[x])
        one.set_title(labels[y], fontsize=9)
    axes[0].set_ylim(0, 102)
    axes[0].legend(fontsize=8)


def markdown(summary: list[dict[str, Any]]) -> str:
    """The figures as a table."""
    lines = ["| task | cache | chains | KV reads | peak KV MB | majority vote | pass@k |"]
    lines.append("|---|---|---|---|---|---|---|")
    for line in summary:
        for p in line["curve"]:
            scores = []
            for name in SCORES:
                low, high = p[f"{name}_interval"]
                scores.append(f"{100 * p[name]:.0f} % ({100 * low:.0f} to {100 * high:.0f})")
            cost = f"{p['kv_reads']:,.0f} | {p['peak_bytes'] / 1e6:.1f}"
            lines.append(
                f"| {line['task']} | {line['cache']} | {p['chains']} | {cost} | {' | '.join(scores)} |"
            )
    return "\n".join(lines)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="DMS directory")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["lookup", "sums"])
    parser.add_argument("--ratios", type=float, nargs="+", default=[4.0, 8.0])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--count", type=int, default=40, help="questions of a task")
    parser.add_argument("--chains", type=int, default=8, help="a power of two")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "parallel_chains.json")
    args = parser.parse_args(argv)
    if args.chains < 1 or args.chains & (args.chains - 1):
        parser.error(f"--chains {args.chains} must be a power of two")
    return args


def main(argv: list[str] | None = None) -> None:
    """Measure, save, print."""
    args = arguments(argv)
    names = ("length", "count", "chains", "temperature", "seed")
    settings = {name: getattr(args, name) for name in names} | {"model": args.model.name}
    store = RowStore(args.output, settings)
    model = dms.load(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows, console = [], Console()
    for ratio in (1.0, *args.ratios):
        name = FULL if ratio == 1.0 else f"DMS, CR {ratio:g}"
        if ratio != 1.0:
            set_compression(model, ratio, length=args.length)
        network = plain_twin(model) if ratio == 1.0 else model
        for task in args.tasks:
            key = {"task": task, "category": name, "length": args.length}
            asked = Answering(network, tokenizer, args)
            problems = make_problems(task, tokenizer, args.length, args.count, args.seed)
            for number, problem in enumerate(problems):
                where = (asked, problem, number)
                row = store.get({**key, "number": number}, lambda x=where: x[0].row(*x[1:]))  # type: ignore[misc]
                console.print(task, name, number, row["right"], row["said"])
                rows.append(row)
    summary = summarize(rows, args.chains)
    found = {"machine": machine(), "settings": settings, "summary": summary, "rows": rows}
    save(args.output, found, draw)
    assert store.partial is not None
    store.partial.unlink(missing_ok=True)
    print(markdown(summary))


if __name__ == "__main__":
    main()
