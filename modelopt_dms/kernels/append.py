# SPDX-License-Identifier: Apache-2.0
"""Taking tokens into paged lists with Triton; what it means stands in `kernels.append_reference`.

`append_token` is one launch: decision, ring, slot, page and encoded rows. `pack` finds its slots with PyTorch on the
device and stores the rows with one kernel. Neither synchronizes with the host.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelopt_dms.kernels.append_reference import Plan, allocate_pages, plan_pack, update_metadata
from modelopt_dms.kernels.encoding import copy_pair, load_rows, store_rows
from modelopt_dms.kernels.gating import Decided, GateInput, LinearGate
from modelopt_dms.kernels.layout import PAGE, LayerShape, PagePool, PageTables, RowLayout
from modelopt_dms.kernels.rollback import UndoLog
from modelopt_dms.kernels.variants import Variant, pointer

FEATURES = 2048  # at a time, of the gate's dot product
NUMBERS = 2048  # of a tile of rows that a program stores


@triton.jit
def _decide(
    features_ptr,
    weight_ptr,
    threshold_ptr,
    positions_ptr,
    sequence,
    head,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ONE_ROW: tl.constexpr,
    ONE_POSITION: tl.constexpr,
    SCALE: tl.constexpr,
    OFFSET: tl.constexpr,
    PROTECT: tl.constexpr,
):
    """Whether scale * (w . x) - offset is above the threshold, and the position is not protected."""
    row = 0 if ONE_ROW else head
    position = tl.load(positions_ptr + (0 if ONE_POSITION else sequence))
    threshold = tl.load(threshold_ptr + row)
    summed = tl.zeros([BLOCK_C], tl.float32)
    for start in tl.static_range(0, C, BLOCK_C):
        at = start + tl.arange(0, BLOCK_C)
        x = tl.load(features_ptr + sequence.to(tl.int64) * C + at, at < C, other=0.0)
        w = tl.load(weight_ptr + row * C + at, at < C, other=0.0)
        summed += x.to(tl.float32) * w
    return (SCALE * tl.sum(summed) - OFFSET > threshold) & (position >= PROTECT)


@triton.jit
def _take_page(free_ptr, counters_ptr, entry, page, fits):
    """A free page, of which the table's entry is told; the same page where there is none or the table is full."""
    if fits:
        left = tl.atomic_add(counters_ptr, -1, sem="relaxed") - 1
        tl.atomic_min(counters_ptr + 1, left, sem="relaxed")
        page = tl.load(free_ptr + left, mask=left >= 0, other=0)
        tl.store(entry, page)
    else:
        tl.atomic_min(counters_ptr + 1, -1, sem="relaxed")
    return page


@triton.jit
def _remember_decision(ring_evict, column, previous, seen, evict, SHIFT: tl.constexpr):
    """Write a decision to the ring: about the token in this column, or with SHIFT about the one before it."""
    if SHIFT == 1:
        if seen > 0:
            tl.store(ring_evict + previous, evict.to(tl.int8))
        # Nothing has decided about this token. The same thread stores both: with a window of 0, they are one place.
        tl.store(ring_evict + column, 0)
    else:
        tl.store(ring_evict + column, evict.to(tl.int8))


