# SPDX-License-Identifier: Apache-2.0
"""Gradients of attention among T tokens under the delayed-eviction mask, in Triton.

Three kernels, no atomics: every gradient is summed by one program in one order, so two runs agree to the last bit.
One goes over blocks of keys (dk, dv, and d keep_logprob as a column sum; the heads of a group in a loop), one over
blocks of queries (dq), one prepares a number a query. The weights are computed anew from the log-sum-exp.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelopt_dms.kernels.layout import padded_length
from modelopt_dms.kernels.prefill_blocks import (
    Tile,
    delayed,
    dot_type,
    head_constants,
    key_ranges,
    load_numbers,
    load_parts,
    load_rows,
    own_starts,
    padded,
    phase_range,
    query_starts,
    scored,
    scoring_constants,
    store_parts,
    uncapped,
)
from modelopt_dms.kernels.prefill_reference import log2_bias
from modelopt_dms.kernels.reference import Prompt, Scoring

DELTA_ROWS = 32
# Above this many columns of dk and dv together, a program cannot hold both: two launches, one for each.
HELD_COLUMNS = 320


def key_tile(D: int, DV: int, dtype: torch.dtype) -> Tile:
    """Block sizes of the kernel over blocks of keys."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    if max(D, DV) <= 64:
        return Tile(64, 128, 8, 3)
    if max(D, DV) <= 128:
        return Tile(64, 128, 8, 2)
    return Tile(32, 128, 8, 2)


