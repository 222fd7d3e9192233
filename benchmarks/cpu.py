# SPDX-License-Identifier: Apache-2.0
"""Decoding on a CPU: milliseconds a token and KV bytes, DMS cache against transformers' DynamicCache.

    python benchmarks/cpu.py --output benchmarks/results/cpu.json

Same weights, same process, steps taken in turns. Untrained gates cannot forget, so the converted
model forgets at random at the rate that gives the wanted compression ratio; the cost of a decode
step depends on how many slots live, not on which.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, machine, save
from models import build, llama_config
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.evaluation.peers import fraction_for_budget, random_eviction
from modelopt_dms.kvcache.hf_cache import kv_stats
from modelopt_dms.modeling.mode import apply_dms

# name: layers, hidden size, query heads, KV heads, head dim
SHAPES = {
    "llama 4 layers, GQA 16/4, D 64": (4, 1024, 16, 4, 64),
    "llama 4 layers, GQA 16/8, D 128": (4, 2048, 16, 8, 128),
}


def prefill(model: PreTrainedModel, ids: torch.Tensor) -> Cache:
    """The cache after all of `ids` [1, T]."""
    cache: Cache = DynamicCache(config=model.config)
    for part in ids.split(512, 1):
        model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def decode_in_turns(
    models: dict[str, PreTrainedModel], caches: dict[str, Cache], warmup: int, steps: int
) -> dict[str, list[float]]:
    """Milliseconds of each decode step of each model; one step of each in turn."""
    token = torch.tensor([[1]])
    times: dict[str, list[float]] = {name: [] for name in models}
    for step in range(warmup + steps):
        for name, model in models.items():
            begin = time.perf_counter()
            model(input_ids=token, past_key_values=caches[name], use_cache=True)
            if step >= warmup:
                times[name].append(1000 * (time.perf_counter() - begin))
    return times


def cache_numbers(cache: Cache) -> dict[str, float]:
    """Bytes, resident tokens and what the resident tokens alone would take."""
    try:
        stats = kv_stats(cache)
    except ValueError:
        layers: Sequence[Any] = cache.layers
        held = sum(x.keys.nbytes + x.values.nbytes for x in layers)
        tokens = cache.get_seq_length()
        return {"kv_bytes": held, "resident_tokens": tokens, "compression_ratio": 1.0, "slack": 1.0}
    live = sum(
        x.resident.sum().item() * x.dense_bytes / (x.context.sum().item() * x.resident.shape[1])
        for x in stats.layers
    )
    return {
        "kv_bytes": stats.kv_bytes,
        "resident_tokens": stats.resident_tokens,
        "compression_ratio": stats.compression_ratio,
        "slack": stats.kv_bytes / live,
    }


@torch.no_grad()
def bench(shape: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one model shape, for every number of threads and cache."""
    original = build(llama_config(*SHAPES[shape]))
    converted = apply_dms(copy.deepcopy(original), DMSConfig(window=args.window))
    models: dict[str, PreTrainedModel] = {"DynamicCache": original}
    for ratio in args.ratios:
        budget = args.tokens / ratio
        fraction = fraction_for_budget(budget, args.tokens, args.window)
        models[f"DMS, CR {ratio:g}"] = random_eviction(converted, fraction)
    ids = torch.randint(8192, (1, args.tokens), generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(max(args.threads))
    caches = {name: prefill(model, ids) for name, model in models.items()}
    rows = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        times = decode_in_turns(models, caches, args.warmup, args.steps)
        for name in models:
            rows.append(
                {
                    "shape": shape,
                    "threads": threads,
                    "cache": name,
                    "ms_per_token": statistics.median(times[name]),
                    "speedup": statistics.median(times["DynamicCache"])
                    / statistics.median(times[name]),
                    **cache_numbers(caches[name]),
                }
            )
    return rows


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """What a reader wants to see of the rows."""
    drawn = Table(title=title)
    drawn.add_column("model")
    for name in ("threads", "cache", "ms / token", "speedup", "KV MB", "CR", "bytes / live bytes"):
        drawn.add_column(name, justify="right")
    for row in rows:
        drawn.add_row(
            row["shape"],
            str(row["threads"]),
            row["cache"],
            f"{row['ms_per_token']:.2f}",
            f"{row['speedup']:.2f}x",
            f"{row['kv_bytes'] / 1e6:.2f}",
            f"{row['compression_ratio']:.2f}",
            f"{row['slack']:.3f}",
        )
    return drawn


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Milliseconds a token of every cache, one group of bars a shape and number of threads."""
    rows = content["rows"]
    groups = list(dict.fromkeys((row["shape"], row["threads"]) for row in rows))
    caches = list(dict.fromkeys(row["cache"] for row in rows))
    width = 0.8 / len(caches)
    axes = figure.subplots()
    for i, cache in enumerate(caches):
        mine = [row for row in rows if row["cache"] == cache]
        places = [groups.index((row["shape"], row["threads"])) + i * width for row in mine]
        bars = axes.bar(places, [row["ms_per_token"] for row in mine], width, label=cache)
        axes.bar_label(bars, [f"{row['speedup']:.2f}x" for row in mine], fontsize=8)
    names = [f"{shape}\n{threads} threads" for shape, threads in groups]
    middle = 0.4 - width / 2
    axes.set_xticks([i + middle for i in range(len(groups))], names, fontsize=8)
    axes.set_ylabel(f"ms a token at {content['settings']['tokens']} tokens")
    axes.legend(fontsize=8)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu.json")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens in the cache at the start")
    parser.add_argument("--ratios", type=float, nargs="+", default=[4, 8])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args(argv)
    rows = [row for shape in SHAPES for row in bench(shape, args)]
    where = machine()
    Console(width=130).print(
        table(rows, f"{args.tokens} context tokens, window {args.window}, float32")
    )
    settings = {"tokens": args.tokens, "window": args.window, "steps": args.steps}
    save(args.output, {"machine": where, "settings": settings, "rows": rows}, draw)


if __name__ == "__main__":
    main()