@triton.jit
def _append_kernel(
    k_ptr,
    v_ptr,
    evict_ptr,
    features_ptr,
    weight_ptr,
    threshold_ptr,
    positions_ptr,
    active_ptr,
    scales_ptr,
    free_ptr,
    free_stride,
    pages,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    table_ptr,
    live_ptr,
    seen_ptr,
    ring_slot_ptr,
    ring_evict_ptr,
    counters_ptr,
    log_keys_ptr,
    log_values_ptr,
    log_key_scales_ptr,
    log_value_scales_ptr,
    log_expired_ptr,
    log_marked_ptr,
    log_live_ptr,
    K: tl.constexpr,
    RING: tl.constexpr,
    SHIFT: tl.constexpr,
    PAGE: tl.constexpr,
    LOGGED: tl.constexpr,
    KEY_NUMBER: tl.constexpr,
    KEY_PER_ROW: tl.constexpr,
    DK: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    VALUE_NUMBER: tl.constexpr,
    VALUE_PER_ROW: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ONE_ROW: tl.constexpr,
    ONE_POSITION: tl.constexpr,
    SCALE: tl.constexpr,
    OFFSET: tl.constexpr,
    PROTECT: tl.constexpr,
):
    """One program per (sequence, KV head). C = 0: decided already. LOGGED: tokens of the undo log, 0 for none.

    free_stride: places of a sequence's own stack of free pages; 0 where all take from one.

    Without a free list and its counters, a list that lacks a page takes none: its row goes to page 0, which nobody
    reads.
    """
    index = tl.program_id(0)
    lists = tl.num_programs(0)
    sequence = index // K
    head = index % K
    one = tl.arange(0, 1).to(tl.int64)
    wanted = one == 0

    # All that is read comes before anything is written: other warps of the program may still be reading. What needs
    # no other number first comes first, so that it arrives together.
    active = tl.load(active_ptr + sequence)
    seen = tl.load(seen_ptr + index)
    live = tl.load(live_ptr + index)
    k = load_rows(k_ptr, one + index, wanted, KEY_NUMBER, DK, BLOCK_DK)
    v = load_rows(v_ptr, one + index, wanted, VALUE_NUMBER, DV, BLOCK_DV)
    if C == 0:
        evict = tl.load(evict_ptr + index).to(tl.int1)
    else:
        evict = _decide(
            features_ptr, weight_ptr, threshold_ptr, positions_ptr, sequence, head,
            C, BLOCK_C, ONE_ROW, ONE_POSITION, SCALE, OFFSET, PROTECT,
        )  # fmt: skip
    ring = index * RING
    column = seen % RING
    expired = tl.load(ring_slot_ptr + ring + column)
    marked = tl.load(ring_evict_ptr + ring + column).to(tl.int1)
    previous = (seen + RING - 1) % RING
    if SHIFT == 1:
        # With a window of 0, the token just decided about is the one that leaves.
        marked = tl.where((previous == column) & (seen > 0), evict, marked)
    reuse = marked & (expired >= 0)
    slot = tl.where(reuse, expired, live)
    fits = slot < pages * PAGE
    entry = table_ptr + index.to(tl.int64) * pages + slot // PAGE
    page = tl.load(entry, mask=fits, other=0)
    tl.debug_barrier()
    if active == 0:
        return

    if free_ptr is not None:  # noqa: SIM102 (decided when compiled, the next when run)
        if (page == 0) & (slot % PAGE == 0):
            own = sequence.to(tl.int64) * free_stride
            own_counters = counters_ptr + tl.where(free_stride > 0, 2 * sequence, 0)
            page = _take_page(free_ptr + own, own_counters, entry, page, fits)
    row = one + page.to(tl.int64) * PAGE + slot % PAGE
    if LOGGED > 0:
        logged = (seen % LOGGED).to(tl.int64) * lists + index
        copy_pair(
            row, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr,
            one + logged, log_keys_ptr, log_values_ptr, log_key_scales_ptr, log_value_scales_ptr,
            KEY_NUMBER, KEY_PER_ROW, DK, BLOCK_DK, VALUE_NUMBER, VALUE_PER_ROW, DV, BLOCK_DV,
        )  # fmt: skip
        tl.store(log_expired_ptr + logged, expired)
        tl.store(log_marked_ptr + logged, marked.to(tl.int8))
        tl.store(log_live_ptr + logged, live)
        # The row that was logged is overwritten next, by other threads.
        tl.debug_barrier()
    store_rows(
        k, row, wanted, scales_ptr + head, keys_ptr, key_scales_ptr,
        KEY_NUMBER, KEY_PER_ROW, DK, BLOCK_DK,
    )  # fmt: skip
    store_rows(
        v, row, wanted, scales_ptr + 2 * K + head, values_ptr, value_scales_ptr,
        VALUE_NUMBER, VALUE_PER_ROW, DV, BLOCK_DV,
    )  # fmt: skip
    _remember_decision(ring_evict_ptr + ring, column, previous, seen, evict, SHIFT)
    tl.store(ring_slot_ptr + ring + column, tl.where(fits, slot, -1))
    tl.store(live_ptr + index, tl.where(reuse | (slot >= pages * PAGE), live, live + 1))
    tl.store(seen_ptr + index, seen + 1)


