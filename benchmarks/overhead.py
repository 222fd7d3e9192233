# SPDX-License-Identifier: Apache-2.0
"""What a retrofit step costs over a step of plain distillation of the same model: time and peak memory.

    python benchmarks/overhead.py --output benchmarks/results/overhead.json

Both take a packed sample, a teacher's forward, a student's forward, KL over the vocabulary in chunks, and a backward
pass down to the first layer with all base weights frozen. The retrofit learns gates on every layer, with noise,
decisions and attention under the delayed-eviction mask; plain distillation learns one vector before the first layer,
with PyTorch's own attention. Steps are taken in turns in one process for the time, in a process each for the memory.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import machine
from models import build, llama_config
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel

from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.config.output_dir import write_json
from modelopt_dms.config.retrofit import RetrofitConfig
from modelopt_dms.modeling.divergence import kl_divergence
from modelopt_dms.modeling.lm_head import last_hidden, output_head
from modelopt_dms.modeling.mode import apply_dms
from modelopt_dms.training.distill import Distiller, learning

# name: layers, hidden size, query heads, KV heads, head dim, vocabulary
SHAPES = {
    "4 layers, GQA 8/2, D 64, V 32K": (4, 512, 8, 2, 64, 32768),
    "4 layers, GQA 16/4, D 64, V 32K": (4, 1024, 16, 4, 64, 32768),
}
LENGTHS = (1024, 2048)
VARIANTS = ("plain", "retrofit")
CONFIG = RetrofitConfig(kl_chunk_tokens=1024)


class Plain(nn.Module):
    """Distillation without DMS, shaped like `Distiller`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.vector = nn.Parameter(torch.zeros(model.config.hidden_size))

    def forward(self, input_ids: Tensor, position_ids: Tensor, **_: Any) -> dict[str, Tensor]:
        """The loss of one step."""
        with torch.no_grad():
            wanted = last_hidden(self.model, input_ids, position_ids)
        embedding: Any = self.model.get_input_embeddings()
        handle = embedding.register_forward_hook(lambda module, args, out: out + self.vector)
        try:
            hidden = last_hidden(self.model, input_ids, position_ids)
        finally:
            handle.remove()
        head = output_head(self.model)
        valid = torch.ones_like(input_ids, dtype=torch.bool)
        loss = kl_divergence(
            hidden,
            wanted,
            valid,
            head,
            head,
            direction=CONFIG.kl_direction,
            chunk_tokens=CONFIG.kl_chunk_tokens,
        )
        return {"loss": loss}


def make(variant: str, shape: str) -> nn.Module:
    """What takes a step."""
    model = build(llama_config(*SHAPES[shape]))
    if variant == "plain":
        return Plain(model)
    return Distiller(apply_dms(model, DMSConfig(window=256)), CONFIG).train()


def sample(length: int, vocabulary: int) -> dict[str, Tensor]:
    """One document of random tokens."""
    positions = torch.arange(length)[None]
    ids = torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "position_ids": positions, "tokens_ahead": length - 1 - positions}


def step(module: nn.Module, batch: dict[str, Tensor]) -> None:
    """Forward and backward."""
    extra = {"target": 0.5, "noise_seed": 1} if isinstance(module, Distiller) else {}
    module(**batch, **extra)["loss"].backward()


def seconds(shape: str, length: int, steps: int) -> dict[str, float]:
    """Median time of a step of each variant, taken in turns."""
    modules = {x: make(x, shape) for x in VARIANTS}
    batch = sample(length, SHAPES[shape][-1])
    times: dict[str, list[float]] = {x: [] for x in VARIANTS}
    retrofit: Any = modules["retrofit"]
    with learning(retrofit.model, CONFIG):
        for turn in range(steps + 1):
            for name, module in modules.items():
                begin = time.perf_counter()
                step(module, batch)
                if turn:  # the first warms up
                    times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(x) for name, x in times.items()}


def peak_bytes(variant: str, shape: str, length: int, threads: int) -> int:
    """Peak resident memory of a fresh process that takes two steps, over what it held before them."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(variant, shape, length, threads, sender))
    process.start()
    found: int = receiver.recv()
    process.join()
    return found


def _peak(variant: str, shape: str, length: int, threads: int, sender: Any) -> None:
    torch.set_num_threads(threads)
    module = make(variant, shape)
    vocabulary = SHAPES[shape][-1]
    step(module, sample(64, vocabulary))  # what is allocated once and for all
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    before = _status("VmRSS")
    batch = sample(length, vocabulary)
    if isinstance(module, Distiller):
        with learning(module.model, CONFIG):
            for _ in range(2):
                step(module, batch)
    else:
        for _ in range(2):
            step(module, batch)
    sender.send(_status("VmHWM") - before)


def _status(name: str) -> int:
    """A figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(x for x in lines if x.startswith(name)).split()[1])


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("out/overhead.json"))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    console = Console(width=130)
    table = Table(title="A retrofit step over a step of plain distillation")
    for name in (
        "shape",
        "tokens",
        "plain s",
        "retrofit s",
        "time",
        "plain MB",
        "retrofit MB",
        "memory",
    ):
        table.add_column(name, justify="left" if name == "shape" else "right")
    rows = []
    for shape in args.shapes:
        for length in args.lengths:
            taken = seconds(shape, length, args.steps)
            held = {x: peak_bytes(x, shape, length, args.threads) for x in VARIANTS}
            row = {
                "shape": shape,
                "tokens": length,
                "seconds": taken,
                "peak_bytes": held,
                "time_ratio": taken["retrofit"] / taken["plain"],
                "memory_ratio": held["retrofit"] / held["plain"],
            }
            rows.append(row)
            table.add_row(
                shape,
                str(length),
                f"{taken['plain']:.2f}",
                f"{taken['retrofit']:.2f}",
                f"{row['time_ratio']:.2f}x",
                f"{held['plain'] / 1e6:.0f}",
                f"{held['retrofit'] / 1e6:.0f}",
                f"{row['memory_ratio']:.2f}x",
            )
            console.print(json.dumps(row))
    settings = {k: x for k, x in vars(args).items() if k != "output"}
    write_json(args.output, {"machine": machine(), "settings": settings, "rows": rows})
    console.print(table)


if __name__ == "__main__":
    main()
