# SPDX-License-Identifier: Apache-2.0
"""Decoding of whole models: tokens a second and memory over context and batch; dense, DMS, and the limit of both.

    python benchmarks/end_to_end.py --shape qwen3-8b --output benchmarks/results/end_to_end.json
    python benchmarks/end_to_end.py --quick --output end_to_end.json    # rehearsal on a CPU

Shapes of real models, random weights, one process. "generate" is transformers' own loop with its static cache, which it
compiles on CUDA; "dms" is `custom_generate=dms.graphed` with a `DMSCache`. CR 1 is our loop and kernels without
eviction: the stronger dense baseline, so that a speed-up tells what eviction gives. The limit is what a memory copy
would take for the weights and the live KV rows. Contexts are filled with random rows; gates are random, with thresholds
that give the wanted ratio. --peer runs NVIDIA's experimental/dms, see peer.py.
"""

import argparse
import copy
import gc
import json
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from fill import fill_dms, fill_static, force_ratio
from machine import RESULTS, machine, save, write
from models import build
from rich.console import Console
from rich.table import Table
from timing import copy_bandwidth
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config, StaticCache

import modelopt_dms as dms
from modelopt_dms.kernels.layout import PAGE, OutOfPagesError

Row = dict[str, Any]
WINDOW = 256
# Left free on the device: activations, logits, graphs, tables.
RESERVE = 5 << 30
# What a CPU pretends to have free.
REHEARSED_BYTES = 400_000
FP8_KV = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": (4, 3)}},
    ],
    "algorithm": "max",
}


def qwen3_8b() -> PreTrainedConfig:
    """Qwen/Qwen3-8B."""
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
    )


def llama31_8b() -> PreTrainedConfig:
    """meta-llama/Llama-3.1-8B; its scaled rotary frequencies change no shape."""
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        tie_word_embeddings=False,
    )


def tiny() -> PreTrainedConfig:
    """For the rehearsal."""
    return Qwen3Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )


SHAPES = {"qwen3-8b": qwen3_8b, "llama-3.1-8b": llama31_8b, "tiny": tiny}


@dataclass(frozen=True)
class Point:
    """One measurement; batch 0 is the largest that fits."""

    impl: str
    context: int
    batch: int
    cr: float = 1.0
    format: str = "bf16"


# What matters most comes first: a time limit may end the rest.
FULL = {
    "qwen3-8b": (
        Point("generate", 32768, 16),
        Point("dms", 32768, 16, 8),
        Point("dms", 32768, 26, 8),
        Point("dms", 32768, 0, 8),
        Point("dms", 32768, 16),
        Point("dms", 32768, 26),
        Point("dms", 32768, 0),
        Point("dms", 32768, 64, 8),
        Point("dms", 32768, 128, 8),
        Point("dms", 16384, 16, 8),
        Point("dms", 8192, 16, 8),
        Point("dms", 16384, 16),
        Point("dms", 8192, 16),
        Point("dms", 32768, 16, 8, "fp8"),
        Point("dms", 32768, 26, 8, "fp8"),
        Point("dms", 32768, 0, 8, "fp8"),
        Point("generate", 32768, 0),
        Point("generate", 8192, 16),
        Point("generate", 16384, 16),
    ),
    "llama-3.1-8b": (
        Point("generate", 32768, 16),
        Point("dms", 32768, 16, 8),
        Point("dms", 32768, 16),
        Point("dms", 32768, 0, 8),
        Point("dms", 32768, 16, 8, "fp8"),
        Point("dms", 32768, 0, 8, "fp8"),
    ),
}
QUICK = (
    Point("generate", 96, 2),
    Point("dms", 96, 2, 4),
    Point("dms", 96, 2),
    Point("dms", 96, 0, 4),
    Point("dms", 96, 2, 4, "fp8"),
)