@triton.jit
def _pack_kernel(
    k_ptr,
    v_ptr,
    slots_ptr,
    table_ptr,
    scales_ptr,
    tokens,
    pages,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    K: tl.constexpr,
    PAGE: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_NUMBER: tl.constexpr,
    KEY_PER_ROW: tl.constexpr,
    DK: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    VALUE_NUMBER: tl.constexpr,
    VALUE_PER_ROW: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One program stores ROWS tokens of one list, those that have slots."""
    index = tl.program_id(0)
    head = index % K
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = index.to(tl.int64) * tokens + token
    slot = tl.load(slots_ptr + at, token < tokens, other=-1)
    wanted = slot >= 0
    page = tl.load(table_ptr + index.to(tl.int64) * pages + slot // PAGE, wanted, other=0)
    row = page.to(tl.int64) * PAGE + slot % PAGE
    k = load_rows(k_ptr, at, wanted, KEY_NUMBER, DK, BLOCK_DK)
    store_rows(
        k, row, wanted, scales_ptr + head, keys_ptr, key_scales_ptr,
        KEY_NUMBER, KEY_PER_ROW, DK, BLOCK_DK,
    )  # fmt: skip
    v = load_rows(v_ptr, at, wanted, VALUE_NUMBER, DV, BLOCK_DV)
    store_rows(
        v, row, wanted, scales_ptr + 2 * K + head, values_ptr, value_scales_ptr,
        VALUE_NUMBER, VALUE_PER_ROW, DV, BLOCK_DV,
    )  # fmt: skip


@triton.jit
def _move_kernel(
    sources_ptr,
    targets_ptr,
    count_ptr,
    table_ptr,
    pages,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    RING: tl.constexpr,
    PAGE: tl.constexpr,
    KEY_NUMBER: tl.constexpr,
    KEY_PER_ROW: tl.constexpr,
    DK: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    VALUE_NUMBER: tl.constexpr,
    VALUE_PER_ROW: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One program moves the rows of one list, as they are stored; no target is also a source."""
    index = tl.program_id(0)
    one = tl.arange(0, 1).to(tl.int64)
    table = table_ptr + index.to(tl.int64) * pages
    for i in range(tl.load(count_ptr + index)):
        source = tl.load(sources_ptr + index * RING + i)
        target = tl.load(targets_ptr + index * RING + i)
        old = one + tl.load(table + source // PAGE).to(tl.int64) * PAGE + source % PAGE
        new = one + tl.load(table + target // PAGE).to(tl.int64) * PAGE + target % PAGE
        copy_pair(
            old, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr,
            new, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr,
            KEY_NUMBER, KEY_PER_ROW, DK, BLOCK_DK, VALUE_NUMBER, VALUE_PER_ROW, DV, BLOCK_DV,
        )  # fmt: skip


def append_token(
    k: Tensor,
    v: Tensor,
    gate: GateInput,
    pool: PagePool,
    lists: PageTables,
    log: UndoLog | None = None,
) -> None:
    """As `append_reference.append_token`, in one launch that a CUDA graph can capture."""
    _append_kernel[(lists.batch * lists.heads,)](
        *_as_stored(k, v, pool),
        *_gate_pointers(gate),
        lists.active.view(torch.uint8),
        lists.scales,
        pool.free,
        0 if pool.shared else pool.free.stride(0),
        lists.table.shape[2],
        pool.keys,
        pool.values,
        pool.key_scales,
        pool.value_scales,
        lists.table,
        lists.live,
        lists.seen,
        lists.ring_slot,
        lists.ring_evict.view(torch.uint8),
        pool.counters,
        *_log_pointers(log),
        **_append_constants(
            (pool.key_layout, pool.value_layout),
            lists.heads,
            lists.window,
            lists.shift,
            0 if log is None else log.tokens,
        ),
        **_gate_constants(gate),
        num_warps=_append_warps(gate),
    )


def pack(
    k: Tensor, v: Tensor, evict: Tensor, valid: Tensor | None, pool: PagePool, lists: PageTables
) -> None:
    """As `append_reference.pack`."""
    apply_plan(plan_pack(evict, valid, lists), k, v, pool, lists)


def apply_plan(plan: Plan, k: Tensor, v: Tensor, pool: PagePool, lists: PageTables) -> None:
    """As `append_reference.apply_plan`."""
    layouts = (pool.key_layout, pool.value_layout)
    stored = (pool.keys, pool.values, pool.key_scales, pool.value_scales)
    pages = lists.table.shape[2]
    number = lists.batch * lists.heads
    if plan.moves is not None:
        moves = plan.moves
        _move_kernel[(number,)](
            moves.sources.contiguous(),
            moves.targets.contiguous(),
            moves.count.contiguous(),
            lists.table,
            pages,
            *stored,
            **move_constants(layouts, lists.ring),
        )
    allocate_pages(plan, pool, lists)
    T = plan.slots.shape[2]
    constants = _pack_constants(layouts, lists.heads)
    _pack_kernel[(number, triton.cdiv(T, constants["ROWS"]))](
        *_as_stored(k, v, pool),
        plan.slots.contiguous(),
        lists.table,
        lists.scales,
        T,
        pages,
        *stored,
        **constants,
    )
    update_metadata(plan, lists)


def _as_stored(k: Tensor, v: Tensor, pool: PagePool) -> list[Tensor]:
    """Contiguous rows; in the store's dtype where they are stored as they are."""
    pairs = ((k, pool.key_layout), (v, pool.value_layout))
    return [(x.to(y.dtype) if y.number == "plain" else x).contiguous() for x, y in pairs]


def _log_pointers(log: UndoLog | None) -> list[Tensor | None]:
    if log is None:
        return [None] * 7
    rows = [log.keys, log.values, log.key_scales, log.value_scales]
    return [*rows, log.expired, log.marked.view(torch.uint8), log.live]


def _gate_pointers(gate: GateInput) -> list[Tensor | None]:
    if isinstance(gate, Decided):
        return [gate.evict.contiguous().view(torch.uint8), None, None, None, None]
    tensors = (gate.features, gate.weight.float(), gate.threshold.float(), gate.positions)
    return [None, *(x.contiguous() for x in tensors)]


def _gate_constants(gate: GateInput) -> dict[str, Any]:
    if isinstance(gate, Decided):
        return _linear_constants(0, True, True, 0.0, 0.0, 0)
    return _linear_constants(
        gate.features.shape[1],
        len(gate.weight) == 1,
        len(gate.positions) == 1,
        gate.scale,
        gate.offset,
        gate.protect,
    )


def _linear_constants(
    width: int, one_row: bool, one_position: bool, scale: float, offset: float, protect: int
) -> dict[str, Any]:
    return {
        "C": width,
        "BLOCK_C": min(FEATURES, triton.next_power_of_2(max(1, width))),
        "ONE_ROW": one_row,
        "ONE_POSITION": one_position,
        "SCALE": float(scale),
        "OFFSET": float(offset),
        "PROTECT": protect,
    }


def _append_warps(gate: GateInput) -> int:
    return 4 if isinstance(gate, LinearGate) else 1


def _row_constants(layouts: tuple[RowLayout, RowLayout]) -> dict[str, Any]:
    """How keys and values are stored."""
    found: dict[str, Any] = {}
    for name, dim, layout in zip(("KEY", "VALUE"), ("DK", "DV"), layouts, strict=True):
        found |= {
            f"{name}_NUMBER": layout.number,
            f"{name}_PER_ROW": layout.per_row,
            dim: layout.dim,
            f"BLOCK_{dim}": triton.next_power_of_2(layout.dim),
        }
    return found


def _append_constants(
    layouts: tuple[RowLayout, RowLayout], heads: int, window: int, shift: int, logged: int
) -> dict[str, Any]:
    found = {"K": heads, "RING": window + 1, "SHIFT": shift, "PAGE": PAGE, "LOGGED": logged}
    return found | _row_constants(layouts)


def _pack_constants(layouts: tuple[RowLayout, RowLayout], heads: int) -> dict[str, Any]:
    found = _row_constants(layouts)
    rows = max(1, NUMBERS // max(found["BLOCK_DK"], found["BLOCK_DV"]))
    return {"K": heads, "PAGE": PAGE, "ROWS": rows} | found


def move_constants(layouts: tuple[RowLayout, RowLayout], ring: int) -> dict[str, Any]:
    """Constexprs of `_move_kernel`."""
    return {"RING": ring, "PAGE": PAGE} | _row_constants(layouts)


def engine_append(shape: LayerShape) -> Variant:
    """`append_token` for an engine: of decided tokens, and the host gives pages."""
    return append_variant("engine_append", shape, 0, takes_pages=False)


def engine_pack(shape: LayerShape) -> Variant:
    """`pack` for an engine: rows to slots that are known."""
    return pack_variant("engine_pack", shape)


def append_variant(
    name: str, shape: LayerShape, features: int, *, logged: int = 0, takes_pages: bool = True
) -> Variant:
    """`_append_kernel` with a linear gate of so many features, 0 for decided tokens."""
    layouts = (shape.keys, shape.values)
    model = pointer(shape.dtype)
    types = {"k_ptr": model, "v_ptr": model, "active_ptr": "*u8", "scales_ptr": "*fp32"}
    if features:
        types |= {"features_ptr": model, "weight_ptr": "*fp32"}
        types |= {"threshold_ptr": "*fp32", "positions_ptr": "*i64"}
    else:
        types["evict_ptr"] = "*u8"
    if takes_pages:
        types |= {"free_ptr": "*i32", "counters_ptr": "*i32", "free_stride": "i32"}
    types |= {"pages": "i32"} | stored_types(layouts)
    types |= {f"{x}_ptr": "*i32" for x in ("table", "live", "seen", "ring_slot")}
    types["ring_evict_ptr"] = "*u8"
    if logged:
        types |= {f"log_{x}": kind for x, kind in stored_types(layouts).items()}
        types |= {"log_expired_ptr": "*i32", "log_marked_ptr": "*u8", "log_live_ptr": "*i32"}
    constants = _append_constants(layouts, shape.heads, shape.window, shape.shift, logged)
    constants |= _linear_constants(features, False, False, 100.0, 5.0, 0)
    return variant(name, _append_kernel, types, constants, 4 if features else 1)


def pack_variant(name: str, shape: LayerShape) -> Variant:
    """`_pack_kernel`."""
    layouts, model = (shape.keys, shape.values), pointer(shape.dtype)
    types = {"k_ptr": model, "v_ptr": model, "slots_ptr": "*i32", "table_ptr": "*i32"}
    types |= {"scales_ptr": "*fp32", "tokens": "i32", "pages": "i32"} | stored_types(layouts)
    return variant(name, _pack_kernel, types, _pack_constants(layouts, shape.heads), 4)


def stored_types(layouts: tuple[RowLayout, RowLayout]) -> dict[str, str]:
    """Triton types of the pool's tensors; those that do not exist are left out."""
    found = {}
    for name, scales, layout in zip(
        ("keys_ptr", "values_ptr"), ("key_scales_ptr", "value_scales_ptr"), layouts, strict=True
    ):
        found[name] = pointer(layout.dtype)
        if layout.scales is not None:
            found[scales] = pointer(layout.scales[1])
    return found


def variant(
    name: str, kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int
) -> Variant:
    """A variant in which pointers without a type are None."""
    absent = {x: None for x in kernel.arg_names if x not in types and x not in constants}
    return Variant(name, kernel, types, absent | constants, num_warps=warps)
