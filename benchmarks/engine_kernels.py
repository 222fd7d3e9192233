# SPDX-License-Identifier: Apache-2.0
"""The PTX that engines embed, launched as TensorRT does, beside our own launches of the same kernels. Needs CUDA.

    python benchmarks/engine_kernels.py --output benchmarks/results/engine_kernels.json

Outputs are compared before anything is timed. Both are replays of a CUDA graph over several layers' lists, which
together outgrow the L2 cache.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_driver as driver
import torch
from cases import TOLERANCE, Heads, Paged, lengths_of, paged, relative_error
from machine import RESULTS, machine, write
from timing import graphed
from torch import Tensor

from modelopt_dms.exporters.tensorrt import kernels
from modelopt_dms.kernels import append, decode
from modelopt_dms.kernels.gating import Decided
from modelopt_dms.runtime.manifest import Model

BATCHES, MEAN, SPREAD, LAYERS, WINDOW = (8, 64), 2048, 4.0, 4, 256


def model(heads: Heads, number: Any) -> Model:
    """What engine kernels for these heads are compiled for."""
    sizes = (4, heads.kv, heads.kv * heads.group, heads.dim, heads.dim, 1)
    return Model("benchmark", *sizes, "bfloat16", WINDOW, 0, number, number, ())


def loaded(heads: Heads, number: str, batch: int) -> dict[str, driver.Loaded]:
    """Engine kernels by op."""
    made = model(heads, number)
    count = torch.cuda.get_device_properties(0).multi_processor_count
    compiled = kernels.compile_kernels(
        made,
        heads.scoring,
        chunk=2048,
        programs=kernels.decode_programs(made, count),
        batch=batch,
    )
    return {kernel.operator: driver.Loaded(kernel, ptx) for kernel, ptx in compiled}


def stored(cache: Paged, layer: int) -> dict[str, Tensor]:
    """Inputs of ops that are a layer's state."""
    lists = cache.layers[layer]
    names = ("scales", "table", "live", "seen", "ring_slot", "ring_evict", "active")
    found = {name: getattr(lists, name) for name in names}
    return found | {"keys": cache.pool.keys, "values": cache.pool.values}


def decoding(
    cache: Paged, ops: dict[str, driver.Loaded]
) -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
    """A decode step's attention of all layers, by engine kernels and by ours."""
    programs = ops["DmsDecodePartial"].kernel.attributes["programs"]
    dim, rows = cache.heads.dim, cache.heads.group

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=cache.device)

    def engine() -> list[Tensor]:
        found = []
        for layer, q in enumerate(cache.q):
            state = stored(cache, layer)
            parts = {
                "whole": torch.empty_like(q),
                "partial": empty(programs, 2, rows, dim),
                "partial_lse": empty(programs, 2, rows),
                "spans": empty(*cache.layers[layer].live.shape, 2, dtype=torch.int32),
            }
            ops["DmsDecodePartial"].launch({"q": q, **state}, parts)
            found.append(torch.empty_like(q))
            ops["DmsDecodeCombine"].launch({**parts, **state}, {"out": found[-1]})
        return found

    def ours() -> list[Tensor]:
        return [
            decode.decode_attention(q, cache.pool, lists, cache.heads.scoring, programs=programs)
            for q, lists in zip(cache.q, cache.layers, strict=True)
        ]

    return engine, ours


def appending(
    cache: Paged, ops: dict[str, driver.Loaded]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A decode step's new token of all layers, likewise. Each takes the slot of a marked one: no list grows."""
    batch = cache.layers[0].batch
    k, v = torch.randn(2, batch, cache.heads.kv, cache.heads.dim, device=cache.device).bfloat16()
    evict = torch.ones(batch, cache.heads.kv, dtype=torch.bool, device=cache.device)
    for lists in cache.layers:
        lists.ring_slot.copy_(torch.arange(lists.ring))
        lists.ring_evict.fill_(True)

    def engine() -> None:
        for layer in range(len(cache.layers)):
            given = {"k": k, "v": v, "evict": evict, **stored(cache, layer)}
            ops["DmsCacheUpdate"].launch(given, {})

    def ours() -> None:
        for lists in cache.layers:
            append.append_token(k, v, Decided(evict), cache.pool, lists)

    return engine, ours


def main(argv: list[str] | None = None) -> None:
    """The command line; exit code 1 if an engine kernel was wrong, or there is no GPU."""
    parser = argparse.ArgumentParser(prog="engine_kernels.py", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "engine_kernels.json")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit("engine kernels run on a Hopper GPU only; there is no CUDA device here")
    device, rows = torch.device("cuda"), []
    for number, name in (("plain", "bf16"), ("fp8", "fp8")):
        for batch in BATCHES:
            heads = Heads()
            lengths = [lengths_of(batch * heads.kv, MEAN, SPREAD, device) for _ in range(LAYERS)]
            cache = paged(lengths, heads, name, torch.bfloat16, device)
            ops = loaded(heads, number, batch)
            engine, ours = decoding(cache, ops)
            pairs = zip(engine(), ours(), strict=True)
            error = max(float(relative_error(x, y)) for x, y in pairs)
            if error > TOLERANCE:
                sys.exit(f"{name}, batch {batch}: relative error {error}")
            row = {"format": name, "batch": batch, "error": error}
            for op, works in (("decode", (engine, ours)), ("append", appending(cache, ops))):
                times = [graphed(work, device) / LAYERS for work in works]
                row |= {f"{op}_engine_us": times[0], f"{op}_us": times[1]}
            rows.append(row)
            sys.stdout.write(f"{row}\n")
            write(args.output, {"machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
