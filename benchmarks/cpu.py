# SPDX-License-Identifier: Apache-2.0
"""Decoding on a CPU: milliseconds a token and KV bytes, DMS cache against transformers' DynamicCache.

    python benchmarks/cpu.py --output benchmarks/results/cpu.json

Same weights, same process, steps taken in turns. Untrained gates cannot forget, so the converted
model forgets at random at the rate that gives the wanted compression ratio; the cost of a decode
step depends on how many slots live, not on which.
"""

import argparse
import copy
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from modelopt_dms.cache import kv_stats
from modelopt_dms.config import DMSConfig
from modelopt_dms.evaluation.peers import fraction_for_budget, random_eviction
from modelopt_dms.mode import apply_dms

# name: layers, hidden size, query heads, KV heads, head dim
SHAPES = {
    "llama 4 layers, GQA 16/4, D 64": (4, 1024, 16, 4, 64),
    "llama 4 layers, GQA 16/8, D 128": (4, 2048, 16, 8, 128),
}


def build(layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int) -> LlamaForCausalLM:
    """A model with random weights in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=32768,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config).eval()


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
    """Bytes, live tokens and what the live tokens alone would take."""
    try:
        stats = kv_stats(cache)
    except ValueError:
        layers: Sequence[Any] = cache.layers
        held = sum(x.keys.nbytes + x.values.nbytes for x in layers)
        tokens = cache.get_seq_length()
        return {"kv_bytes": held, "live_tokens": tokens, "compression_ratio": 1.0, "slack": 1.0}
    live = sum(
        x.live.sum().item() * x.dense_bytes / (x.logical.sum().item() * x.live.shape[1])
        for x in stats.layers
    )
    return {
        "kv_bytes": stats.kv_bytes,
        "live_tokens": stats.live_tokens,
        "compression_ratio": stats.compression_ratio,
        "slack": stats.kv_bytes / live,
    }


@torch.no_grad()
def bench(shape: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one model shape, for every number of threads and cache."""
    original = build(*SHAPES[shape])
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


def machine() -> dict[str, str]:
    """Where and when the numbers were measured."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    git = ("git", "-C", str(Path(__file__).parent))
    commit = subprocess.run((*git, "rev-parse", "--short", "HEAD"), capture_output=True, text=True)
    changed = subprocess.run((*git, "status", "--porcelain"), capture_output=True, text=True)
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": str(len(names)),
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "commit": commit.stdout.strip() + (" with changes" if changed.stdout.strip() else ""),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "nvidia-modelopt")},
    }


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


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results/cpu.json")
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
        table(rows, f"{args.tokens} logical tokens, window {args.window}, float32")
    )
    settings = {"tokens": args.tokens, "window": args.window, "steps": args.steps}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_suffix(".tmp")
    temporary.write_text(
        json.dumps({"machine": where, "settings": settings, "rows": rows}, indent=2) + "\n"
    )
    temporary.replace(args.output)


if __name__ == "__main__":
    main()