def query_tile(D: int, DV: int, dtype: torch.dtype) -> Tile:
    """Block sizes of the kernel over blocks of queries."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    if max(D, DV) <= 128:
        return Tile(128, 64, 8, 2)
    return Tile(128, 32, 8, 2)


@triton.jit(do_not_specialize=["T"])
def _delta_kernel(
    out,
    gradient,
    lse,
    T,
    delta,
    padded_lse,
    DV: tl.constexpr,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
):
    """Dot products of the rows of out and of its gradient, and the log-sum-exps, both padded with zeros."""
    index = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * R
    x = load_rows(out + index * T * DV, first, T, R, DV, 0, WIDTH, True, tl.float32)
    y = load_rows(gradient + index * T * DV, first, T, R, DV, 0, WIDTH, True, tl.float32)
    rows = first + tl.arange(0, R)
    at = index * padded(T) + rows
    tl.store(delta + at, tl.sum(x * y, 1))
    tl.store(padded_lse + at, tl.load(lse + index * T + rows, mask=rows < T, other=0.0))


@triton.jit
def _query_block(
    dq1, dq2, column, q1, q2, do1, do2, lse, delta, k, v, bias, n0, queries, start, T, window, old,
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
):  # fmt: skip
    """Add to dq of a block of queries what keys n0 .. n0 + N - 1 contribute; see `attend_block`."""
    k1 = load_rows(k, n0, T, N, D, 0, D1, CHECK, DOT)
    products = tl.dot(q1, tl.trans(k1), input_precision="ieee")
    k2 = k1
    if D2 > 0:
        k2 = load_rows(k, n0, T, N, D, D1, D2, CHECK, DOT)
        products = tl.dot(q2, tl.trans(k2), products, input_precision="ieee")
    v1 = load_rows(v, n0, T, N, DV, 0, V1, CHECK, DOT)
    dp = tl.dot(do1, tl.trans(v1), input_precision="ieee")
    if V2 > 0:
        v2 = load_rows(v, n0, T, N, DV, V1, V2, CHECK, DOT)
        dp = tl.dot(do2, tl.trans(v2), dp, input_precision="ieee")
    capped = scored(products, 1.0, SCALE, SOFTCAP)
    if CHECK:
        scores = delayed(
            capped,
            (queries - n0)[:, None],
            tl.arange(0, N)[None, :],
            column[None, :],
            (start - n0)[:, None],
            window,
            HAS_STARTS,
        )
    else:
        scores = capped + column[None, :]
    ds = tl.exp2(scores - lse[:, None]) * (dp - delta[:, None])
    ds = uncapped(ds, capped, SCALE, SOFTCAP).to(DOT)
    column = load_numbers(bias, n0 + N, old, N)  # for the next block; see `attend_block`
    dq1 = tl.dot(ds, k1, dq1, input_precision="ieee")
    if D2 > 0:
        dq2 = tl.dot(ds, k2, dq2, input_precision="ieee")
    return dq1, dq2, column


@triton.jit(do_not_specialize=["T", "window"])
def _query_kernel(
    q,
    k,
    v,
    bias,
    starts,
    gradient,
    lse,
    delta,
    T,
    window,
    dq,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
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
    """Gradient of one block of queries of one head."""
    m0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    index = tl.program_id(0).to(tl.int64)
    kv = index // G
    q += index * T * D
    dq += index * T * D
    gradient += index * T * DV
    k += kv * T * D
    v += kv * T * DV
    bias += kv * padded(T)
    lse += index * padded(T)
    delta += index * padded(T)
    queries = m0 + tl.arange(0, M)
    q1, q2 = load_parts(q, m0, T, M, D, D1, D2, DOT)
    do1, do2 = load_parts(gradient, m0, T, M, DV, V1, V2, DOT)
    lses = load_numbers(lse, m0, True, M)
    deltas = load_numbers(delta, m0, True, M)
    start, lowest, highest = query_starts(starts + index // H * T, queries, T, HAS_STARTS)
    masked_start, old_start, border_start, window_start, diagonal_start, end = key_ranges(
        m0, lowest, highest, T, window, M, N, HAS_STARTS
    )
    dq1 = tl.zeros([M, D1], tl.float32)
    dq2 = tl.zeros([M, D2 if D2 > 0 else 16], tl.float32)
    for phase in range(3):
        low, middle, high = phase_range(
            phase, masked_start, old_start, border_start, window_start, diagonal_start, end
        )
        column = load_numbers(bias, low, True, N)
        for n0 in tl.range(low, middle, N):
            dq1, dq2, column = _query_block(
                dq1, dq2, column, q1, q2, do1, do2, lses, deltas, k, v, bias, n0, queries, start, T, window, True,
                SCALE, SOFTCAP, D, DV, D1, D2, V1, V2, N, HAS_STARTS, True, DOT,
            )  # fmt: skip
        old = phase == 0
        column = load_numbers(bias, middle, old, N)
        for n0 in tl.range(middle, high, N):
            dq1, dq2, column = _query_block(
                dq1, dq2, column, q1, q2, do1, do2, lses, deltas, k, v, bias, n0, queries, start, T, window, old,
                SCALE, SOFTCAP, D, DV, D1, D2, V1, V2, N, HAS_STARTS, False, DOT,
            )  # fmt: skip
    store_parts(dq, m0, T, dq1 * SCALE, dq2 * SCALE, M, D, D1, D2)


@triton.jit
def _key_block(
    dk1, dk2, dv1, dv2, dbias, lses, deltas, k1, k2, v1, v2, column, keys, q, gradient, lse, delta, starts, m0, T,
    window, old,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    M: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    WITH_K: tl.constexpr,
    WITH_V: tl.constexpr,
    CHECK: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Add to the gradients of a block of keys what queries m0 .. m0 + M - 1 contribute. All is transposed: [N, M]."""
    q1 = load_rows(q, m0, T, M, D, 0, D1, CHECK, DOT)
    products = tl.dot(k1, tl.trans(q1), input_precision="ieee")
    q2 = q1
    if D2 > 0:
        q2 = load_rows(q, m0, T, M, D, D1, D2, CHECK, DOT)
        products = tl.dot(k2, tl.trans(q2), products, input_precision="ieee")
    capped = scored(products, 1.0, SCALE, SOFTCAP)
    # Rows behind the end have q = 0, gradient = 0, lse = 0 and delta = 0: they add 0 to everything.
    queries = tl.arange(0, M)
    if CHECK:
        start = queries
        if HAS_STARTS:
            start = tl.load(starts + m0 + queries, mask=queries < T - m0, other=0) - m0
        scores = delayed(
            capped,
            queries[None, :],
            (keys - m0)[:, None],
            column[:, None],
            start[None, :],
            window,
            HAS_STARTS,
        )
    else:
        scores = capped + tl.where(old, column, 0.0)[:, None]
    weights = tl.exp2(scores - lses[None, :])
    # For the next block; see `attend_block`.
    lses = load_numbers(lse, m0 + M, True, M)
    do1 = load_rows(gradient, m0, T, M, DV, 0, V1, CHECK, DOT)
    if WITH_V:
        dv1 = tl.dot(weights.to(DOT), do1, dv1, input_precision="ieee")
    do2 = do1
    if V2 > 0:
        do2 = load_rows(gradient, m0, T, M, DV, V1, V2, CHECK, DOT)
        if WITH_V:
            dv2 = tl.dot(weights.to(DOT), do2, dv2, input_precision="ieee")
    if WITH_K:
        dp = tl.dot(v1, tl.trans(do1), input_precision="ieee")
        if V2 > 0:
            dp = tl.dot(v2, tl.trans(do2), dp, input_precision="ieee")
        ds = weights * (dp - deltas[None, :])
        deltas = load_numbers(delta, m0 + M, True, M)
        if CHECK:
            dbias += tl.sum(tl.where((keys - m0)[:, None] < queries[None, :] - window, ds, 0.0), 1)
        else:
            dbias += tl.where(old, tl.sum(ds, 1), 0.0)
        ds = uncapped(ds, capped, SCALE, SOFTCAP).to(DOT)
        dk1 = tl.dot(ds, q1, dk1, input_precision="ieee")
        if D2 > 0:
            dk2 = tl.dot(ds, q2, dk2, input_precision="ieee")
    return dk1, dk2, dv1, dv2, dbias, lses, deltas