@dataclass
class Bench:
    """One model, which is converted and then quantized as the points go on: dense ones come before, in any order.

    Attributes:
        config: shape of the model.
        device: where it lies.
        dtype: of its weights.
        window: delay window.
        copy: bytes a second that a copy moves.
        new: tokens that the two runs generate whose difference is timed.
    """

    config: PreTrainedConfig
    device: torch.device
    dtype: torch.dtype
    window: int
    copy: float
    new: tuple[int, int]

    @property
    def room(self) -> int:
        """Tokens that all runs of a point generate, and a little more."""
        return 3 * sum(self.new)

    def model(self, point: Point) -> PreTrainedModel:
        """The model that a point needs; the same weights always (one seed)."""
        model = build(copy.deepcopy(self.config), str(self.device), self.dtype)
        model.generation_config.update(do_sample=False, eos_token_id=None, pad_token_id=0)
        if point.impl == "dms":
            model = dms.apply_dms(model, {"window": self.window})
        if point.format == "fp8":
            ids = torch.randint(self.config.vocab_size, (1, 64))
            model = dms.quantize(model, FP8_KV, [ids])
        return model

    @property
    def row_bytes(self) -> int:
        """Bytes of a token's keys and values in all layers, in the model's dtype."""
        c = self.config
        return 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * self.dtype.itemsize

    def limit_ms(self, model: PreTrainedModel, batch: int, kv_bytes: float) -> float:
        """Milliseconds a copy takes for all weights that a step reads, and this many bytes of KV rows."""
        embedding: Any = model.get_input_embeddings()
        read = sum(p.nbytes for p in model.parameters()) - embedding.weight.nbytes
        return 1e3 * (read + kv_bytes) / self.copy


def run(bench: Bench, points: tuple[Point, ...]) -> Iterator[Row]:
    """Rows of all points. A model is made anew where the next point needs another kind of it."""
    kind, model = None, None
    for point in points:
        if kind != (point.impl, point.format):
            model = None
            _free(bench.device)
            kind, model = (point.impl, point.format), bench.model(point)
        assert model is not None
        try:
            yield _fitting(bench, model, point) if not point.batch else measure(bench, model, point)
        except Exception as error:
            traceback.print_exc()
            yield {**asdict(point), "error": f"{type(error).__name__}: {error}".splitlines()[0]}


def _fitting(bench: Bench, model: PreTrainedModel, point: Point) -> Row:
    """The row of the largest batch: computed from free memory, and taken back a little where it did not fit."""
    batch = largest_batch(bench, point)
    for _ in range(3):
        try:
            row = measure(bench, model, Point(**{**asdict(point), "batch": batch}))
            return {**row, "largest": True}
        except (torch.OutOfMemoryError, OutOfPagesError):
            batch = int(0.95 * batch)
    raise RuntimeError(f"not even {batch} sequences fit")


