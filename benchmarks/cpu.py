# SPDX-License-Identifier: Apache-2.0
"""Prefill and decoding on a CPU: DMS cache, transformers' DynamicCache, and the model without a cache to read.

    python benchmarks/cpu.py --output benchmarks/results/cpu.json

Same weights, one process, steps taken in turns. Weights and gates are random; thresholds are set so that the gates,
which are computed like any others, mark the share of tokens that gives the wanted ratio: the cost of a step depends on
how many slots live, not on which. "floor" is a decode step with an empty cache: what is left of a step's time above it
is the cache's (attention, appending, gates). Sequences beyond --distinct repeat others.
"""

import argparse
import copy
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, machine, save
from models import build, llama_config
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.evaluation.peers import fraction_for_budget
from modelopt_dms.gates.gate import gates
from modelopt_dms.kvcache.hf_cache import kv_stats
from modelopt_dms.modeling.mode import apply_dms

DENSE = "DynamicCache"
# layers, hidden size, query heads, KV heads, head dim
SHAPE = (4, 1024, 16, 4, 64)
VOCABULARY = 8192


@torch.no_grad()
def forgetful(model: PreTrainedModel, share: float, window: int) -> PreTrainedModel:
    """A copy with random gates that mark this share of random tokens."""
    model = apply_dms(copy.deepcopy(model), DMSConfig(window=window))
    inputs: dict[int, Tensor] = {}
    for gate in gates(model):
        gate.weight.normal_()
        gate.register_forward_pre_hook(lambda gate, args: inputs.update({gate.layer_idx: args[1]}))
    model(input_ids=random_ids(1, 2048, 1), use_cache=False)
    for gate in gates(model):
        gate._forward_pre_hooks.clear()
        gate.threshold.copy_(gate.logits(inputs[gate.layer_idx])[0].quantile(1 - share, dim=-1))
    return model


def random_ids(batch: int, tokens: int, seed: int) -> Tensor:
    """Token ids [batch, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (batch, tokens), generator=generator)


def prefill(model: PreTrainedModel, ids: Tensor) -> Cache:
    """The cache after all of `ids` [B, T], read in chunks of 512."""
    cache: Cache = DynamicCache(config=model.config)
    for part in ids.split(512, 1):
        model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Other processes that compute meanwhile."""
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_compute, daemon=True) for _ in range(processes)]
    for other in others:
        other.start()
    time.sleep(5 if others else 0)  # until they have imported what they need
    try:
        yield
    finally:
        for other in others:
            other.kill()


def _compute() -> None:
    torch.set_num_threads(1)
    x = torch.randn(512, 512)
    while True:
        x = torch.tanh(x @ x)


def prefill_row(
    models: dict[str, PreTrainedModel], ids: Tensor, repeats: int
) -> tuple[dict[str, float], dict[str, Cache]]:
    """Milliseconds of a prefill of each model, the best of some after one that does not count; and its cache."""
    times: dict[str, list[float]] = {name: [] for name in models}
    caches: dict[str, Cache] = {}
    for turn in range(repeats + 1):
        for name, model in models.items():
            caches.pop(name, None)
            begin = time.perf_counter()
            caches[name] = prefill(model, ids)
            if turn:
                times[name].append(1000 * (time.perf_counter() - begin))
    return {name: min(found) for name, found in times.items()}, caches


def decode_row(
    models: dict[str, PreTrainedModel], caches: dict[str, Cache], batch: int, steps: int
) -> dict[str, float]:
    """Median milliseconds of a decode step of each model, and of one with an empty cache; steps in turns."""
    times: dict[str, list[float]] = {name: [] for name in (*models, "floor")}
    for step in range(steps + 3):
        token = random_ids(batch, 1, 1000 + step)
        for name in times:
            model = models[DENSE if name == "floor" else name]
            cache = DynamicCache(config=model.config) if name == "floor" else caches[name]
            begin = time.perf_counter()
            model(input_ids=token, past_key_values=cache, use_cache=True)
            if step >= 3:
                times[name].append(1000 * (time.perf_counter() - begin))
    return {name: statistics.median(found) for name, found in times.items()}


def cache_numbers(cache: Cache) -> dict[str, float]:
    """Bytes, resident tokens, and bytes over those of resident tokens."""
    try:
        stats = kv_stats(cache)
    except ValueError:
        layers: Sequence[Any] = cache.layers
        held = sum(x.keys.nbytes + x.values.nbytes for x in layers)
        tokens = cache.get_seq_length()
        return {"kv_bytes": held, "resident_tokens": tokens, "compression_ratio": 1.0, "slack": 1.0}
    return {
        "kv_bytes": stats.kv_bytes,
        "resident_tokens": stats.resident_tokens,
        "compression_ratio": stats.compression_ratio,
        "slack": stats.kv_bytes / stats.resident_bytes,
    }