@triton.jit
def _query_ranges(n0, end, whole, T, window, M: tl.constexpr, N: tl.constexpr):
    """Ranges of queries that read keys n0 .. n0 + N - 1, in whole blocks of M.

    From diagonal_start on, some key lies behind some query (checked). From window_start on, all keys are within the
    window. From border_start on, some are older (checked). From old_start on, all are older. From masked_start to
    masked_end, documents or the sequence end (checked). Queries from `end` on see none of the keys; some query from
    `whole` on does not see them all.
    """
    diagonal_start = n0 // M * M
    masked_end = tl.cdiv(tl.minimum(end, T), M) * M
    whole = tl.minimum(whole, T) // M * M
    window_start = tl.minimum(tl.cdiv(n0 + N - 1, M) * M, masked_end)
    # n0 + W - M + 1 is the last start of a block that lies wholly within the window of all keys.
    border_start = tl.maximum(window_start, tl.minimum((n0 + window + 1) // M * M, whole))
    old_start = tl.maximum(border_start, tl.minimum(tl.cdiv(n0 + N + window, M) * M, masked_end))
    masked_start = tl.maximum(old_start, whole)
    return diagonal_start, window_start, border_start, old_start, masked_start, masked_end


@triton.jit(do_not_specialize=["T", "window"])
def _key_kernel(
    q,
    k,
    v,
    bias,
    starts,
    ends,
    gradient,
    lse,
    delta,
    T,
    window,
    dk,
    dv,
    dbias,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    V1: tl.constexpr,
    V2: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    WITH_K: tl.constexpr,
    WITH_V: tl.constexpr,
    DOT: tl.constexpr,
):
    """Gradients of one block of keys of one KV head: of its keys and bias (WITH_K), of its values (WITH_V)."""
    block = tl.program_id(0)  # the first keys have the most queries: they go first
    n0 = block * N
    kv = (tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
    batch = kv // K
    k += kv * T * D
    v += kv * T * DV
    keys = n0 + tl.arange(0, N)
    k1, k2 = load_parts(k, n0, T, N, D, D1, D2, DOT)
    v1, v2 = load_parts(v, n0, T, N, DV, V1, V2, DOT)
    column = load_numbers(bias + kv * padded(T), n0, True, N)
    end = T
    whole = T
    if HAS_STARTS:
        ends += batch * 2 * tl.num_programs(0) + block
        end = tl.load(ends)
        whole = tl.load(ends + tl.num_programs(0))
    diagonal_start, window_start, border_start, old_start, masked_start, masked_end = _query_ranges(
        n0, end, whole, T, window, M, N
    )
    dk1 = tl.zeros([N, D1], tl.float32)
    dk2 = tl.zeros([N, D2 if D2 > 0 else 16], tl.float32)
    dv1 = tl.zeros([N, V1], tl.float32)
    dv2 = tl.zeros([N, V2 if V2 > 0 else 16], tl.float32)
    sums = tl.zeros([N], tl.float32)
    for step in range(3 * G):
        phase = step % 3
        head = kv * G + step // 3
        low, middle, high = phase_range(
            phase, diagonal_start, window_start, border_start, old_start, masked_start, masked_end
        )
        q_head = q + head * T * D
        gradient_head = gradient + head * T * DV
        lse_head = lse + head * padded(T)
        delta_head = delta + head * padded(T)
        lses = load_numbers(lse_head, low, True, M)
        deltas = load_numbers(delta_head, low, True, M)
        for m0 in tl.range(low, middle, M):
            dk1, dk2, dv1, dv2, sums, lses, deltas = _key_block(
                dk1, dk2, dv1, dv2, sums, lses, deltas, k1, k2, v1, v2, column, keys, q_head, gradient_head, lse_head,
                delta_head, starts + batch * T, m0, T, window, True,
                SCALE, SOFTCAP, D, DV, D1, D2, V1, V2, M, HAS_STARTS, WITH_K, WITH_V, True, DOT,
            )  # fmt: skip
        lses = load_numbers(lse_head, middle, True, M)
        deltas = load_numbers(delta_head, middle, True, M)
        for m0 in tl.range(middle, high, M):
            dk1, dk2, dv1, dv2, sums, lses, deltas = _key_block(
                dk1, dk2, dv1, dv2, sums, lses, deltas, k1, k2, v1, v2, column, keys, q_head, gradient_head, lse_head,
                delta_head, starts + batch * T, m0, T, window, phase == 1,
                SCALE, SOFTCAP, D, DV, D1, D2, V1, V2, M, HAS_STARTS, WITH_K, WITH_V, False, DOT,
            )  # fmt: skip
    if WITH_K:
        dk += kv * T * D
        store_parts(dk, n0, T, dk1 * SCALE, dk2 * SCALE, N, D, D1, D2)
        tl.store(dbias + kv * T + keys, sums, mask=keys < T)
    if WITH_V:
        dv += kv * T * DV
        store_parts(dv, n0, T, dv1, dv2, N, DV, V1, V2)


def _last_readers(starts: Tensor, T: int, keys: int) -> Tensor:
    """For blocks of keys [B, 2, blocks] int32: where their readers end, and where readers of all of them end.

    Exact where starts never decrease; where they do, safe bounds.
    """
    first = torch.arange(0, T, keys, device=starts.device, dtype=torch.int32)
    last = (first + keys - 1).clamp(max=T - 1)
    later = starts.flip(1).cummin(1).values.flip(1).contiguous()
    sofar = starts.cummax(1).values
    B = len(starts)
    ends = torch.searchsorted(later, last.expand(B, -1).contiguous(), right=True)
    whole = torch.searchsorted(sofar, first.expand(B, -1).contiguous(), right=True)
    return torch.stack([ends, whole], dim=1).to(torch.int32)


def prefill_backward(
    gradient: Tensor,
    out: Tensor,
    lse: Tensor,
    prompt: Prompt,
    starts: Tensor | None,
    scoring: Scoring,
    tiles: tuple[Tile, Tile] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `prefill.prefill_forward`.

    Args:
        gradient: of the output [B, H, T, Dv].
        out: output [B, H, T, Dv].
        lse: log2-sum-exp2 [B, H, T] float32, sinks included.
        prompt: whose mask is not read.
        starts: first visible positions [B, T], or None.
        scoring: scale and softcap.
        tiles: block sizes of the kernels over keys and over queries, None for our choice.

    Returns:
        Gradients of q, k, v and keep_logprob, in their shapes and dtypes.
    """
    q, k, v, gradient, out = (x.contiguous() for x in (prompt.q, prompt.k, prompt.v, gradient, out))
    B, H, T, D = q.shape
    K, DV = k.shape[1], v.shape[-1]
    by_key, by_query = tiles or (key_tile(D, DV, q.dtype), query_tile(D, DV, q.dtype))
    starts = own_starts(starts)
    bias = log2_bias(prompt.keep_logprob)
    inputs: dict[str, Any] = {
        "q": q,
        "k": k,
        "v": v,
        "bias": bias,
        "starts": bias if starts is None else starts,
    }
    inputs |= {"gradient": gradient, "T": T, "window": min(prompt.window, T)}
    inputs |= _padded_rows(gradient, out, lse)
    constants = {
        **scoring_constants(scoring),
        **head_constants(D, DV),
        "G": H // K,
        "HAS_STARTS": starts is not None,
        "DOT": dot_type(q.dtype),
    }
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    dbias = torch.empty_like(prompt.keep_logprob, memory_format=torch.contiguous_format)
    ends = bias if starts is None else _last_readers(starts, T, by_key.keys)
    # Blocks in another dim than the first, as elsewhere, would make registers spill.
    for with_k, with_v in key_passes(D, DV):
        _key_kernel[(triton.cdiv(T, by_key.keys), K, B)](
            **inputs,
            ends=ends,
            dk=dk,
            dv=dv,
            dbias=dbias,
            **constants,
            K=K,
            WITH_K=with_k,
            WITH_V=with_v,
            **_launch_options(by_key),
        )
    _query_kernel[(B * H, triton.cdiv(T, by_query.queries))](
        **inputs, dq=dq, **constants, H=H, **_launch_options(by_query)
    )
    return dq, dk, dv, dbias


def _padded_rows(gradient: Tensor, out: Tensor, lse: Tensor) -> dict[str, Tensor]:
    """What the kernels read of every query, padded: the log-sum-exp, and the product of output and gradient."""
    B, H, T, DV = out.shape
    length = padded_length(T)
    delta, padded_lse = torch.empty(2, B, H, length, dtype=torch.float32, device=out.device)
    _delta_kernel[(B * H, length // DELTA_ROWS)](
        out,
        gradient,
        lse,
        T,
        delta,
        padded_lse,
        DV=DV,
        WIDTH=triton.next_power_of_2(DV),
        R=DELTA_ROWS,
    )
    return {"lse": padded_lse, "delta": delta}


def _launch_options(tile: Tile) -> dict[str, int]:
    return {"M": tile.queries, "N": tile.keys, "num_warps": tile.warps, "num_stages": tile.stages}


def key_passes(D: int, DV: int) -> list[tuple[bool, bool]]:
    """Launches of the kernel over blocks of keys: whether each computes dk, and whether dv."""
    return [(True, True)] if D + DV <= HELD_COLUMNS else [(True, False), (False, True)]
