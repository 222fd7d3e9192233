# SPDX-License-Identifier: Apache-2.0
"""Reading and writing the rows of a layer's lists in plain PyTorch: what the kernels' encoding and decoding mean."""

import torch
from torch import Tensor

from modelopt_dms.kernels.layout import PAGE, PagePool, PageTables, RowLayout
from modelopt_dms.kernels.number_formats import RowFormat


def write_rows(pool: PagePool, lists: PageTables, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Store rows k [B, K, n, Dk] and v [B, K, n, Dv] in slots [B, K, n] that have pages; -1 stores nothing."""
    rows = lists.rows_of(slots)
    k_format, v_format = lists.formats
    _put(pool.keys, pool.key_scales, pool.key_layout, k_format, rows, k)
    _put(pool.values, pool.value_scales, pool.value_layout, v_format, rows, v)


def read_rows(
    pool: PagePool, lists: PageTables, slots: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows [B, K, n, Dk] and [B, K, n, Dv] in this dtype of slots [B, K, n]; zeros for slot -1."""
    rows = lists.rows_of(slots)
    k_format, v_format = lists.formats
    k = _get(pool.keys, pool.key_scales, pool.key_layout, k_format, rows, dtype)
    v = _get(pool.values, pool.value_scales, pool.value_layout, v_format, rows, dtype)
    # What lies where no token is may be NaN, and weights of 0 do not make it 0.
    nothing = (slots < 0)[..., None]
    return k.masked_fill(nothing, 0.0), v.masked_fill(nothing, 0.0)


def stored_rows(pool: PagePool, lists: PageTables, index: int) -> tuple[Tensor, Tensor]:
    """Keys [L, .] and values [L, .] of list `index` = b * K + k in slot order, as they are stored: scales behind codes.

    Synchronizes with the host.
    """
    b, h = divmod(index, lists.heads)
    slots = torch.arange(int(lists.live[b, h]), device=lists.live.device)
    rows = lists.table[b, h, slots // PAGE].long() * PAGE + slots % PAGE
    k, v = (
        _with_scales(codes, scales, rows)
        for codes, scales in ((pool.keys, pool.key_scales), (pool.values, pool.value_scales))
    )
    return k, v


def _put(
    codes: Tensor,
    scales: Tensor | None,
    layout: RowLayout,
    form: RowFormat | None,
    rows: Tensor,
    x: Tensor,
) -> None:
    if form is None:
        codes.flatten(0, 1)[rows] = x
        return
    stored = form.encode(x)
    codes.flatten(0, 1)[rows] = stored[..., : layout.codes]
    if scales is not None:
        scales.flatten(0, 1)[rows] = stored[..., layout.codes :].contiguous().view(scales.dtype)


def _get(
    codes: Tensor,
    scales: Tensor | None,
    layout: RowLayout,
    form: RowFormat | None,
    rows: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    stored = _with_scales(codes, scales, rows)
    return stored.to(dtype) if form is None else form.decode(stored, layout.dim, dtype)


def _with_scales(codes: Tensor, scales: Tensor | None, rows: Tensor) -> Tensor:
    stored = codes.flatten(0, 1)[rows]
    if scales is None:
        return stored
    scale = scales.flatten(0, 1)[rows].contiguous().view(torch.uint8)
    return torch.cat([stored, scale], dim=-1)