@torch.no_grad()
def bench(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of every length, batch and cache."""
    original = build(llama_config(*SHAPE, VOCABULARY))
    for tokens in args.tokens:
        models: dict[str, PreTrainedModel] = {DENSE: original}
        for ratio in args.ratios:
            budget = max(tokens / ratio, args.window + 4)
            share = fraction_for_budget(budget, tokens, args.window)
            models[f"DMS, CR {ratio:g}"] = forgetful(original, share, args.window)
        for batch in args.batches:
            distinct = min(batch, max(1, args.distinct // tokens))
            ids = random_ids(distinct, tokens, 0)
            whole, caches = prefill_row(models, ids, args.repeats)
            if distinct < batch:
                for cache in caches.values():
                    cache.batch_select_indices(torch.arange(batch) % distinct)
            step = decode_row(models, caches, batch, args.steps)
            for name in models:
                above = step[name] - step["floor"]
                yield {
                    "tokens": tokens,
                    "batch": batch,
                    "cache": name,
                    "ms_per_step": step[name],
                    "floor_ms": step["floor"],
                    "step_speedup": step[DENSE] / step[name],
                    "cache_speedup": (step[DENSE] - step["floor"]) / above,
                    "prefill_sequences": distinct,
                    "prefill_ms": whole[name],
                    "prefill_speedup": whole[DENSE] / whole[name],
                    **cache_numbers(caches[name]),
                }


def table(rows: list[dict[str, Any]], title: str) -> Table:
    """What a reader wants to see of the rows."""
    drawn = Table(title=title)
    names = "tokens batch cache ms/step floor step cache-only prefill-ms prefill CR KV-MB slack"
    for name in names.split():
        drawn.add_column(name, justify="right")
    for row in rows:
        drawn.add_row(
            str(row["tokens"]),
            str(row["batch"]),
            row["cache"],
            f"{row['ms_per_step']:.1f}",
            f"{row['floor_ms']:.1f}",
            f"{row['step_speedup']:.2f}x",
            f"{row['cache_speedup']:.2f}x",
            f"{row['prefill_ms']:.0f}",
            f"{row['prefill_speedup']:.2f}x",
            f"{row['compression_ratio']:.2f}",
            f"{row['kv_bytes'] / 1e6:.1f}",
            f"{row['slack']:.3f}",
        )
    return drawn


def draw(figure: Any, content: dict[str, Any]) -> None:
    """How many times faster than DynamicCache a decode step is, over the length, a line a batch and ratio."""
    rows = [row for row in content["rows"] if row["cache"] != DENSE]
    axes = figure.subplots(1, 2)
    for plot, key in zip(axes, ("step_speedup", "prefill_speedup"), strict=True):
        for cache, batch in dict.fromkeys((row["cache"], row["batch"]) for row in rows):
            mine = [row for row in rows if (row["cache"], row["batch"]) == (cache, batch)]
            lengths, found = [row["tokens"] for row in mine], [row[key] for row in mine]
            plot.plot(lengths, found, marker="o", label=f"{cache}, batch {batch}")
        plot.axhline(1, color="black", linewidth=0.8)
        plot.set(
            xscale="log", xlabel="tokens", ylabel=f"{key.split('_')[0]}: times as fast as {DENSE}"
        )
    axes[0].legend(fontsize=8)


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu.json")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--ratios", type=float, nargs="+", default=[4, 8])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=1, help="of each prefill")
    parser.add_argument(
        "--distinct",
        type=int,
        default=4096,
        help="tokens of a prefill at most, if of several sequences",
    )
    parser.add_argument(
        "--busy", type=int, default=0, help="other processes that compute meanwhile"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    expected = len(args.tokens) * len(args.batches) * (1 + len(args.ratios))
    with busy(args.busy):
        rows = list(track(bench(args), "measuring", total=expected))
    where = machine()
    title = f"{args.threads} threads, window {args.window}, float32, {args.busy} busy processes"
    Console(width=130).print(table(rows, title))
    settings = {key: value for key, value in vars(args).items() if key != "output"}
    save(args.output, {"machine": where, "settings": settings, "rows": rows}, draw)


if __name__ == "__main__":
    main()
