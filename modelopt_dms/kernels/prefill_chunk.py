# SPDX-License-Identifier: Apache-2.0
"""Attention of a chunk of a prompt onto a paged cache, in Triton: one program first reads pages, then the chunk itself.

The meaning is `kernels.prefill_reference.attend_chunk`. Forward only. Lengths are read on the device, without
synchronizing with the host.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from modelopt_dms.kernels.decoding import (
    as_words,
    from_e2m1,
    from_e4m3,
    from_int8,
    number_factor,
    word_codes,
)
from modelopt_dms.kernels.layout import PAGE, LayerShape, PagePool, PageTables, RowLayout
from modelopt_dms.kernels.prefill_blocks import (
    FLOOR,
    TRITON_TYPES,
    Tile,
    attend_own,
    dot_type,
    head_constants,
    load_parts,
    load_rows,
    no_keys,
    own_starts,
    padded,
    scored,
    scoring_constants,
    softmax_step,
    store_parts,
    with_sink,
)
from modelopt_dms.kernels.prefill_reference import Chunk, log2_bias
from modelopt_dms.kernels.reference import Scoring
from modelopt_dms.kernels.variants import Variant, pointer


def chunk_tile(D: int, DV: int, dtype: torch.dtype) -> Tile:
    """Block sizes for these head dims."""
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1)
    return Tile(128, 64, 8, 2)


@triton.jit
def _block_scales(
    scales,
    page,
    count,
    PAGE: tl.constexpr,
    NUMBER: tl.constexpr,
    D: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """NVFP4 only: the scales [PAGE, WIDTH / 16] of the blocks of columns OFFSET.. of a page's `count` rows."""
    if NUMBER == "nvfp4":
        at = scales + page.to(tl.int64) * (PAGE * D // 16)
        return load_rows(at, 0, count, PAGE, D // 16, OFFSET // 16, WIDTH // 16, True, tl.uint8)
    else:
        return page


@triton.jit
def _scales_of_page(
    scales,
    page,
    count,
    PAGE: tl.constexpr,
    NUMBER: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
):
    """`_block_scales` of both parts of rows; the second is the first if D2 is 0."""
    first = _block_scales(scales, page, count, PAGE, NUMBER, D, 0, D1)
    second = first
    if D2 > 0:
        second = _block_scales(scales, page, count, PAGE, NUMBER, D, D1, D2)
    return first, second


@triton.jit
def _page_rows(
    codes,
    scale,
    page,
    count,
    PAGE: tl.constexpr,
    NUMBER: tl.constexpr,
    D: tl.constexpr,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    DOT: tl.constexpr,
):
    """Columns OFFSET.. of a page's `count` rows, decoded: [PAGE, WIDTH]; scales of heads and rows left out.

    Zeros outside: what a recycled page holds behind its last row may be NaN, and weights of 0 do not make it 0.
    """
    first = page.to(tl.int64) * PAGE
    if NUMBER == "plain":
        return load_rows(codes + first * D, 0, count, PAGE, D, OFFSET, WIDTH, True, DOT)
    else:
        WORD: tl.constexpr = word_codes(NUMBER)
        at = codes + first * (D // WORD)
        words = load_rows(
            at, 0, count, PAGE, D // WORD, OFFSET // WORD, WIDTH // WORD, True, tl.int32
        )
        if NUMBER == "nvfp4":
            x = from_e2m1(words, scale, DOT)
        elif NUMBER == "fp8":
            x = from_e4m3(words, DOT)
        else:
            x = from_int8(words, DOT)
        # Decoding leaves the first codes of all words, then the second. Threads hold whole words: this moves nothing.
        x = x.reshape([PAGE, WORD, WIDTH // WORD]).permute(0, 2, 1).reshape([PAGE, WIDTH])
        if DOT != tl.float32:  # noqa: SIM300
            # Without a step in between, Triton 3.6 would view shared memory in the shape before, and fail.
            x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], x.dtype, True, 2)
        return x


@triton.jit
def _row_factor(scales, page, PAGE: tl.constexpr, inside):
    """What numbers of a page's rows [PAGE] must be multiplied by: the inverse of the stored scale; 0 outside."""
    at = scales + page.to(tl.int64) * PAGE + tl.arange(0, PAGE)
    scale = tl.load(at, mask=inside, other=1.0)
    return tl.where(inside, 1.0 / scale, 0.0)


@triton.jit
def _page_scores(
    q1, q2, keys, scales, scale1, scale2, factor, page, count, here,
    SCALE: tl.constexpr, SOFTCAP: tl.constexpr, PAGE: tl.constexpr, NUMBER: tl.constexpr, PER_ROW: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Scores [M, PAGE] of queries, in two parts, on the keys of a page; scale1 and scale2 are their `_block_scales`."""
    k1 = _page_rows(keys, scale1, page, count, PAGE, NUMBER, D, 0, D1, DOT)
    products = tl.dot(q1, tl.trans(k1), input_precision="ieee")
    if D2 > 0:
        k2 = _page_rows(keys, scale2, page, count, PAGE, NUMBER, D, D1, D2, DOT)
        products = tl.dot(q2, tl.trans(k2), products, input_precision="ieee")
    if PER_ROW:
        row_factor = _row_factor(scales, page, PAGE, here)
        return scored(products, row_factor[None, :], SCALE, SOFTCAP)
    else:
        return scored(products, factor, SCALE, SOFTCAP)


@triton.jit(do_not_specialize=["T", "window", "P", "E"])
def _chunk_kernel(
    q,
    k,
    v,
    bias,
    starts,
    first,
    expiry,
    keys,
    values,
    key_scales,
    value_scales,
    head_scales,
    table,
    live,
    sinks,
    T,
    window,
    P,
    E,
    out,
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
    PAGE: tl.constexpr,
    KEY_NUMBER: tl.constexpr,
    KEY_FACTOR: tl.constexpr,
    KEY_PER_ROW: tl.constexpr,
    VALUE_NUMBER: tl.constexpr,
    VALUE_FACTOR: tl.constexpr,
    VALUE_PER_ROW: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_EXPIRY: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    DOT: tl.constexpr,
):
    """One block of queries of one head: first over the pages of its list, then over the chunk."""
    K: tl.constexpr = H // G
    m0 = (tl.num_programs(1) - 1 - tl.program_id(1)) * M
    index = tl.program_id(0)
    batch = index // H
    kv = (index // G).to(tl.int64)  # = batch * K + KV head
    q += index.to(tl.int64) * T * D
    queries = m0 + tl.arange(0, M)
    q1, q2 = load_parts(q, m0, T, M, D, D1, D2, DOT)
    acc1, acc2, total, top = no_keys(M, V1, V2)

    length = tl.load(live + kv)
    pages = tl.minimum(tl.cdiv(length, PAGE), P)
    if HAS_STARTS:
        start = tl.load(starts + batch * T + queries, mask=queries < T, other=0)
        pages = tl.where(tl.min(start, 0) < 0, pages, 0)
    positions = tl.load(first + batch) + queries
    key_factor = KEY_FACTOR
    value_factor = VALUE_FACTOR
    if KEY_NUMBER != "plain":
        key_factor *= tl.load(head_scales + K + kv % K)
    if VALUE_NUMBER != "plain":
        value_factor *= tl.load(head_scales + 3 * K + kv % K)
    table += kv * P
    expiry += kv * E * PAGE
    # What addresses or little numbers a page needs is loaded a page ahead (see `attend_block`).
    page = tl.load(table)
    rows = tl.arange(0, PAGE)
    last = rows
    if HAS_EXPIRY:
        last = tl.load(expiry + rows)
    k_scale1, k_scale2 = _scales_of_page(key_scales, page, length, PAGE, KEY_NUMBER, D, D1, D2)
    v_scale1, v_scale2 = _scales_of_page(value_scales, page, length, PAGE, VALUE_NUMBER, DV, V1, V2)
    for place in tl.range(0, pages):
        following = tl.load(table + tl.minimum(place + 1, P - 1))
        count = length - place * PAGE
        here = rows < count
        scores = _page_scores(
            q1, q2, keys, key_scales, k_scale1, k_scale2, key_factor, page, count, here,
            SCALE, SOFTCAP, PAGE, KEY_NUMBER, KEY_PER_ROW, D, D1, D2, DOT,
        )  # fmt: skip
        if HAS_EXPIRY:
            last = tl.where(here, last, -1)
            scores = tl.where(positions[:, None] <= last[None, :], scores, float("-inf"))
            last = tl.load(expiry + tl.minimum(place + 1, E - 1) * PAGE + rows)
        else:
            scores = tl.where(here[None, :], scores, float("-inf"))
        weights, shrink, total, top = softmax_step(scores, total, top)
        if VALUE_PER_ROW:
            factor = _row_factor(value_scales, page, PAGE, here)
            weights *= (factor * (1.0 / VALUE_FACTOR))[None, :]
        weights = weights.to(DOT)
        v1 = _page_rows(values, v_scale1, page, count, PAGE, VALUE_NUMBER, DV, 0, V1, DOT)
        acc1 = tl.dot(weights, v1, acc1 * shrink[:, None], input_precision="ieee")
        if V2 > 0:
            v2 = _page_rows(values, v_scale2, page, count, PAGE, VALUE_NUMBER, DV, V1, V2, DOT)
            acc2 = tl.dot(weights, v2, acc2 * shrink[:, None], input_precision="ieee")
        page = following
        count -= PAGE
        k_scale1, k_scale2 = _scales_of_page(key_scales, page, count, PAGE, KEY_NUMBER, D, D1, D2)
        v_scale1, v_scale2 = _scales_of_page(
            value_scales, page, count, PAGE, VALUE_NUMBER, DV, V1, V2
        )
    if VALUE_NUMBER != "plain":
        acc1 *= value_factor
        if V2 > 0:
            acc2 *= value_factor
    if HAS_STARTS:
        # Queries whose documents start within the chunk read none of what was before it.
        reads = start < 0
        total = tl.where(reads, total, 0.0)
        top = tl.where(reads, top, FLOOR)
        acc1 = tl.where(reads[:, None], acc1, 0.0)
        if V2 > 0:
            acc2 = tl.where(reads[:, None], acc2, 0.0)
    acc1, acc2, total, top = attend_own(
        acc1, acc2, total, top, q1, q2, k + kv * T * D, v + kv * T * DV, bias + kv * padded(T), starts + batch * T,
        m0, T, window, SCALE, SOFTCAP, D, DV, D1, D2, V1, V2, M, N, HAS_STARTS, DOT,
    )  # fmt: skip
    if HAS_SINKS:
        sink = tl.load(sinks + index % H).to(tl.float32)
        acc1, acc2, total, top = with_sink(acc1, acc2, total, top, sink, V2)
    out += index.to(tl.int64) * T * DV
    store_parts(out, m0, T, acc1 / total[:, None], acc2 / total[:, None], M, DV, V1, V2)


def attend_chunk(
    chunk: Chunk,
    pool: PagePool,
    lists: PageTables,
    scoring: Scoring,
    tile: Tile | None = None,
) -> Tensor:
    """As `prefill_reference.attend_chunk`: output [B, H, T, Dv]; `tile` is our choice where it is None."""
    q, k, v = (x.contiguous() for x in (chunk.q, chunk.k, chunk.v))
    first, expiry = chunk.first.to(torch.int32).contiguous(), chunk.expiry
    bias = log2_bias(torch.where(chunk.evict, float("-inf"), 0.0))
    B, H, T, D = q.shape
    K, DV = k.shape[1], v.shape[-1]
    tile = tile or chunk_tile(D, DV, q.dtype)
    starts, sinks = own_starts(chunk.starts), scoring.sinks
    if expiry is not None and expiry.shape[2] % PAGE:  # the kernel reads whole pages of it
        expiry = F.pad(expiry, (0, -expiry.shape[2] % PAGE))
    expiry = None if expiry is None else expiry.contiguous()
    out = torch.empty(B, H, T, DV, dtype=v.dtype, device=q.device)
    dot = dot_type(q.dtype)
    _chunk_kernel[(B * H, triton.cdiv(T, tile.queries))](
        q,
        k,
        v,
        bias,
        first if starts is None else starts,
        first,
        first if expiry is None else expiry,
        as_words(pool.keys),
        as_words(pool.values),
        lists.scales if pool.key_scales is None else pool.key_scales,
        lists.scales if pool.value_scales is None else pool.value_scales,
        lists.scales,
        lists.table,
        lists.live,
        lists.scales if sinks is None else sinks.float().contiguous(),
        T,
        min(lists.window, T),
        lists.table.shape[2],
        0 if expiry is None else expiry.shape[2] // PAGE,
        out,
        **scoring_constants(scoring),
        H=H,
        G=H // K,
        **head_constants(D, DV),
        M=tile.queries,
        N=tile.keys,
        PAGE=PAGE,
        **page_constants(pool.key_layout, pool.value_layout, dot),
        HAS_STARTS=starts is not None,
        HAS_EXPIRY=expiry is not None,
        HAS_SINKS=sinks is not None,
        DOT=dot,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def page_constants(keys: RowLayout, values: RowLayout, dot: tl.dtype) -> dict[str, object]:
    """Constexprs of the formats of keys and values."""
    value_factor = number_factor(values.number, dot)
    if values.per_row and dot == tl.float16:
        value_factor = (
            2.0**-8
        )  # weights are this much larger: times a row's factor, small ones would lose bits
    return {
        "KEY_NUMBER": keys.number,
        "KEY_FACTOR": number_factor(keys.number, dot),
        "KEY_PER_ROW": keys.per_row,
        "VALUE_NUMBER": values.number,
        "VALUE_FACTOR": value_factor,
        "VALUE_PER_ROW": values.per_row,
    }


def engine_chunk(shape: LayerShape, scoring: Scoring) -> Variant:
    """`attend_chunk` for an engine: of prompts that are padded; without pointers that it does not read."""
    # Larger blocks of rows this wide would spill.
    wide = max(shape.keys.dim, shape.values.dim) > 128
    tile = Tile(64, 32, 8, 2) if wide else None
    made = chunk_variant("engine_chunk", shape, scoring, documents=True, tile=tile)
    unread = [x for x in ("key_scales", "value_scales") if _layout(shape, x).scales is None]
    unread += ["sinks"] if scoring.sinks is None else []
    types = {name: kind for name, kind in made.signature.items() if name not in unread}
    return replace(
        made, signature=types, constexprs=made.constexprs | {name: None for name in unread}
    )


def _layout(shape: LayerShape, name: str) -> RowLayout:
    return shape.keys if name.startswith("key") else shape.values


def chunk_variant(
    name: str,
    shape: LayerShape,
    scoring: Scoring,
    *,
    documents: bool = False,
    tile: Tile | None = None,
) -> Variant:
    """The kernel where rows expire; `documents`: they have starts."""
    tile = tile or chunk_tile(shape.keys.dim, shape.values.dim, shape.dtype)
    dot = TRITON_TYPES[shape.dtype]
    types = {x: pointer(shape.dtype) for x in ("q", "k", "v", "out")}
    types |= {x: "*fp32" for x in ("bias", "head_scales", "sinks")}
    types |= {x: "*i32" for x in ("starts", "first", "expiry", "table", "live")}
    types |= {x: "i32" for x in ("T", "window", "P", "E")}
    for codes, scales in (("keys", "key_scales"), ("values", "value_scales")):
        layout = _layout(shape, codes)
        types[codes] = pointer(layout.dtype) if layout.number == "plain" else "*i32"
        types[scales] = "*u8" if layout.number == "nvfp4" else "*fp32"
    constants = {
        **scoring_constants(scoring),
        **head_constants(shape.keys.dim, shape.values.dim),
        **page_constants(shape.keys, shape.values, dot),
        "H": shape.heads * shape.group,
        "G": shape.group,
        "M": tile.queries,
        "N": tile.keys,
        "PAGE": PAGE,
        "HAS_STARTS": documents,
        "HAS_EXPIRY": True,
        "HAS_SINKS": scoring.sinks is not None,
        "DOT": dot,
    }
    return Variant(name, _chunk_kernel, types, constants, tile.warps, tile.stages)
