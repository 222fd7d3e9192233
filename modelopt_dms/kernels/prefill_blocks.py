# SPDX-License-Identifier: Apache-2.0
"""Blocks of attention among T tokens under the delayed-eviction mask: what the prefill kernels share.

Scores are in units of log 2 inside the kernels, so that exp2 is all they need. A head dim D is two powers of two,
D1 + D2 (96 = 64 + 32; D2 is 0 for most): a tile has a power of two of columns, and 96 padded to 128 wastes a third.

Grids are (heads or lists of all sequences, blocks of tokens): only a grid's first dim goes beyond 65535.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelopt_dms.kernels.layout import PADDING
from modelopt_dms.kernels.reference import Scoring

LOG2E = tl.constexpr(1.4426950408889634)
# Where maxima start: below every score, and finite, so that a row whose keys are all -inf yields 0 and not NaN.
FLOOR = tl.constexpr(-1.0e30)
PAD = tl.constexpr(PADDING)
TRITON_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class Tile:
    """How large a kernel's blocks are.

    Attributes:
        queries: queries of a block.
        keys: keys of a block.
        warps: warps of a program.
        stages: stages of software pipelining.
    """

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2


def split(dim: int, rest_least: int = 16) -> tuple[int, int]:
    """Widths D1 >= 16 and D2 (0 or >= rest_least) of the two tiles that hold D columns."""
    first = max(16, 1 << (dim.bit_length() - 1))
    rest = dim - first
    return first, max(rest_least, triton.next_power_of_2(rest)) if rest > 0 else 0


def head_constants(D: int, DV: int) -> dict[str, Any]:
    """Constexprs of head dims."""
    (d1, d2), (v1, v2) = split(D), split(DV)
    return {"D": D, "DV": DV, "D1": d1, "D2": d2, "V1": v1, "V2": v2}


def scoring_constants(scoring: Scoring) -> dict[str, Any]:
    """Constexprs of scale and softcap."""
    return {"SCALE": scoring.scale, "SOFTCAP": scoring.softcap or 0.0}


def dot_type(dtype: torch.dtype) -> Any:
    """What the operands of dots are cast to: in the interpreter float32, as it multiplies bfloat16 wrongly."""
    interpreted = triton.knobs.runtime.interpret
    return tl.float32 if interpreted else TRITON_TYPES[dtype]


def own_starts(starts: Tensor | None) -> Tensor | None:
    """First visible positions [B, T], at most every query's own: a row always sees itself."""
    if starts is None:
        return None
    itself = torch.arange(starts.shape[1], dtype=torch.int32, device=starts.device)
    return torch.minimum(starts.to(torch.int32), itself).contiguous()


