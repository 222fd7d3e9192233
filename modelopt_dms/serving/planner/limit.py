# SPDX-License-Identifier: Apache-2.0
"""Bytes that sequences take on a GPU, and the least time of a decode step; docs/capacity.md explains the formulas."""

import math
from dataclasses import dataclass

from modelopt_dms.config.compression_ratio import evictable_tokens
from modelopt_dms.kernels.row_bytes import PAGE, list_bytes, row_bytes
from modelopt_dms.kvcache.reserve import pages_per_list
from modelopt_dms.serving.planner.hardware import Gpu
from modelopt_dms.serving.planner.model_shape import ModelShape, PlanError
from modelopt_dms.serving.planner.plan_recipe import (
    Planned,
    Retention,
    Rows,
    products,
    weight_bits,
)

# GPUs before Blackwell convert NVFP4 with integer instructions: reading such rows takes at least this part of the time
# of 16-bit rows (counted in compiled kernels, not measured).
NVFP4_BY_INTEGERS = 1 / 1.6


@dataclass(frozen=True)
class CacheBytes:
    """One sequence's KV cache on one GPU, at the end of its context.

    Attributes:
        tokens: resident tokens of a KV head of a layer that DMS converts, on average.
        resident: bytes of their rows, and of layers with a sliding window.
        held: bytes of the pages that they lie in, half of the last page empty on average.
        reserved: bytes of the pages that `graphed` reserves from the start; more, since texts differ.
        bookkeeping: bytes of rings and page tables.
    """

    tokens: float
    resident: float
    held: float
    reserved: float
    bookkeeping: float

    @property
    def kv(self) -> float:
        """Bytes that a server which gives out pages as lists grow needs."""
        return self.held + self.bookkeeping


def cache_bytes(
    shape: ModelShape,
    rows: tuple[Rows, Rows],
    retention: Retention | None,
    tokens: int,
    tp: int = 1,
) -> CacheBytes:
    """The KV cache of one sequence of so many tokens on one of `tp` GPUs.

    Args:
        shape: of the model.
        rows: how DMS layers store keys and values.
        retention: which tokens stay; None keeps all, without pages.
        tokens: T.
        tp: GPUs that share the KV heads, see `check_split`; with more GPUs than heads, several hold the same head.
    """
    heads = -(-shape.kv_heads // tp)
    plain = heads * 2 * row_bytes("plain", shape.head_dim, shape.itemsize)
    elsewhere = float(sum(min(tokens, window) for window in shape.sliding) * plain)
    row = sum(row_bytes(x.number, shape.head_dim, shape.itemsize, x.per_row) for x in rows)
    lists = shape.layers * heads
    if retention is None:
        whole = float(lists * tokens * row) + elsewhere
        return CacheBytes(float(tokens), whole, whole, whole, 0.0)
    window, protected = retention.window, retention.protect_first
    share = retention.evicted_share()
    live = tokens - share * evictable_tokens(tokens, window, protected)
    most = math.ceil(tokens / PAGE)
    pages = min(live / PAGE + 0.5, most) if share else most
    reserved = pages_per_list(tokens, share, window, protected)
    return CacheBytes(
        tokens=live,
        resident=lists * live * row + elsewhere,
        held=lists * pages * PAGE * row + elsewhere,
        reserved=float(lists * reserved * PAGE * row) + elsewhere,
        bookkeeping=float(lists * list_bytes(window, most)),
    )


def check_split(shape: ModelShape, tp: int) -> None:
    """Refuse a number of GPUs that engines cannot share the heads of a model by.

    As vLLM has it: every GPU computes as many query heads, and holds as many KV heads, or as many GPUs hold each of
    these.

    Raises:
        PlanError: see above.
    """
    if not can_split(shape, tp):
        accepted = [x for x in range(1, shape.query_heads + 1) if can_split(shape, x)]
        raise PlanError(
            f"--tp {tp}: {shape.name} has {shape.query_heads} query heads and {shape.kv_heads} KV heads, which so many "
            f"GPUs cannot share evenly; accepted: {', '.join(map(str, accepted))}"
        )


def can_split(shape: ModelShape, tp: int) -> bool:
    """Whether so many GPUs can share the heads of a model evenly."""
    kv = shape.kv_heads
    return shape.query_heads % tp == 0 and (kv % tp == 0 or tp % kv == 0)


def weight_bytes(shape: ModelShape, planned: Planned | None) -> float:
    """Bytes of all weights, as a recipe stores them; embeddings, output layer and norms are not quantized."""
    tables = shape.embedding + (0 if shape.tied else shape.head) + shape.others
    return tables * shape.itemsize + _matrices(shape, planned, touched=1.0)


def _matrices(shape: ModelShape, planned: Planned | None, touched: float) -> float:
    """Bytes of linear layers, and of this share of the experts."""
    total = 0.0
    for parts, share in ((shape.linears, 1.0), (shape.experts, touched)):
        for module, count in parts.items():
            bits = None if planned is None else weight_bits(planned, module)
            total += share * count * (shape.itemsize if bits is None else bits / 8)
    return total


@dataclass(frozen=True)
class Step:
    """One decode step at a batch size, on every one of the GPUs at once.

    Attributes:
        weights: seconds for linear layers: reading their weights, or multiplying, whichever takes longer.
        cache: seconds for attention, likewise.
    """

    weights: float
    cache: float

    @property
    def seconds(self) -> float:
        """Both."""
        return self.weights + self.cache


def decode_step(
    shape: ModelShape,
    planned: Planned | None,
    rows: tuple[Rows, Rows],
    cache: CacheBytes,
    batch: int,
    gpu: Gpu,
    tp: int = 1,
) -> Step:
    """The least time of a decode step: nothing but weights and KV rows is read, and GPUs talk for free.

    Args:
        shape: of the model.
        planned: what happens to weights and activations; None leaves them as they are.
        rows: how the cache stores keys and values.
        cache: of one sequence on one GPU.
        batch: sequences, all at this length.
        gpu: which.
        tp: how many.
    """
    # A token passes `active` of the experts of a layer: so many are read by a batch, if it chooses evenly.
    active = shape.experts_active / shape.experts_total
    touched = 1.0 - (1.0 - active) ** batch
    read = _matrices(shape, planned, touched) + (shape.head + shape.others) * shape.itemsize
    flops = 2 * batch * shape.head / gpu.flops_per_second("bf16")
    for parts, share in ((shape.linears, 1.0), (shape.experts, active)):
        for module, count in parts.items():
            number = "bf16" if planned is None else products(planned, module)
            flops += 2 * batch * share * count / gpu.flops_per_second(number)
    weights = max(read / gpu.bytes_per_second, flops) / tp
    heads = -(-shape.query_heads // tp)
    attention = 4 * batch * heads * shape.head_dim * cache.tokens * shape.layers
    attention_time = attention / gpu.flops_per_second("bf16")
    reading = batch * cache.resident / gpu.bytes_per_second
    if gpu.capability < 100:
        reading = max(
            reading, batch * _integer_reading(shape, rows, cache, tp) / gpu.bytes_per_second
        )
    return Step(weights, max(reading, attention_time))


def _integer_reading(
    shape: ModelShape, rows: tuple[Rows, Rows], cache: CacheBytes, tp: int
) -> float:
    """What decoding NVFP4 rows costs where it is done with integers, as bytes that could be read in that time."""
    heads = -(-shape.kv_heads // tp)
    row = 2 * shape.head_dim * NVFP4_BY_INTEGERS
    count = sum(x.number == "nvfp4" for x in rows)
    return shape.layers * heads * cache.tokens * row * count
