# SPDX-License-Identifier: Apache-2.0
"""Attention among T tokens under the delayed-eviction mask, forward and backward, in Triton.

The meaning is `kernels.reference.prefill_attention`. Keys fall into blocks that are older than the window for a whole
block of queries (one addition a score), within it, or on a border (everything is checked); only the last are few.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelopt_dms.kernels.prefill_blocks import (
    Tile,
    attend_own,
    dot_type,
    head_constants,
    load_parts,
    no_keys,
    own_starts,
    padded,
    scoring_constants,
    store_parts,
    with_sink,
)
from modelopt_dms.kernels.prefill_reference import log2_bias
from modelopt_dms.kernels.reference import Prompt, Scoring


def forward_tile(D: int, DV: int, dtype: torch.dtype) -> Tile:
    """Block sizes for these head dims."""
    wide = max(D, DV)
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    if wide <= 64:
        # Two programs a multiprocessor: one multiplies while the other takes exponentials.
        return Tile(128, 64, 4, 3)
    if wide <= 128:
        return Tile(128, 64, 8, 3)
    if wide <= 192:
        return Tile(128, 64, 8, 2)
    return Tile(128, 32, 8, 3)  # with 64 keys, registers spill


@triton.jit(do_not_specialize=["T", "window"])
def _forward_kernel(
    q,
    k,
    v,
    bias,
    starts,
    sinks,
    T,
    window,
    out,
    lse,
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
    HAS_SINKS: tl.constexpr,
    DOT: tl.constexpr,
):
    """One block of queries of one head; log-sum-exp in units of log 2."""
    # The last queries have the most keys: they go first.
    m0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    index = tl.program_id(0)
    batch = index // H
    kv = (index // G).to(tl.int64)  # = batch * K + KV head
    q += index.to(tl.int64) * T * D
    k += kv * T * D
    v += kv * T * DV
    queries = m0 + tl.arange(0, M)
    q1, q2 = load_parts(q, m0, T, M, D, D1, D2, DOT)
    acc1, acc2, total, top = no_keys(M, V1, V2)
    acc1, acc2, total, top = attend_own(
        acc1, acc2, total, top, q1, q2, k, v, bias + kv * padded(T), starts + batch * T, m0, T, window,
        SCALE, SOFTCAP, D, DV, D1, D2, V1, V2, M, N, HAS_STARTS, DOT,
    )  # fmt: skip
    if HAS_SINKS:
        sink = tl.load(sinks + index % H).to(tl.float32)
        acc1, acc2, total, top = with_sink(acc1, acc2, total, top, sink, V2)
    out += index.to(tl.int64) * T * DV
    store_parts(out, m0, T, acc1 / total[:, None], acc2 / total[:, None], M, DV, V1, V2)
    tl.store(lse + index.to(tl.int64) * T + queries, top + tl.log2(total), mask=queries < T)


def prefill_forward(
    prompt: Prompt, starts: Tensor | None, scoring: Scoring, tile: Tile | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.prefill_attention`: output [B, H, T, Dv], and log2-sum-exp2 [B, H, T] for the backward pass.

    Args:
        prompt: whose mask is not read.
        starts: the first position [B, T] int32 that each query may see: the start of its document; of padding, its own
            position. None: 0 for all.
        scoring: scale, softcap and sinks.
        tile: block sizes, None for our choice.
    """
    q, k, v = (x.contiguous() for x in (prompt.q, prompt.k, prompt.v))
    bias = log2_bias(prompt.keep_logprob)
    B, H, T, D = q.shape
    K, DV = k.shape[1], v.shape[-1]
    tile = tile or forward_tile(D, DV, q.dtype)
    starts, sinks = own_starts(starts), scoring.sinks
    out = torch.empty(B, H, T, DV, dtype=v.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    _forward_kernel[(B * H, triton.cdiv(T, tile.queries))](
        q,
        k,
        v,
        bias,
        bias if starts is None else starts,
        bias if sinks is None else sinks.float().contiguous(),
        T,
        min(prompt.window, T),
        out,
        lse,
        **scoring_constants(scoring),
        H=H,
        G=H // K,
        **head_constants(D, DV),
        M=tile.queries,
        N=tile.keys,
        HAS_STARTS=starts is not None,
        HAS_SINKS=sinks is not None,
        DOT=dot_type(q.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out, lse