@triton.jit
def load_rows(
    base,
    first,
    count,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    CHECK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Columns OFFSET.. of rows first.. of a matrix [count, D]: [ROWS, WIDTH], zeros outside.

    CHECK: rows may lie outside.
    """
    rows = tl.arange(0, ROWS)[:, None]
    columns = OFFSET + tl.arange(0, WIDTH)[None, :]
    # The scalar is added to the pointer, so that a thread's addresses differ by constants.
    at = base + first * D + (rows * D + columns)
    if OFFSET + WIDTH > D:
        inside = columns < D
        if CHECK:
            inside &= rows < count - first
        x = tl.load(at, mask=inside, other=0)
    elif CHECK:
        x = tl.load(at, mask=rows < count - first, other=0)
    else:
        x = tl.load(at)
    return x.to(DOT)


@triton.jit
def store_rows(
    base,
    first,
    count,
    x,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store x [ROWS, WIDTH] as columns OFFSET.. of rows of a matrix [count, D]."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = OFFSET + tl.arange(0, WIDTH)[None, :]
    at = base + first * D + (rows * D + columns)
    inside = (rows < count - first) & (columns < D)
    tl.store(at, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def padded(T):
    """Length of vectors [T] that kernels read in blocks and a block ahead, without asking where they end."""
    return tl.cdiv(T, PAD) * PAD + PAD


@triton.jit
def load_numbers(base, first, wanted, COUNT: tl.constexpr):
    """Numbers [COUNT] of a padded vector, or zeros if they are not wanted."""
    return tl.load(base + first + tl.arange(0, COUNT), mask=wanted, other=0.0)


@triton.jit
def scored(products, factor, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Scores, in units of log 2, of products q.k that still lack a factor."""
    if SOFTCAP > 0.0:
        # tanh(x) = 1 - 2 / (exp(2x) + 1)
        power = tl.exp2(products * (factor * (2.0 * LOG2E * SCALE / SOFTCAP)))
        return (1.0 - 2.0 / (power + 1.0)) * (SOFTCAP * LOG2E)
    else:
        return products * (factor * (SCALE * LOG2E))


@triton.jit
def uncapped(gradient, scores, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Gradient of q.k from that of its score, without the factor SCALE."""
    if SOFTCAP > 0.0:
        tanh = scores * (1.0 / (SOFTCAP * LOG2E))
        return gradient * (1.0 - tanh * tanh)
    else:
        return gradient


@triton.jit
def delayed(scores, queries, keys, bias, starts, window, HAS_STARTS: tl.constexpr):
    """Scores under the mask; positions (from where one likes), bias and starts broadcast to them."""
    scores = tl.where(keys < queries - window, scores + bias, scores)
    seen = keys <= queries
    if HAS_STARTS:
        seen &= keys >= starts
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def query_starts(starts, queries, T, HAS_STARTS: tl.constexpr):
    """The first key of each query, the lowest of them from 0 on, and the highest."""
    start = queries
    lowest = 0
    highest = 0
    if HAS_STARTS:
        start = tl.load(starts + queries, mask=queries < T, other=0)
        lowest = tl.maximum(tl.min(tl.where(queries < T, start, T), 0), 0)
        highest = tl.max(start, 0)
    return start, lowest, highest


@triton.jit
def key_ranges(
    m0, lowest, highest, T, window, M: tl.constexpr, N: tl.constexpr, HAS_STARTS: tl.constexpr
):
    """Ranges of keys that queries m0 .. m0 + M - 1 read, in whole blocks of N: where each starts, and the end.

    From masked_start on, some query starts within (checked). From old_start on, all keys are older than the window of
    all queries. From border_start on, some are older (checked). From window_start on, all are within it. From
    diagonal_start to end, some lie behind some query (checked).
    """
    end = tl.cdiv(tl.minimum(m0 + M, T), N) * N
    diagonal = (m0 + 1) // N * N
    masked_start = 0
    old_start = 0
    if HAS_STARTS:
        masked_start = lowest // N * N
        old_start = tl.minimum(tl.cdiv(highest, N) * N, end)
    border_start = tl.maximum(old_start, tl.maximum(m0 - window, 0) // N * N)
    window_start = tl.maximum(border_start, tl.cdiv(tl.maximum(m0 + M - 1 - window, 0), N) * N)
    # Where no block lies wholly within the window, the checks go on up to the diagonal, and it is all one range.
    window_start = tl.minimum(window_start, tl.maximum(border_start, diagonal))
    diagonal_start = tl.maximum(window_start, diagonal)
    return masked_start, old_start, border_start, window_start, diagonal_start, end


@triton.jit
def phase_range(phase, first, second, third, fourth, fifth, end):
    """Of three pairs of ranges, that of a phase: where the checked range starts, where the other one, where it ends."""
    low = tl.where(phase == 0, first, tl.where(phase == 1, third, fifth))
    middle = tl.where(phase == 0, second, tl.where(phase == 1, fourth, end))
    high = tl.where(phase == 0, third, tl.where(phase == 1, fifth, end))
    return low, middle, high


@triton.jit
def softmax_step(scores, total, top):
    """Take in a block of scores [M, N]: weights relative to the new maximum, and what the old ones shrink by."""
    new = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new[:, None])
    shrink = tl.exp2(top - new)
    return weights, shrink, total * shrink + tl.sum(weights, 1), new


@triton.jit
def attend_block(
    acc1,
    acc2,
    total,
    top,
    column,
    q1,
    q2,
    k,
    v,
    bias,
    n0,
    queries,
    start,
    T,
    window,
    old,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    N: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    CHECK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Take in keys n0 .. n0 + N - 1, of bias `column`.

    Without CHECK, all queries see all keys of the range, and these are all older than the window (`old`) or all within.
    """
    k1 = load_rows(k, n0, T, N, D, 0, D1, CHECK, DOT)
    products = tl.dot(q1, tl.trans(k1), input_precision="ieee")
    if D2 > 0:
        k2 = load_rows(k, n0, T, N, D, D1, D2, CHECK, DOT)
        products = tl.dot(q2, tl.trans(k2), products, input_precision="ieee")
    scores = scored(products, 1.0, SCALE, SOFTCAP)
    if CHECK:
        keys = tl.arange(0, N)
        scores = delayed(
            scores,
            (queries - n0)[:, None],
            keys[None, :],
            column[None, :],
            (start - n0)[:, None],
            window,
            HAS_STARTS,
        )
    else:
        scores += column[None, :]
    # For the next block: loaded in the block that needs it, Triton 3.6 would copy it to shared memory number by number.
    column = load_numbers(bias, n0 + N, old, N)
    weights, shrink, total, top = softmax_step(scores, total, top)
    weights = weights.to(DOT)
    v1 = load_rows(v, n0, T, N, DV, 0, V1, CHECK, DOT)
    acc1 = tl.dot(weights, v1, acc1 * shrink[:, None], input_precision="ieee")
    if V2 > 0:
        v2 = load_rows(v, n0, T, N, DV, V1, V2, CHECK, DOT)
        acc2 = tl.dot(weights, v2, acc2 * shrink[:, None], input_precision="ieee")
    return acc1, acc2, total, top, column


@triton.jit
def attend_own(
    acc1,
    acc2,
    total,
    top,
    q1,
    q2,
    k,
    v,
    bias,
    starts,
    m0,
    T,
    window,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    DOT: tl.constexpr,
):
    """Take in all of the T keys that queries m0 .. m0 + M - 1 see."""
    queries = m0 + tl.arange(0, M)
    start, lowest, highest = query_starts(starts, queries, T, HAS_STARTS)
    masked_start, old_start, border_start, window_start, diagonal_start, end = key_ranges(
        m0, lowest, highest, T, window, M, N, HAS_STARTS
    )
    # One outer loop, so that the code of a block exists twice and not five times.
    for phase in range(3):
        low, middle, high = phase_range(
            phase, masked_start, old_start, border_start, window_start, diagonal_start, end
        )
        column = load_numbers(bias, low, True, N)
        for n0 in tl.range(low, middle, N):
            acc1, acc2, total, top, column = attend_block(
                acc1, acc2, total, top, column, q1, q2, k, v, bias, n0, queries, start, T, window, True,
                SCALE, SOFTCAP, D, DV, D1, D2, V1, V2, N, HAS_STARTS, True, DOT,
            )  # fmt: skip
        old = phase == 0
        column = load_numbers(bias, middle, old, N)
        for n0 in tl.range(middle, high, N):
            acc1, acc2, total, top, column = attend_block(
                acc1, acc2, total, top, column, q1, q2, k, v, bias, n0, queries, start, T, window, old,
                SCALE, SOFTCAP, D, DV, D1, D2, V1, V2, N, HAS_STARTS, False, DOT,
            )  # fmt: skip
    return acc1, acc2, total, top


@triton.jit
def with_sink(acc1, acc2, total, top, sink, V2: tl.constexpr):
    """Take in one key without a value: its logit is the same for all rows."""
    new = tl.maximum(top, sink * LOG2E)
    shrink = tl.exp2(top - new)
    total = total * shrink + tl.exp2(sink * LOG2E - new)
    acc1 *= shrink[:, None]
    if V2 > 0:
        acc2 *= shrink[:, None]
    return acc1, acc2, total, new


@triton.jit
def load_parts(
    base,
    first,
    count,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    DOT: tl.constexpr,
):
    """Both parts of rows first.. of a matrix [count, D]; the second is the first if D2 is 0."""
    x1 = load_rows(base, first, count, ROWS, D, 0, D1, True, DOT)
    x2 = x1
    if D2 > 0:
        x2 = load_rows(base, first, count, ROWS, D, D1, D2, True, DOT)
    return x1, x2


@triton.jit
def store_parts(
    base,
    first,
    count,
    x1,
    x2,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
):
    """Store both parts of rows first.. of a matrix [count, D]; x2 is not read if D2 is 0."""
    store_rows(base, first, count, x1, ROWS, D, 0, D1)
    if D2 > 0:
        store_rows(base, first, count, x2, ROWS, D, D1, D2)


@triton.jit
def no_keys(M: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr):
    """Sums, total and maximum of M queries before any key."""
    acc1 = tl.zeros([M, V1], tl.float32)
    acc2 = tl.zeros([M, V2 if V2 > 0 else 16], tl.float32)
    return acc1, acc2, tl.zeros([M], tl.float32), tl.full([M], FLOOR, tl.float32)
