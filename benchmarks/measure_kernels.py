# SPDX-License-Identifier: Apache-2.0
"""The kernels one by one: microseconds, bytes a second, share of what a copy moves; beside PyTorch's and others' own.

Before a case is timed, the same code runs a small instance and is compared with the reference; a wrong kernel gets an
"error" and no time. Decode and append are timed as replays of a CUDA graph over several layers' lists, which together
outgrow the L2 cache. Bytes are those that must move: live rows, queries and outputs once.
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import peers
import torch
import torch.nn.functional as F
from cases import (
    FORMATS,
    GRADIENT_TOLERANCE,
    TOLERANCE,
    Heads,
    Paged,
    clear,
    empty_lists,
    lengths_of,
    make_pool,
    paged,
    random_eviction,
    random_gate,
    random_rows,
    relative_error,
    row_formats,
)
from machine import RESULTS, machine, save, write
from rich.console import Console
from rich.table import Table
from timing import copy_bandwidth, graphed, passes, single
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from modelopt_dms.kernels import dispatch, reference
from modelopt_dms.kernels.layout import PAGE, PagePool, PageTables
from modelopt_dms.kernels.prefill_reference import Chunk

Row = dict[str, Any]
# Distinct bytes that one pass over all layers reads: several times the 60 MB of an H200's L2.
ROTATED_BYTES = {"cuda": 512 << 20, "cpu": 1 << 20}
WINDOW = 256
CHUNK = 2048


@dataclass(frozen=True)
class Plan:
    """What is measured, by size.

    Attributes:
        decode: lists, mean length, head dim of every decode case.
        compared: those at which the peers are timed too.
        append_batch: sequences.
        features: C of the fused gate.
        pack: sequences and tokens.
        prompts: prompt lengths of the prefill forward.
        trained: lengths of forward + backward.
        chunked: prompt length read in chunks, and tokens of a chunk.
        heads: of the prefill cases.
    """

    decode: tuple[tuple[int, int, int], ...]
    compared: tuple[tuple[int, int, int], ...]
    append_batch: int
    features: int
    pack: tuple[int, int]
    prompts: tuple[int, ...]
    trained: tuple[int, ...]
    chunked: tuple[int, int]
    heads: Heads
    window: int = WINDOW


FULL = Plan(
    decode=(
        *((lists, 2048, 128) for lists in (64, 128, 256, 512, 1024, 4096)),
        (128, 512, 128),
        (128, 16384, 128),
        (512, 2048, 64),
    ),
    compared=((128, 2048, 128),),
    append_batch=64,
    features=4096,
    pack=(8, CHUNK),
    prompts=(2048, 8192, 32768),
    trained=(8192, 32768),
    chunked=(32768, CHUNK),
    heads=Heads(),
)
QUICK = Plan(
    decode=((8, 96, 32),),
    compared=((8, 96, 32),),
    append_batch=2,
    features=64,
    pack=(2, 64),
    prompts=(96,),
    trained=(64,),
    chunked=(128, 64),
    heads=Heads(2, 2, 32),
    window=16,
)


@dataclass(frozen=True)
class Bench:
    """Where and how everything runs."""

    device: torch.device
    dtype: torch.dtype
    plan: Plan
    copy: float
    impl: str
    peers: tuple[str, ...]

    def guarded(
        self, name: str, check: Callable[[], float], row: Row, allowed: float = TOLERANCE
    ) -> bool:
        """Whether the check's relative error allows the case to be timed; if not, the row says why."""
        try:
            found = check()
        except Exception as error:
            traceback.print_exc()
            row["error"] = f"{name}: {type(error).__name__}: {error}".splitlines()[0]
            return False
        row["relative_error"] = found
        if not found < allowed:
            row["error"] = f"{name} is wrong: relative error {found:.2g}, allowed {allowed:g}"
        return "error" not in row


SPREADS = {"uniform": 1.0, "ragged": 10.0}  # the longest list over the shortest