def largest_batch(bench: Bench, point: Point) -> int:
    """Sequences whose KV rows fit in what is free."""
    _free(bench.device)
    free = REHEARSED_BYTES
    if bench.device.type == "cuda":
        free = torch.cuda.mem_get_info()[0] - RESERVE
    return int(free // sequence_bytes(bench, point))


def sequence_bytes(bench: Bench, point: Point) -> float:
    """Bytes of one sequence's KV rows at the end of the run; those of a static cache, or of pages."""
    length = point.context + bench.room
    if point.impl == "generate":
        return length * bench.row_bytes
    width = 1 if point.format == "fp8" else bench.dtype.itemsize
    # Random eviction: lists of a cache differ by a few slots, and each has half a page to spare.
    live = 1.01 * point.context / point.cr + bench.room + PAGE / 2
    return min(live, length + PAGE) * bench.row_bytes * width / bench.dtype.itemsize


@torch.no_grad()
def measure(bench: Bench, model: PreTrainedModel, point: Point) -> Row:
    """Milliseconds a step, tokens a second, memory, and the limit."""
    _free(bench.device)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    B, T = point.batch, point.context
    length = T + 1 + bench.room
    few, many = bench.new
    begin = time.perf_counter()
    options: dict[str, Any] = {}
    if point.impl == "generate":
        cache: Any = StaticCache(config=model.config, max_cache_len=length)
        fill_static(cache, model, B, T)
        live, kv_bytes = float(T), float(B * T * bench.row_bytes)
    else:
        share = force_ratio(model, point.cr, T)
        room = int(B * sequence_bytes(bench, point))
        cache = dms.DMSCache(model, batch_size=B, max_length=length, max_cache_bytes=room)
        fill_dms(cache, model, B, T, share)
        # Dense generate compiles itself on CUDA; so do we.
        options |= {"custom_generate": dms.graphed, "compile": bench.device.type == "cuda"}
        stats = dms.kv_stats(cache)
        live = stats.resident_tokens
        kv_bytes = stats.dense_bytes * live / T
    filled = time.perf_counter()
    ids = torch.randint(model.config.vocab_size, (B, T + 1), device=bench.device)
    ids = _warm_up(bench, model, ids, cache, few, options)
    warm = time.perf_counter()
    ids, short = _generate(bench, model, ids, cache, few, options)
    ids, long = _generate(bench, model, ids, cache, many, options)
    ms = 1e3 * (long - short) / (many - few)
    limit = bench.limit_ms(model, B, kv_bytes)
    return {
        **asdict(point),
        "ms_per_step": ms,
        "tokens_per_s": 1e3 * B / ms,
        "resident_tokens": live,
        "kv_bytes": kv_bytes,
        "peak_bytes": torch.cuda.max_memory_allocated() if bench.device.type == "cuda" else None,
        "limit_ms": limit,
        "fraction_of_limit": limit / ms,
        "compiled": options.get("compile", bench.device.type == "cuda"),
        "fill_s": filled - begin,
        "warmup_s": warm - filled,
    }


def _warm_up(
    bench: Bench, model: PreTrainedModel, ids: Tensor, cache: Any, tokens: int, options: Any
) -> Tensor:
    """Compile and capture; where the compiler fails on ours, the row says so and is measured without it."""
    try:
        return _generate(bench, model, ids, cache, tokens, options)[0]
    except (torch.OutOfMemoryError, OutOfPagesError):
        raise
    except Exception as error:
        if not options.get("compile"):
            raise
        print(f"not compiled: {str(error).splitlines()[0]}")
        options["compile"] = False
        return _generate(bench, model, ids, cache, tokens, options)[0]


def _generate(
    bench: Bench, model: PreTrainedModel, ids: Tensor, cache: Any, tokens: int, options: Any
) -> tuple[Tensor, float]:
    """Prompts continued by so many tokens, and seconds; the cache holds all of them but the last."""
    arguments: Any = {"past_key_values": cache, "max_new_tokens": tokens, **options}
    begin = time.perf_counter()
    out: Any = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    return out, time.perf_counter() - begin


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def compare(rows: list[Row]) -> list[Row]:
    """Every DMS row with eviction beside the dense ones: the same batch, and the batch that memory allows.

    "dense" is the faster of transformers' generate and our loop at CR 1. The limit's speed-up is that of copying what
    each must read.
    """
    done = [r for r in rows if "ms_per_step" in r]
    found = []
    for row in (r for r in done if r["impl"] == "dms" and r["cr"] > 1):
        dense = [r for r in done if r["cr"] == 1 and r["context"] == row["context"]]
        same = [r for r in dense if r["batch"] == row["batch"]]
        entry = {k: row[k] for k in ("context", "batch", "cr", "format")}
        if same:
            best = min(same, key=lambda r: r["ms_per_step"])
            entry |= {
                "dense": best["impl"],
                "speedup": best["ms_per_step"] / row["ms_per_step"],
                "limit_speedup": best["limit_ms"] / row["limit_ms"],
            }
            entry["fraction_of_limit"] = entry["speedup"] / entry["limit_speedup"]
        for impl in ("generate", "dms"):
            most = [r["tokens_per_s"] for r in dense if r["impl"] == impl]
            if row.get("largest") and most:
                name = "generate" if impl == "generate" else "our loop at CR 1"
                entry[f"throughput over {name}"] = row["tokens_per_s"] / max(most)
        found.append(entry)
    return found


def peer_row(checkout: Path, shape: str, points: tuple[Point, ...]) -> Row:
    """What peer.py printed, or why it did not run; in a process of its own, since it needs another transformers."""
    first = next(p for p in points if p.cr > 1)
    script = Path(__file__).with_name("peer.py")
    asked = [str(checkout), shape, str(first.context), str(first.batch), str(first.cr)]
    done = subprocess.run([sys.executable, str(script), *asked], capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {"impl": "peer", "error": lines[-1]}
    row: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return row


def rows_of(
    bench: Bench, points: tuple[Point, ...], checkout: Path | None, shape: str
) -> Iterator[Row]:
    """Ours, and the peer's last: it may fail, and takes long."""
    yield from run(bench, points)
    if checkout is not None:
        _free(bench.device)
        yield peer_row(checkout, shape, points)


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Left: tokens a second over batch, with the limit. Right: milliseconds a step over context at one batch."""
    left, right = figure.subplots(1, 2)
    rows = [r for r in content["rows"] if "ms_per_step" in r and "limit_ms" in r]
    kinds = list(dict.fromkeys((r["impl"], r["format"], r["cr"]) for r in rows))
    longest = max((r["context"] for r in rows), default=0)
    for color, kind in enumerate(kinds):
        mine = [r for r in rows if (r["impl"], r["format"], r["cr"]) == kind]
        name = f"{kind[0]}, {kind[1]}, CR {kind[2]:g}"
        by_batch = sorted((r for r in mine if r["context"] == longest), key=lambda r: r["batch"])
        batches = [r["batch"] for r in by_batch]
        style = {"color": f"C{color}", "ms": 4, "lw": 1}
        left.plot(batches, [r["tokens_per_s"] for r in by_batch], "o-", label=name, **style)
        limits = [1e3 * r["batch"] / r["limit_ms"] for r in by_batch]
        left.plot(batches, limits, ":", **style)
        batch = rows[0]["batch"]
        by_context = sorted((r for r in mine if r["batch"] == batch), key=lambda r: r["context"])
        contexts = [r["context"] for r in by_context]
        right.plot(contexts, [r["ms_per_step"] for r in by_context], "o-", label=name, **style)
        right.set_title(f"batch {batch}", fontsize=9)
    left.set_title(f"{longest} tokens of context; dotted: the limit", fontsize=9)
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xlabel("batch")
    left.set_ylabel("tokens/s")
    right.set_xlabel("context")
    right.set_ylabel("ms a step")
    for axes in (left, right):
        if axes.lines:
            axes.legend(fontsize=7)


def tables(content: dict[str, Any]) -> Iterator[Table]:
    """What a reader wants to see."""
    drawn = Table(title=content["settings"]["shape"])
    for name in ("impl", "format", "CR", "context", "batch", "ms/step", "tokens/s", "live", "GB"):
        drawn.add_column(name, justify="right", no_wrap=True)
    drawn.add_column("limit ms", justify="right")
    for row in content["rows"]:
        if "ms_per_step" not in row:
            drawn.add_row(row["impl"], row["error"][:40])
            continue
        peak = row.get("peak_bytes")
        drawn.add_row(
            row["impl"],
            row["format"],
            f"{row['cr']:g}",
            str(row["context"]),
            str(row["batch"]) + (" max" if row.get("largest") else ""),
            f"{row['ms_per_step']:.2f}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['resident_tokens']:.0f}",
            "" if peak is None else f"{peak / 1e9:.0f}",
            f"{row['limit_ms']:.2f}" if "limit_ms" in row else "",
        )
    yield drawn
    keys = list(dict.fromkeys(k for entry in content["comparison"] for k in entry))
    ratios = Table(*keys, title="against dense")
    for entry in content["comparison"]:
        cells = (entry.get(k, "") for k in keys)
        ratios.add_row(*(f"{x:.2f}" if isinstance(x, float) else str(x) for x in cells))
    yield ratios


def main(argv: list[str] | None = None) -> None:
    """The command line; exit code 1 if a point of ours failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "end_to_end.json")
    parser.add_argument("--shape", default="qwen3-8b", choices=list(FULL))
    parser.add_argument("--quick", action="store_true", help="a tiny model")
    parser.add_argument("--peer", type=Path, help="a checkout of NVIDIA's experimental/dms")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape, points = ("tiny", QUICK) if args.quick else (args.shape, FULL[args.shape])
    window = 16 if args.quick else WINDOW
    new = (2, 6) if args.quick else (8, 40)
    bench = Bench(SHAPES[shape](), device, dtype, window, copy_bandwidth(device), new)
    content: dict[str, Any] = {
        "machine": machine(),
        "settings": {"shape": shape, "window": window, "dtype": str(dtype), "new": bench.new},
        "copy_bytes_per_s": bench.copy,
        "rows": [],
        "comparison": [],
    }
    console = Console(width=150)
    try:
        for row in rows_of(bench, points, args.peer, shape):
            console.print(row, soft_wrap=True, highlight=False)
            content["rows"].append(row)
            content["comparison"] = compare(content["rows"])
            write(args.output, content)
    finally:
        # Also when a time limit interrupts.
        save(args.output, content, draw)
    for table in tables(content):
        console.print(table)
    if any("error" in row and row["impl"] == "dms" for row in content["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    # In the background of a shell, interrupts are ignored; h200.sh ends a run by one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
