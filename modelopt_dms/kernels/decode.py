# SPDX-License-Identifier: Apache-2.0
"""One query token per sequence on paged lists of any lengths: Triton kernels.

What they compute stands in `kernels.decode_reference`. A tile is TILE slots of one list. The tiles of all lists, one
list after the other, are dealt in equal runs to a fixed number of programs, which find their run from the lengths on
the device. A run may end one list, hold others whole, and begin another: whole lists are written at once, the at most
two others as partial results, which `_combine` joins.

Scores stand on end, [TILE, ROWS], with the query heads of a KV head as ROWS: tensor cores take 64 x 16, not 16 x 64.
A key or value row is read as two parts a and b: a power of two of dims, and the rest.

Items are (list, block of query rows): a list is one item unless more than 64 heads share it (MLA).
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelopt_dms.kernels.decoding import (
    as_words,
    code_order,
    from_e2m1,
    from_e4m3,
    from_int8,
    number_factor,
    word_codes,
)
from modelopt_dms.kernels.layout import MOST_ROWS, PAGE, LayerShape, PagePool, PageTables, RowLayout
from modelopt_dms.kernels.prefill_blocks import TRITON_TYPES, split
from modelopt_dms.kernels.reference import Scoring
from modelopt_dms.kernels.variants import Variant, pointer

LOG2E = 1.4426950408889634
MIN_ROWS = 16  # as few as Triton gives to warpgroup tensor cores
LISTS = 4096  # lengths that a program looks at together, at most
PARTS = 16  # partial results that are joined at a time
LATENT_TILE = 32  # 64 of DeepSeek's rows, in stages, would not fit in shared memory


@triton.jit
def _part(codes, scales, row, ok, START: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, NUMBER: tl.constexpr,
          DOT: tl.constexpr):  # fmt: skip
    """Dims START to START + WIDTH, in `code_order`, of rows [TILE] of DIM from `row` on; 0 where not ok."""
    WORD: tl.constexpr = word_codes(NUMBER)
    rows = tl.arange(0, ok.shape[0])
    words = START // WORD + tl.arange(0, WIDTH // WORD)
    mask = ok[:, None]
    if START + WIDTH > DIM:
        mask = mask & (words < DIM // WORD)[None, :]
    at = codes + row * (DIM // WORD) + rows[:, None] * (DIM // WORD) + words[None, :]
    x = tl.load(at, mask=mask, other=0)
    if NUMBER == "nvfp4":
        blocks = START // 16 + tl.arange(0, WIDTH // 16)
        mask = ok[:, None]
        if START + WIDTH > DIM:
            mask = mask & (blocks < DIM // 16)[None, :]
        at = scales + row * (DIM // 16) + rows[:, None] * (DIM // 16) + blocks[None, :]
        x = from_e2m1(x, tl.load(at, mask=mask, other=0), DOT)
    elif NUMBER == "fp8":
        x = from_e4m3(x, DOT)
    elif NUMBER == "int8":
        x = from_int8(x, DOT)
    return x.to(DOT)


@triton.jit
def _row_factors(scales, row, ok):
    """What rows [TILE] from `row` on, encoded with scales of their own, are multiplied by."""
    return 1.0 / tl.load(scales + row + tl.arange(0, ok.shape[0]), mask=ok, other=1.0)


@triton.jit
def _tiles(live, items, ids, BLOCKS: tl.constexpr, TILE: tl.constexpr):
    """Tiles of these items; none of those that do not exist."""
    n = tl.load(live + ids // BLOCKS, mask=ids < items, other=0)
    return (n + (TILE - 1)) // TILE


@triton.jit
def _run(live, items, BLOCKS: tl.constexpr, TILE: tl.constexpr, LISTS: tl.constexpr):
    """This program's run of tiles: the item it begins in, the tile of that item, and how many tiles; the split.

    The split is quotient and rest of all tiles over programs: program p < rest has one tile more than the quotient.
    """
    total = 0
    for base in range(0, items, LISTS):
        total += tl.sum(_tiles(live, items, base + tl.arange(0, LISTS), BLOCKS, TILE))
    program, programs = tl.program_id(0), tl.num_programs(0)
    quotient, rest = total // programs, total % programs
    begin = program * quotient + tl.minimum(program, rest)
    item, before, passed = 0, 0, 0
    for base in range(0, items, LISTS):
        ids = base + tl.arange(0, LISTS)
        tiles = _tiles(live, items, ids, BLOCKS, TILE)
        gone = (passed + tl.cumsum(tiles, 0) <= begin) & (ids < items)
        item += tl.sum(gone.to(tl.int32))
        before += tl.sum(tl.where(gone, tiles, 0))
        passed += tl.sum(tiles)
    count = quotient + (program < rest).to(tl.int32)
    return item, begin - before, count, begin, quotient, rest


@triton.jit
def _program_of(tile, quotient, rest):
    """The program whose run has this tile of all tiles."""
    longer = rest * (quotient + 1)
    return tl.where(
        tile < longer, tile // (quotient + 1), rest + (tile - longer) // tl.maximum(quotient, 1)
    )


@triton.jit
def _next_item(live, item, items, BLOCKS: tl.constexpr, WIDTH: tl.constexpr):
    """The first item from this one on whose list is not empty; there must be one."""
    while tl.load(live + item // BLOCKS) == 0:
        ids = item + tl.arange(0, WIDTH)
        n = tl.load(live + ids // BLOCKS, mask=ids < items, other=0)
        item = tl.min(tl.where(n > 0, ids, item + WIDTH))
    return item


@triton.jit
def _sink_share(lse, sink):
    """What a sink's logit leaves of the output; the log-sum-exp is in base 2."""
    return 1.0 / (1.0 + tl.exp2(sink.to(tl.float32) * 1.4426950408889634 - lse))