def decode_rows(bench: Bench) -> Iterator[Row]:
    """Decode attention over lists, in all formats."""
    for case in bench.plan.decode:
        for kind in SPREADS:
            for name in FORMATS:
                yield _decode_row(bench, case, kind, name, "ours", ours(bench.impl))


def peer_rows(bench: Bench) -> Iterator[Row]:
    """Others on some of the same cases, in the model's dtype."""
    for case in bench.plan.compared:
        for kind in SPREADS:
            for peer in bench.peers:
                if peer in peers.absent():
                    yield {"op": "decode", "impl": peer, "absent": True}
                else:
                    yield _decode_row(bench, case, kind, "bf16", peer, peers.DECODE[peer][1])


def ours(impl: str) -> Callable[[Paged], peers.Layer]:
    """Our decode attention, as the maker of a peer."""

    def make(case: Paged) -> peers.Layer:
        pool, scoring = case.pool, case.heads.scoring
        return lambda i: dispatch.decode_attention(
            case.q[i], pool, case.layers[i], scoring, impl=impl
        )

    return make


def _decode_row(
    bench: Bench,
    case: tuple[int, int, int],
    kind: str,
    name: str,
    impl: str,
    make: Callable[[Paged], peers.Layer],
) -> Row:
    lists, mean, dim = case
    heads, spread = replace(bench.plan.heads, dim=dim), SPREADS[kind]
    row: Row = {
        "op": "decode",
        "impl": impl,
        "format": name,
        "lists": lists,
        "mean_live": mean,
        "lengths": kind,
        "head_dim": dim,
    }

    def made(lists: int, mean: int, layers: int) -> Paged:
        lengths = [lengths_of(lists, mean, spread, bench.device) for _ in range(layers)]
        return paged(lengths, heads, name, bench.dtype, bench.device)

    def check() -> float:
        small = made(3 * heads.kv, 2 * PAGE, 1)
        wanted = ours("reference")(small)(0)
        return relative_error(make(small)(0), wanted)

    if not bench.guarded(impl, check, row):
        return row
    # Peers pad: their memory is that of the longest list.
    needed = lists * mean * 2 * heads.dim * bench.dtype.itemsize
    layers = max(2, -(-ROTATED_BYTES[bench.device.type] // needed))
    inputs = made(lists, mean, layers)

    def work() -> float:
        attend = make(inputs)

        def one_pass() -> None:
            for i in range(layers):
                attend(i)

        return graphed(one_pass, bench.device) / layers

    row = _timed(bench, row, work, _decode_bytes(inputs))
    return {**row, "kv_tokens_per_us": lists * mean / row["us"]} if "us" in row else row


def _decode_bytes(case: Paged) -> float:
    """Bytes that one layer's attention must move, on average."""
    row = case.pool.key_layout.row_bytes + case.pool.value_layout.row_bytes
    live = sum(int(x.live.sum()) for x in case.layers)
    queries = sum(2 * q.nbytes for q in case.q)
    return (live * row + queries) / len(case.layers)


def append_rows(bench: Bench) -> Iterator[Row]:
    """One token of every sequence: gate decision, slot, page, encoded write."""
    for name in FORMATS:
        yield _append_row(bench, name)


def _append_row(bench: Bench, name: str) -> Row:
    heads, B, features = bench.plan.heads, bench.plan.append_batch, bench.plan.features
    row: Row = {"op": "append", "format": name, "batch": B, "features": features}
    if not bench.guarded("append", lambda: _append_error(bench, heads, name), row):
        return row
    layers, tokens = 16, bench.plan.window + PAGE
    pool, states = _filled(bench, name, B, tokens, passes(bench.device), layers)
    gates = [random_gate(B, features, heads, bench.dtype, bench.device) for _ in states]
    k, v = (random_rows(B, 1, heads, bench.dtype, bench.device)[:, :, 0] for _ in range(2))

    def one_pass() -> None:
        for lists, gate in zip(states, gates, strict=True):
            dispatch.append_token(k, v, gate, pool, lists, impl=bench.impl)

    row = _timed(bench, row, lambda: graphed(one_pass, bench.device) / layers, None)
    pool.check("this benchmark made its pool too small")
    return row


def _append_error(bench: Bench, heads: Heads, name: str) -> float:
    """Relative error of what is left behind after a few tokens."""
    k = random_rows(2, 8, heads, bench.dtype, bench.device)
    gate = random_gate(2, bench.plan.features, heads, bench.dtype, bench.device)

    def feed(impl: str) -> tuple[PagePool, PageTables]:
        torch.manual_seed(1)
        pool, (lists,) = _filled(bench, name, 2, 2 * bench.plan.window, 8, 1)
        for t in range(k.shape[2]):
            dispatch.append_token(k[:, :, t], -k[:, :, t], gate, pool, lists, impl=impl)
        return pool, lists

    return _difference(feed, heads, bench.impl)


def _difference(
    feed: Callable[[str], tuple[PagePool, PageTables]], heads: Heads, impl: str
) -> float:
    """Relative error of attention over the lists that ours leaves; NaN if their lengths are not the reference's."""
    (pool_a, a), (pool_b, b) = feed(impl), feed("reference")
    if not (torch.equal(a.live, b.live) and torch.equal(a.seen, b.seen)):
        return float("nan")
    shape = (a.batch, heads.kv * heads.group, heads.dim)
    q = torch.randn(shape, device=a.live.device)
    out_a, out_b = (
        dispatch.decode_attention(q, pool, lists, heads.scoring, impl="reference")
        for pool, lists in ((pool_a, a), (pool_b, b))
    )
    return relative_error(out_a, out_b)


def _filled(
    bench: Bench, name: str, batch: int, tokens: int, more: int, layers: int
) -> tuple[PagePool, list[PageTables]]:
    """Lists that took in so many tokens, half of them marked, with room for `more`; by the reference."""
    heads, device = bench.plan.heads, bench.device
    width = -(-(tokens + more) // PAGE)
    form, _ = row_formats(name, heads.kv)
    pool = make_pool(width * batch * heads.kv * layers, heads, form, bench.dtype, device)
    states = []
    for _ in range(layers):
        lists = empty_lists(batch, width, heads, name, bench.plan.window, device)
        k, v = (random_rows(batch, tokens, heads, bench.dtype, device) for _ in range(2))
        evict = random_eviction(batch, tokens, heads, 0.5, device)
        dispatch.pack(k, v, evict, None, pool, lists, impl="reference")
        states.append(lists)
    return pool, states


def pack_rows(bench: Bench) -> Iterator[Row]:
    """A chunk of a prompt at CR 8 into lists that hold chunks already."""
    for name in FORMATS:
        yield _pack_row(bench, name)


def _pack_row(bench: Bench, name: str) -> Row:
    heads, (B, T) = bench.plan.heads, bench.plan.pack
    row: Row = {"op": "pack", "format": name, "batch": B, "tokens": T, "cr": 8}
    if not bench.guarded("pack", lambda: _pack_error(bench, heads, name), row):
        return row
    # With a margin: survivors of random eviction vary.
    pool, (lists,) = _filled(bench, name, B, T, passes(bench.device) * (T // 4 + 1), 1)
    k, v, evict = _chunk(bench, B, T)
    kept = B * heads.kv * T / 8
    read = kept * 2 * heads.dim * bench.dtype.itemsize + evict.nbytes
    written = kept * 2 * pool.key_layout.row_bytes

    def work() -> float:
        return graphed(
            lambda: dispatch.pack(k, v, evict, None, pool, lists, impl=bench.impl), bench.device
        )

    row = _timed(bench, row, work, read + written)
    pool.check("this benchmark made its pool too small")
    return row


def _chunk(bench: Bench, batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random rows and decisions at CR 8."""
    heads = bench.plan.heads
    k, v = (random_rows(batch, tokens, heads, bench.dtype, bench.device) for _ in range(2))
    return k, v, random_eviction(batch, tokens, heads, 7 / 8, bench.device)


def _pack_error(bench: Bench, heads: Heads, name: str) -> float:
    T = bench.plan.pack[1]

    def feed(impl: str) -> tuple[PagePool, PageTables]:
        torch.manual_seed(1)
        pool, (lists,) = _filled(bench, name, 2, T, T, 1)
        dispatch.pack(*_chunk(bench, 2, T), None, pool, lists, impl=impl)
        return pool, lists

    return _difference(feed, heads, bench.impl)


@dataclass(frozen=True)
class Prompt:
    """Queries, keys and values of one prompt [1, ., T, D], and soft decisions about it [1, K, T]."""

    q: Tensor
    k: Tensor
    v: Tensor
    keep_logprob: Tensor

    @staticmethod
    def make(T: int, heads: Heads, dtype: torch.dtype, device: torch.device) -> "Prompt":
        """Random ones."""
        q = torch.randn(1, heads.kv * heads.group, T, heads.dim, device=device).to(dtype)
        k, v = (random_rows(1, T, heads, dtype, device) for _ in range(2))
        return Prompt(q, k, v, F.logsigmoid(3 * torch.randn(1, heads.kv, T, device=device)))

    def learning(self) -> "Prompt":
        """Leaves that collect gradients."""
        return Prompt(*(x.detach().requires_grad_() for x in self.tensors))

    def masked(self, window: int) -> reference.Prompt:
        """As attention takes it."""
        return reference.Prompt(*self.tensors, window)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All four."""
        return self.q, self.k, self.v, self.keep_logprob


def prefill_rows(bench: Bench) -> Iterator[Row]:
    """A whole prompt under the mask, forward; then forward and backward; beside PyTorch's dense kernels."""
    heads, window = bench.plan.heads, bench.plan.window

    def dms(x: Prompt) -> Tensor:
        return dispatch.prefill_attention(x.masked(window), heads.scoring, impl=bench.impl)

    todo = [("prefill", T) for T in bench.plan.prompts] + [("train", T) for T in bench.plan.trained]
    for op, T in todo:
        x = Prompt.make(T, heads, bench.dtype, bench.device)
        for impl, attend in {"ours": dms, **_dense(bench)}.items():
            yield _prefill_row(bench, op, impl, attend, x)


def _prefill_row(
    bench: Bench, op: str, impl: str, attend: Callable[[Prompt], Tensor], x: Prompt
) -> Row:
    T, (_, H, _, D) = x.q.shape[2], x.q.shape
    row: Row = {"op": op, "impl": impl, "tokens": T, "head_dim": D}
    check, allowed = (
        (_forward_error, TOLERANCE) if op == "prefill" else (_gradient_error, GRADIENT_TOLERANCE)
    )
    if impl == "ours" and not bench.guarded(op, lambda: check(bench), row, allowed):
        return row
    work = _forward(attend, x) if op == "prefill" else _both(attend, x.learning())
    # Causal products of q, k and of weights, v; the backward has five where the forward has two.
    flops = 2 * T * T * H * D * (1 if op == "prefill" else 3.5)
    row = _timed(bench, row, lambda: single(work, bench.device), None)
    return {**row, "tflops": flops / row["us"] / 1e6} if "us" in row else row


def _dense(bench: Bench) -> dict[str, Callable[[Prompt], Tensor]]:
    """PyTorch's causal attention of the same shapes without eviction, by backend."""
    backends = {"flash": SDPBackend.FLASH_ATTENTION}
    if bench.device.type == "cuda":
        backends["cudnn"] = SDPBackend.CUDNN_ATTENTION

    def make(backend: SDPBackend) -> Callable[[Prompt], Tensor]:
        def run(x: Prompt) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(
                    x.q, x.k, x.v, is_causal=True, enable_gqa=True
                )

        return run

    return {name: make(backend) for name, backend in backends.items()}


def _forward(run: Callable[[Prompt], Tensor], x: Prompt) -> Callable[[], object]:
    @torch.no_grad()
    def work() -> Tensor:
        return run(x)

    return work


def _both(run: Callable[[Prompt], Tensor], x: Prompt) -> Callable[[], object]:
    direction = torch.randn_like(x.q)

    def work() -> object:
        out = run(x)
        return torch.autograd.grad(out, x.tensors, direction, allow_unused=True)

    return work


def _forward_error(bench: Bench) -> float:
    """Relative error of the output."""
    return next(_prefill_errors(bench))


def _gradient_error(bench: Bench) -> float:
    """Largest relative error of the gradients."""
    _, *gradients = _prefill_errors(bench)
    return max(gradients)


def _prefill_errors(bench: Bench) -> Iterator[float]:
    """Relative errors of output and gradients on a short prompt, from the reference's in float64."""
    heads, window = bench.plan.heads, bench.plan.window
    x = Prompt.make(window + 3 * PAGE - 5, heads, bench.dtype, bench.device)
    exact = Prompt(*(t.double() for t in x.tensors))
    direction = torch.randn_like(x.q)

    def results(x: Prompt, attend: Callable[..., Tensor]) -> list[Tensor]:
        x = x.learning()
        out = attend(x.masked(window), heads.scoring)
        return [out, *torch.autograd.grad(out, x.tensors, direction.to(out.dtype))]

    got = results(x, partial(dispatch.prefill_attention, impl=bench.impl))
    wanted = results(exact, reference.prefill_attention)
    return map(relative_error, got, wanted)


def chunked_rows(bench: Bench) -> Iterator[Row]:
    """A prompt read in chunks at CR 8: attention of each chunk over what the chunks before it left, then pack."""
    T, chunk = bench.plan.chunked
    for name in FORMATS:
        yield _chunked_row(bench, name)


def _chunked_row(bench: Bench, name: str) -> Row:
    T, chunk = bench.plan.chunked
    row: Row = {"op": "chunked", "impl": "ours", "format": name, "tokens": T, "chunk": chunk}
    if not bench.guarded("attend_chunk", lambda: _chunk_error(bench, name), row):
        return row
    reader = Reader(bench, name, T, chunk)
    return _timed(
        bench,
        row,
        lambda: single(lambda: reader.read(bench.impl), bench.device, reader.forget),
        None,
    )


class Reader:
    """Reads one random prompt in chunks."""

    def __init__(self, bench: Bench, name: str, T: int, chunk: int) -> None:
        heads, device = bench.plan.heads, bench.device
        self.heads, self.chunk = heads, chunk
        self.x = Prompt.make(T, heads, bench.dtype, device)
        self.evict = random_eviction(1, T, heads, 7 / 8, device)
        width = -(-T // PAGE)
        form, _ = row_formats(name, heads.kv)
        self.pool = make_pool(width * heads.kv, heads, form, bench.dtype, device)
        self.lists = empty_lists(1, width, heads, name, bench.plan.window, device)

    def forget(self) -> None:
        """Start over."""
        clear(self.pool, [self.lists])

    def read(self, impl: str) -> Tensor:
        """Output [1, H, chunk, D] of the last chunk."""
        for start in range(0, self.x.q.shape[2], self.chunk):
            part = slice(start, start + self.chunk)
            q, k, v = (t[:, :, part] for t in (self.x.q, self.x.k, self.x.v))
            evict = self.evict[..., part]
            first = self.lists.seen[:, 0].contiguous()
            ends = expiry(self.lists, start) if start else None
            new = Chunk(q, k, v, evict, first, expiry=ends)
            out = dispatch.attend_chunk(new, self.pool, self.lists, self.heads.scoring, impl=impl)
            dispatch.pack(k, v, evict, None, self.pool, self.lists, impl=impl)
        return out


def expiry(lists: PageTables, length: int) -> Tensor:
    """The last position [B, K, length] int32 of a query that may read each slot, as `paging` tells the kernels."""
    pending = lists.ring_evict & (lists.ring_slot >= 0) & (lists.ring_slot < length)
    slots = torch.where(pending, lists.ring_slot, length).long()
    last = (lists.ring_positions() + lists.window).int()
    found = last.new_full((lists.batch, lists.heads, length + 1), 2**31 - 1)
    return found.scatter_(2, slots, last)[..., :length].contiguous()


def _chunk_error(bench: Bench, name: str) -> float:
    reader = Reader(bench, name, 4 * bench.plan.window, bench.plan.window + PAGE // 2)
    got = reader.read(bench.impl)
    reader.forget()
    return relative_error(got, reader.read("reference"))


def _timed(bench: Bench, row: Row, work: Callable[[], float], moved: float | None) -> Row:
    """The row with its time, and what follows from it; or with what went wrong."""
    try:
        us = work()
    except Exception as error:
        traceback.print_exc()
        return {**row, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
    row = {**row, "us": us}
    if moved is not None:
        row |= {"gb_per_s": moved / us / 1e3, "fraction_of_copy": moved / us * 1e6 / bench.copy}
    return row


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "decode": decode_rows,
    "append": append_rows,
    "pack": pack_rows,
    "prefill": prefill_rows,
    "chunked": chunked_rows,
    "peers": peer_rows,
}


def targets(rows: list[Row]) -> list[Row]:
    """What issue 5 asks for, beside what was measured: `reached` is None where a figure is missing."""

    def decode(key: str, form: str, kind: str = "uniform") -> dict[Any, float]:
        """Of the cases that are large enough, by case."""
        return {
            (r["lists"], r["mean_live"]): r[key]
            for r in rows
            if r["op"] == "decode" and r["impl"] == "ours" and key in r
            if (r["format"], r["lengths"], r["head_dim"]) == (form, kind, 128)
            if r["lists"] >= 128 and r["mean_live"] >= 2048
        }

    def times(op: str, impl: str) -> dict[Any, float]:
        mine = [r for r in rows if r["op"] == op and r["impl"] == impl and "us" in r]
        return {r["tokens"]: r["us"] for r in mine if r["tokens"] >= 8192}

    def over(above: dict[Any, float], below: dict[Any, float]) -> list[float]:
        return [above[case] / below[case] for case in above if case in below]

    share, speed = "fraction_of_copy", "kv_tokens_per_us"
    appended = [r["us"] for r in rows if r["op"] == "append" and r["batch"] == 64 and "us" in r]
    ragged = over(decode("us", "bf16", "ragged"), decode("us", "bf16"))
    found = [
        ("bf16 decode, share of copy", list(decode(share, "bf16").values()), ">=", 0.9),
        ("fp8 decode, share of copy", list(decode(share, "fp8").values()), ">=", 0.8),
        ("ragged / uniform us", ragged, "<=", 1.1),
        ("nvfp4 / bf16 tokens/s", over(decode(speed, "nvfp4"), decode(speed, "bf16")), ">=", 1.0),
        ("append us a layer", appended, "<=", 5.0),
        ("prefill / flash", over(times("prefill", "ours"), times("prefill", "flash")), "<=", 1.25),
        ("train / flash", over(times("train", "ours"), times("train", "flash")), "<=", 1.5),
    ]
    return [_target(*x) for x in found]


def _target(name: str, values: list[float], sign: str, limit: float) -> Row:
    if not values:
        return {"target": name, "limit": f"{sign} {limit:g}", "worst": None, "reached": None}
    worst = min(values) if sign == ">=" else max(values)
    reached = worst >= limit if sign == ">=" else worst <= limit
    return {"target": name, "limit": f"{sign} {limit:g}", "worst": worst, "reached": reached}


def tables(content: dict[str, Any]) -> Iterator[Table]:
    """What a reader wants to see."""
    drawn = Table(title=f"copy {content['copy_bytes_per_s'] / 1e12:.2f} TB/s")
    drawn.add_column("case", no_wrap=True)
    for name in ("us", "GB/s", "of copy", "TFLOP/s", "rel. error"):
        drawn.add_column(name, justify="right", no_wrap=True)
    figures = {"us", "gb_per_s", "fraction_of_copy", "tflops", "relative_error", "error"}
    for row in content["rows"]:
        case = " ".join(
            str(x) for k, x in row.items() if k not in figures | {"kv_tokens_per_us", "absent"}
        )
        if "us" not in row:
            drawn.add_row(case, "absent" if row.get("absent") else row["error"][:60])
            continue
        drawn.add_row(
            case,
            f"{row['us']:.1f}",
            *(f"{row[k]:.{n}f}" if k in row else "" for k, n in _SHOWN.items()),
            f"{row['relative_error']:.1e}" if "relative_error" in row else "",
        )
    yield drawn
    goals = Table("target", "limit", "worst", "reached", title="issue 5")
    for row in content["targets"]:
        worst = "" if row["worst"] is None else f"{row['worst']:.3f}"
        goals.add_row(row["target"], row["limit"], worst, str(row["reached"]))
    yield goals


_SHOWN = {"gb_per_s": 0, "fraction_of_copy": 3, "tflops": 0}


def draw(figure: Any, content: dict[str, Any]) -> None:
    """Left: decode's share of a copy's bandwidth over the number of lists. Right: prefill and training, ms."""
    left, right = figure.subplots(1, 2)
    decode = [r for r in content["rows"] if r["op"] == "decode" and "us" in r]
    mean = max((r["mean_live"] for r in decode if r["mean_live"] <= 2048), default=0)
    decode = [r for r in decode if r["mean_live"] == mean]
    for kind, style in (("uniform", "o-"), ("ragged", "x--")):
        for name in dict.fromkeys((r["impl"], r["format"]) for r in decode):
            points = sorted(
                (r["lists"], r["fraction_of_copy"])
                for r in decode
                if (r["impl"], r["format"]) == name and r["lengths"] == kind
            )
            label = f"{' '.join(name)}, {kind}"
            if points:
                left.plot(*zip(*points, strict=True), style, label=label, ms=4, lw=1)
    left.set_xscale("log", base=2)
    left.set_xlabel(f"lists of {mean} resident tokens on average")
    left.set_ylabel("share of a copy's bandwidth")
    for op, style in (("prefill", "o-"), ("train", "x--")):
        rows = [r for r in content["rows"] if r["op"] == op and "us" in r]
        for impl in dict.fromkeys(r["impl"] for r in rows):
            points = [(r["tokens"], r["us"] / 1e3) for r in rows if r["impl"] == impl]
            right.plot(*zip(*points, strict=True), style, label=f"{op}, {impl}", ms=4, lw=1)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_xlabel("tokens of the prompt")
    right.set_ylabel("ms a layer")
    for axes in (left, right):
        if axes.lines:
            axes.legend(fontsize=6)


def main(argv: list[str] | None = None) -> None:
    """The command line; exit code 1 if any kernel of ours was wrong or failed."""
    parser = argparse.ArgumentParser(prog="kernels.py", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "kernels.json")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--impl", default="auto", choices=("auto", "triton", "reference"))
    parser.add_argument("--peers", nargs="*", default=list(peers.DECODE), choices=peers.DECODE)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    plan = QUICK if args.quick else FULL
    bench = Bench(device, dtype, plan, copy_bandwidth(device), args.impl, tuple(args.peers))
    content: dict[str, Any] = {
        "machine": machine(),
        "settings": {
            "quick": args.quick,
            "parts": args.parts,
            "impl": args.impl,
            "dtype": str(dtype),
        },
        "copy_bytes_per_s": bench.copy,
        "absent_peers": peers.absent(),
        "rows": [],
        "targets": [],
    }
    console = Console(width=150)
    try:
        for part in args.parts:
            for row in PARTS[part](bench):
                content["rows"].append(row)
                content["targets"] = targets(content["rows"])
                write(args.output, content)
                console.print(row, soft_wrap=True, highlight=False)
    finally:
        # Also when a time limit interrupts.
        save(args.output, content, draw)
    for table in tables(content):
        console.print(table)
    if any("error" in row and row.get("impl", "ours") == "ours" for row in content["rows"]):
        sys.exit(1)
