# SPDX-License-Identifier: Apache-2.0
"""Accuracy against KV reads and peak KV bytes with parallel chains of thought: majority vote and pass@k.

    python benchmarks/parallel_chains.py DIR --output benchmarks/results/parallel_chains.json

DIR is a DMS directory whose tokenizer knows the words of our own tasks (a compressed `embedded` model): a question of
the task "arithmetic" is answered by adding up step by step, far behind the facts. A context is read once; then several
chains are sampled from its cache. KV reads are the tokens that a head reads from the cache, summed over the written
tokens of all chains; peak bytes are those of resident rows of all chains at their ends. The full cache is the same
weights without gates.

Every row is written when it is there; the same command goes on where it stopped.
"""

import argparse
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, machine, save
from rich.console import Console
from transformers import AutoTokenizer

import modelopt_dms as dms
from modelopt_dms.evaluation.plain_twin import plain_twin
from modelopt_dms.evaluation.resume import RowStore
from modelopt_dms.evaluation.score import footprint, read_contexts
from modelopt_dms.evaluation.tasks import Episode, make_episodes
from modelopt_dms.gates.thresholds import set_compression
from modelopt_dms.kvcache.hf_cache import DMSLayer, cache_argument

FULL = "full cache"


@dataclass(frozen=True)
class Chains:
    """Sampled answers to one question.

    Attributes:
        said: final words, one a chain; "" of a chain that did not end.
        reads: tokens that a head read for each chain.
        bytes: of resident rows of each chain at its end.
    """

    said: list[str]
    reads: list[float]
    bytes: list[float]


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, episode: Episode, chains: int, heat: float, seed: int
) -> Chains:
    """Chains of one question, from one reading of its context."""
    question = episode.questions[0]
    cache, _ = read_contexts(model, [episode])
    cache.batch_repeat_interleave(chains)
    fed = torch.tensor([question.prompt_ids] * chains)
    end = question.answer_ids[-1]  # a newline
    generator = torch.Generator().manual_seed(seed)
    words: list[list[int]] = [[] for _ in range(chains)]
    reads, ended = torch.zeros(chains, dtype=torch.float64), torch.zeros(chains, dtype=torch.bool)
    kept = torch.zeros(chains, dtype=torch.float64)
    for _ in range(len(question.answer_ids) + 4):
        given = cache_argument(type(model).forward, cache)
        logits = model(input_ids=fed, use_cache=True, logits_to_keep=1, **given).logits[:, -1]
        held = resident(cache, chains)
        reads += torch.where(ended, 0.0, held)
        kept = torch.where(ended, kept, held)
        token = torch.multinomial((logits.float() / heat).softmax(-1), 1, generator=generator)
        for i, x in enumerate(token[:, 0].tolist()):
            if not ended[i]:
                words[i].append(x)
        ended |= token[:, 0] == end
        if bool(ended.all()):
            break
        fed = token
    row = _row_bytes(cache)
    said = [tokenizer.decode(x).split()[-1:] for x in words]
    final = [x[0] if done and x else "" for x, done in zip(said, ended.tolist(), strict=True)]
    return Chains(final, reads.tolist(), (kept * row).tolist())


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


def measure(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, Any]:
    """What one cache does with every number of chains; the row of one setting."""
    prompts = make_episodes("arithmetic", tokenizer, args.length, args.count, args.seed, 1)
    found: dict[str, dict[str, float]] = {
        str(k): dict.fromkeys(("majority", "pass_at", "kv_reads", "peak_bytes"), 0.0)
        for k in (2**i for i in range(args.chains.bit_length()))
        if k <= args.chains
    }
    for number, episode in enumerate(prompts):
        x = sample(model, tokenizer, episode, args.chains, args.temperature, args.seed + number)
        right = str(tokenizer.decode(episode.questions[0].answer_ids)).split()[-1]
        hits = sum(said == right for said in x.said)
        for k, sums in found.items():
            n = int(k)
            sums["majority"] += majority(x.said, right, n) / args.count
            sums["pass_at"] += pass_at(hits, args.chains, n) / args.count
            sums["kv_reads"] += n * sum(x.reads) / args.chains / args.count
            sums["peak_bytes"] += n * sum(x.bytes) / args.chains / args.count
    return {"chains": found, "prompts": args.count}


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Majority vote and pass@k over KV reads, a line for each cache."""
    axes = figure.subplots(1, 3)
    settings = (("majority", "kv_reads"), ("majority", "peak_bytes"), ("pass_at", "kv_reads"))
    for one, (y, x) in zip(axes, settings, strict=True):
        for row in content["rows"]:
            points = list(row["chains"].values())
            ys = [100 * p[y] for p in points]
            one.plot([p[x] for p in points], ys, "o-", label=row["category"])
        one.set_xscale("log", base=2)
        one.set_xlabel({"kv_reads": "KV reads, tokens", "peak_bytes": "peak KV bytes"}[x])
        one.set_ylabel({"majority": "majority vote right, %", "pass_at": "pass@k, %"}[y])
    axes[0].legend(fontsize=8)


def main(argv: list[str] | None = None) -> None:
    """Measure, save."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path, help="DMS directory")
    parser.add_argument("--ratios", type=float, nargs="+", default=[2.0, 4.0, 8.0])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--count", type=int, default=24, help="questions")
    parser.add_argument("--chains", type=int, default=8, help="a power of two")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "parallel_chains.json")
    args = parser.parse_args(argv)
    names = ("length", "count", "chains", "temperature", "seed")
    settings = {name: getattr(args, name) for name in names} | {"model": args.model.name}
    store = RowStore(args.output, settings)
    model = dms.load(args.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows, console = [], Console()
    for ratio in (1.0, *args.ratios):
        name = FULL if ratio == 1.0 else f"DMS, CR {ratio:g}"
        key = {"task": "arithmetic", "category": name, "length": args.length}
        if ratio != 1.0:
            set_compression(model, ratio, length=args.length)
        network = plain_twin(model) if ratio == 1.0 else model
        rows.append(store.get(key, lambda network=network: measure(network, tokenizer, args)))  # type: ignore[misc]
        console.print(name, rows[-1]["chains"])
    save(args.output, {"machine": machine(), "settings": settings, "rows": rows}, draw)
    assert store.partial is not None
    store.partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