@triton.jit
def _queries(q, rows, ok, dims, D: tl.constexpr):
    """Query rows on end: these dims of them [dims, ROWS]."""
    mask = (dims < D)[:, None] & ok[None, :]
    return tl.load(q + rows[None, :] * D + dims[:, None], mask=mask, other=0.0)


@triton.jit
def _power_of_two(x):
    """The largest power of two up to each of these positive numbers, and its inverse."""
    bits = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7F800000
    return bits.to(tl.float32, bitcast=True), (0x7F000000 - bits).to(tl.float32, bitcast=True)


@triton.jit
def _scaled_queries(
    q, rows, ok, scale, SCORE_GAIN: tl.constexpr, D: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    KEY: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Both parts of query rows [., ROWS] in DOT, and the gain [ROWS] of their scores: scale, and what divided them."""
    q_a = _queries(q, rows, ok, code_order(0, A, KEY), D)
    q_b = q_a
    if B > 0:
        q_b = _queries(q, rows, ok, code_order(A, B, KEY), D)
    gain = tl.full([rows.shape[0]], SCORE_GAIN, tl.float32) * tl.load(scale)
    if KEY != "plain":
        # DOT may be float16 where q is bfloat16: powers of two keep q in range, exactly.
        largest = tl.max(tl.abs(q_a), 0)
        if B > 0:
            largest = tl.maximum(largest, tl.max(tl.abs(q_b), 0))
        power, inverse = _power_of_two(largest)
        gain *= power
        q_a *= inverse[None, :]
        if B > 0:
            q_b *= inverse[None, :]
    return q_a.to(DOT), q_b.to(DOT), gain


@triton.jit
def _store(out, acc, rows, ok, dims, DV: tl.constexpr):
    """Write acc [dims, ROWS] to rows of DV numbers."""
    mask = (dims < DV)[:, None] & ok[None, :]
    tl.store(out + rows[None, :] * DV + dims[:, None], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _store_parts(
    out, acc_a, acc_b, share, rows, ok, dims_a,
    DV: tl.constexpr, VA: tl.constexpr, VB: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Write both parts, [VA, ROWS] (of dims_a) and [VB, ROWS], times a share [ROWS], to rows of DV numbers."""
    _store(out, acc_a * share[None, :], rows, ok, dims_a, DV)
    if VB > 0:
        _store(out, acc_b * share[None, :], rows, ok, code_order(VA, VB, VALUE), DV)


@triton.jit(do_not_specialize=["items", "pages"])
def _decode(
    q, keys, key_scales, values, value_scales, table, live, scales, sinks,
    items, pages,
    out, partial, partial_lse, spans,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    D: tl.constexpr, A: tl.constexpr, B: tl.constexpr, KEY: tl.constexpr,
    DV: tl.constexpr, VA: tl.constexpr, VB: tl.constexpr, VALUE: tl.constexpr, LATENT: tl.constexpr,
    SCORE_GAIN: tl.constexpr, CAP: tl.constexpr, WEIGHT_GAIN: tl.constexpr, OUT_GAIN: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, LISTS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Output of whole lists, partial results of others, and which programs have which list.

    q [lists * GROUP, D]; keys to value_scales of the pool, scales None where it has none; table [lists, pages], live
    and scales of the layer's lists; sinks [HEADS * GROUP] or None; items is lists * BLOCKS.

    out [lists * GROUP, DV]. partial [programs, 2, min(GROUP, ROWS), DV] float32 is of the list that a program ends but
    does not begin, and of the one that it begins but does not end; partial_lse is likewise, in base 2. spans [items, 2]
    int32: the first and the last program of every item that is not empty.

    HEADS KV heads have GROUP query heads each, in BLOCKS items of ROWS. Keys of D dims have parts of A and B, padded,
    and number format KEY; values have DV, VA, VB, VALUE. LATENT: part a of keys is also the value, part b lies where
    values do. SCORE_GAIN makes scores logits in base 2 or, with a CAP (in base 2; 0 is none), 2 log2(e) times what tanh
    takes. WEIGHT_GAIN keeps weights times row factors in the range of DOT, the dtype that tensor cores take; OUT_GAIN
    undoes that and what decoding left undone. LISTS: lengths that a program looks at together.
    """
    STORED: tl.constexpr = min(GROUP, ROWS)
    program = tl.program_id(0)
    item, tile, left, at, quotient, rest = _run(live, items, BLOCKS, TILE, LISTS)
    slots = tl.arange(0, TILE)
    rows = tl.arange(0, ROWS)
    while left > 0:
        item = _next_item(live, item, items, BLOCKS, min(LISTS, 128))
        lane = item // BLOCKS
        head = lane % HEADS
        n = tl.load(live + lane)
        tiles = (n + (TILE - 1)) // TILE
        stop = tl.minimum(tiles, tile + left)
        block = item % BLOCKS * ROWS
        ok_rows = block + rows < GROUP
        first_row = lane.to(tl.int64) * GROUP + block
        own = table + lane.to(tl.int64) * pages
        page = tl.load(own + tile * TILE // PAGE)
        q_a, q_b, gain = _scaled_queries(
            q + first_row * D, rows, ok_rows, scales + HEADS + head, SCORE_GAIN, D, A, B, KEY, DOT
        )

        top = tl.full([ROWS], float("-inf"), tl.float32)
        weight = tl.zeros([TILE, ROWS], tl.float32)
        acc_a = tl.zeros([VA, ROWS], tl.float32)
        acc_b = tl.zeros([VB if VB > 0 else 16, ROWS], tl.float32)
        for t in range(tile, stop):
            # The next page's id is on its way while this page's rows are.
            following = tl.load(own + tl.minimum(t + 1, stop - 1) * TILE // PAGE)
            row = page.to(tl.int64) * PAGE + t * TILE % PAGE
            page = following
            ok = t * TILE + slots < n

            k_a = _part(keys, key_scales, row, ok, 0, A, A if LATENT else D, KEY, DOT)
            scores = tl.dot(k_a, q_a, input_precision="ieee")
            if LATENT:
                k_b = _part(values, None, row, ok, 0, B, D - A, VALUE, DOT)
                scores = tl.dot(k_b, q_b, scores, input_precision="ieee")
            elif B > 0:
                k_b = _part(keys, key_scales, row, ok, A, B, D, KEY, DOT)
                scores = tl.dot(k_b, q_b, scores, input_precision="ieee")
            scores *= gain[None, :]
            if key_scales is not None and KEY != "nvfp4":
                scores *= _row_factors(key_scales, row, ok)[:, None]
            if CAP > 0:
                scores = CAP * (1.0 - 2.0 / (tl.exp2(scores) + 1.0))  # tanh(x) = 1 - 2 / (e^2x + 1)
            scores = tl.where(ok[:, None], scores, float("-inf"))

            # Every tile has a live slot, so that the maximum is finite.
            new_top = tl.maximum(top, tl.max(scores, 0))
            fade = tl.exp2(top - new_top)
            top = new_top
            p = tl.exp2(scores - top[None, :])
            weight = weight * fade[None, :] + p
            if value_scales is not None and VALUE != "nvfp4":
                p *= (_row_factors(value_scales, row, ok) * WEIGHT_GAIN)[:, None]
            p = p.to(DOT)
            v_a = k_a if LATENT else _part(values, value_scales, row, ok, 0, VA, DV, VALUE, DOT)
            acc_a = tl.dot(tl.trans(v_a), p, acc_a * fade[None, :], input_precision="ieee")
            if VB > 0:
                v_b = _part(values, value_scales, row, ok, VA, VB, DV, VALUE, DOT)
                acc_b = tl.dot(tl.trans(v_b), p, acc_b * fade[None, :], input_precision="ieee")

        total = tl.sum(weight, 0)
        lse = top + tl.log2(total)
        share = OUT_GAIN * tl.load(scales + 3 * HEADS + head) / total
        dims_a = code_order(0, VA, VALUE)
        if tile == 0 and stop == tiles:
            if sinks is not None:
                sink = tl.load(sinks + head * GROUP + block + rows, mask=ok_rows, other=0.0)
                share *= _sink_share(lse, sink)
            _store_parts(
                out + first_row * DV, acc_a, acc_b, share, rows, ok_rows, dims_a, DV, VA, VB, VALUE
            )
        else:
            place = (2 * program + (tile == 0).to(tl.int32)) * STORED
            to = partial + place * DV
            _store_parts(to, acc_a, acc_b, share, rows, ok_rows, dims_a, DV, VA, VB, VALUE)
            tl.store(partial_lse + place + rows, lse, mask=ok_rows)
        if tile == 0:
            tl.store(spans + 2 * item, program)
            tl.store(spans + 2 * item + 1, _program_of(at + tiles - 1, quotient, rest))
        at += stop - tile
        left -= stop - tile
        tile = 0
        item += 1


@triton.jit
def _combine(
    partial, partial_lse, spans, live, sinks, whole,
    out,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    DV: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Join the partial results of row `program 1` of item `program 0`, in the order of programs; 0 for empty lists.

    Tensors and names as in `_decode`. WIDTH is DV, padded; PARTS are joined at a time. Items that one program had whole
    are in `out` already, or in `whole`, like `out`, and are copied.
    """
    STORED: tl.constexpr = min(GROUP, ROWS)
    item, row = tl.program_id(0), tl.program_id(1)
    lane = item // BLOCKS
    group_row = item % BLOCKS * ROWS + row
    dims = tl.arange(0, WIDTH)
    ok = dims < DV
    at = (lane.to(tl.int64) * GROUP + group_row) * DV + dims
    to = out + at
    if tl.load(live + lane) == 0:
        if group_row < GROUP:
            tl.store(to, tl.zeros([WIDTH], out.dtype.element_ty), mask=ok)
    else:
        first, last = tl.load(spans + 2 * item), tl.load(spans + 2 * item + 1)
        if whole is not None:  # noqa: SIM102 (decided when compiled, the next when run)
            if first == last and group_row < GROUP:
                tl.store(to, tl.load(whole + at, mask=ok, other=0.0), mask=ok)
        if first < last and group_row < GROUP:
            top = float("-inf")
            weight = 0.0
            acc = tl.zeros([WIDTH], tl.float32)
            for start in range(first, last + 1, PARTS):
                programs = start + tl.arange(0, PARTS)
                some = programs <= last
                place = (2 * programs + (programs == first).to(tl.int32)) * STORED + row
                lse = tl.load(partial_lse + place, mask=some, other=float("-inf"))
                x = tl.load(
                    partial + place[:, None] * DV + dims[None, :],
                    mask=some[:, None] & ok[None, :],
                    other=0.0,
                )
                new_top = tl.maximum(top, tl.max(lse, 0))
                fade = tl.exp2(top - new_top)
                share = tl.exp2(lse - new_top)
                acc = acc * fade + tl.sum(share[:, None] * x, 0)
                weight = weight * fade + tl.sum(share, 0)
                top = new_top
            share = 1.0 / weight
            if sinks is not None:
                sink = tl.load(sinks + lane % HEADS * GROUP + group_row)
                share *= _sink_share(top + tl.log2(weight), sink)
            tl.store(to, (acc * share).to(out.dtype.element_ty), mask=ok)


def decode_attention(
    q: Tensor,
    pool: PagePool,
    lists: PageTables,
    scoring: Scoring,
    *,
    programs: int | None = None,
) -> Tensor:
    """As `decode_reference.decode_attention`, on the device and without synchronizing with the host.

    Args:
        q: queries [B, H, D], one a sequence.
        pool: where rows lie.
        lists: which rows each (sequence, KV head) has.
        scoring: scale, softcap, sinks.
        programs: that share the tiles; what a device holds at a time unless given.

    Returns:
        Output [B, H, Dv] in q's dtype.
    """
    return _launch(q, pool, lists, scoring, programs, latent=False)


def decode_latent(
    q: Tensor,
    pool: PagePool,
    lists: PageTables,
    scoring: Scoring,
    *,
    programs: int | None = None,
) -> Tensor:
    """As `decode_reference.decode_latent`: q [B, H, D1 + D2] -> [B, H, D1]. See `decode_attention`.

    Raises:
        ValueError: the latents are not stored in the model's own dtype, or D1 is not a power of two.
    """
    for layout in (pool.key_layout, pool.value_layout):
        if layout.number != "plain":
            raise ValueError(f"latents are read in the model's dtype, not as {layout.number}")
    dim = pool.key_layout.dim
    if dim < 16 or dim & (dim - 1):
        raise ValueError(f"a latent's dim must be a power of two from 16 on, got {dim}")
    return _launch(q, pool, lists, scoring, programs, latent=True)


def _launch(
    q: Tensor,
    pool: PagePool,
    lists: PageTables,
    scoring: Scoring,
    programs: int | None,
    latent: bool,
) -> Tensor:
    q = q.contiguous()
    dot = (
        _dot(TRITON_TYPES[q.dtype], pool.key_layout, pool.value_layout) if q.is_cuda else tl.float32
    )
    heads, group = lists.heads, q.shape[1] // lists.heads
    shape = _shape(pool.key_layout, pool.value_layout, heads, group, scoring, dot, latent)
    rows, blocks, dv = shape["ROWS"], shape["BLOCKS"], shape["DV"]
    items = lists.batch * heads * blocks
    stored = min(group, rows)
    options, resident = _tuning(pool.key_layout, pool.value_layout, rows, latent)
    if programs is None:
        programs = resident * _multiprocessors(q.device)
    out = q.new_empty(*q.shape[:2], dv)
    partial = q.new_empty(programs, 2, stored, dv, dtype=torch.float32)
    partial_lse = q.new_empty(programs, 2, stored, dtype=torch.float32)
    spans = q.new_empty(items, 2, dtype=torch.int32)
    _decode[(programs,)](
        q, as_words(pool.keys), pool.key_scales, as_words(pool.values), pool.value_scales, lists.table, lists.live,
        lists.scales, scoring.sinks, items, lists.table.shape[2], out, partial, partial_lse, spans,
        **shape, LISTS=min(LISTS, triton.next_power_of_2(items)), **options,
    )  # fmt: skip
    _combine[(items, stored)](
        partial, partial_lse, spans, lists.live, scoring.sinks, None, out,
        HEADS=heads, GROUP=group, ROWS=rows, BLOCKS=blocks, DV=dv, WIDTH=triton.next_power_of_2(dv), PARTS=PARTS,
    )  # fmt: skip
    return out


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # as good as any number where kernels are interpreted
    return torch.cuda.get_device_properties(device).multi_processor_count


def _shape(
    keys: RowLayout,
    values: RowLayout,
    heads: int,
    group: int,
    scoring: Scoring,
    dot: tl.dtype,
    latent: bool,
) -> dict[str, Any]:
    """Constexprs of `_decode` that follow from a model and its formats."""
    if latent:
        a, b, va, vb = keys.dim, max(16, triton.next_power_of_2(values.dim)), keys.dim, 0
        dim, dv = keys.dim + values.dim, keys.dim
    else:
        # Tensor cores take 64 rows of a transposed value part at a time, and 16 columns of a key part.
        (a, b), (va, vb) = split(keys.dim), split(values.dim, 64)
        dim, dv = keys.dim, values.dim
    rows = _query_rows(group)
    gain = scoring.scale * number_factor(keys.number, dot) * LOG2E
    # In float16, weights times row factors would lose what is small.
    weight_gain = 256.0 if dot == tl.float16 else 1.0
    return {
        "HEADS": heads,
        "GROUP": group,
        "ROWS": rows,
        "BLOCKS": triton.cdiv(group, rows),
        "D": dim,
        "A": a,
        "B": b,
        "KEY": keys.number,
        "DV": dv,
        "VA": va,
        "VB": vb,
        "VALUE": values.number,
        "LATENT": latent,
        "SCORE_GAIN": gain if scoring.softcap is None else 2 * gain / scoring.softcap,
        "CAP": 0.0 if scoring.softcap is None else scoring.softcap * LOG2E,
        "WEIGHT_GAIN": weight_gain,
        "OUT_GAIN": number_factor(values.number, dot) / (weight_gain if values.per_row else 1.0),
        "PAGE": PAGE,
        "TILE": LATENT_TILE if latent else PAGE,
        "DOT": dot,
    }


def _query_rows(group: int) -> int:
    """Query rows of an item."""
    return min(MOST_ROWS, max(MIN_ROWS, triton.next_power_of_2(group)))


def _dot(model: tl.dtype, keys: RowLayout, values: RowLayout) -> tl.dtype:
    """What tensor cores take: eight bits become float16 in a third of the instructions of bfloat16, and as exactly.

    Weights times the factors of value rows need bfloat16's range.
    """
    if model == tl.bfloat16 and "plain" not in (keys.number, values.number) and not values.per_row:
        return tl.float16
    return model


def _tuning(
    keys: RowLayout, values: RowLayout, rows: int, latent: bool
) -> tuple[dict[str, int], int]:
    """Warps and pipeline stages, and how many such programs a Hopper multiprocessor holds.

    Read off what compilers make of it (docs/kernels.md): 227 KB of shared memory and 65536 registers.
    """
    if latent:
        if rows <= 16:
            return {"num_warps": 4, "num_stages": 3}, 2
        return {"num_warps": 8, "num_stages": 4}, 1
    width = max(keys.dim, values.dim)
    if "plain" in (keys.number, values.number):
        return {"num_warps": 4, "num_stages": 3}, 3 if width <= 64 else 2 if width <= 128 else 1
    lean = keys.number == values.number == "fp8" and not values.per_row and width in (64, 128)
    return {"num_warps": 4, "num_stages": 4}, 3 if lean else 2


def engine_decode(shape: LayerShape, scoring: Scoring, items: int) -> Variant:
    """`decode_attention` for an engine: the part before `engine_combine`, for at most about this many lists."""
    lists = min(LISTS, triton.next_power_of_2(max(1, items)))
    return decode_variant("engine_decode", shape, scoring, lists=lists)


def engine_combine(shape: LayerShape) -> Variant:
    """The part that joins; what `engine_decode` had whole comes in a tensor of its own."""
    return combine_variant("engine_combine", shape, apart=True)


def engine_programs(shape: LayerShape, multiprocessors: int) -> int:
    """Programs of `engine_decode` that a Hopper GPU with so many multiprocessors holds at a time."""
    rows = _query_rows(shape.group)
    return _tuning(shape.keys, shape.values, rows, False)[1] * multiprocessors


def decode_variant(
    name: str, shape: LayerShape, scoring: Scoring, *, lists: int = 1024, latent: bool = False
) -> Variant:
    """`_decode`."""
    keys, values, model = shape.keys, shape.values, pointer(shape.dtype)
    signature: dict[str, str | None] = {
        "q": model,
        "keys": model if keys.number == "plain" else "*i32",
        "key_scales": _scale_pointer(keys),
        "values": model if values.number == "plain" else "*i32",
        "value_scales": _scale_pointer(values),
        "table": "*i32",
        "live": "*i32",
        "scales": "*fp32",
        "sinks": None if scoring.sinks is None else model,
        "items": "i32",
        "pages": "i32",
        "out": model,
        "partial": "*fp32",
        "partial_lse": "*fp32",
        "spans": "*i32",
    }
    dot = _dot(TRITON_TYPES[shape.dtype], keys, values)
    constants = _shape(keys, values, shape.heads, shape.group, scoring, dot, latent)
    options, _ = _tuning(keys, values, constants["ROWS"], latent)
    present = {name: kind for name, kind in signature.items() if kind is not None}
    absent = {name: None for name, kind in signature.items() if kind is None}
    return Variant(name, _decode, present, absent | constants | {"LISTS": lists}, **options)


def combine_variant(name: str, shape: LayerShape, *, apart: bool = False) -> Variant:
    """`_combine` without sinks; `apart`: what one program had whole is not in `out` yet."""
    rows, dv, model = _query_rows(shape.group), shape.values.dim, pointer(shape.dtype)
    types = {"partial": "*fp32", "partial_lse": "*fp32", "spans": "*i32", "live": "*i32"}
    types |= {"whole": model, "out": model} if apart else {"out": model}
    constants = {
        "sinks": None,
        "HEADS": shape.heads,
        "GROUP": shape.group,
        "ROWS": rows,
        "BLOCKS": triton.cdiv(shape.group, rows),
        "DV": dv,
        "WIDTH": triton.next_power_of_2(dv),
        "PARTS": PARTS,
    }
    return Variant(name, _combine, types, constants if apart else constants | {"whole": None})


def _scale_pointer(layout: RowLayout) -> str | None:
    if layout.scales is None:
        return None
    return "*u8" if layout.number == "nvfp4" else "*fp32"
