# SPDX-License-Identifier: Apache-2.0
"""Random inputs of the ops: lists in pages with rows in any format, prompts, gates; and what counts as agreement."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_dms.kernels.gating import LinearGate
from modelopt_dms.kernels.layout import PAGE, PagePool, PageTables, RowLayout
from modelopt_dms.kernels.number_formats import Fp8, Nvfp4, RowFormat
from modelopt_dms.kernels.reference import Scoring

FORMATS = ("bf16", "fp8", "nvfp4")
# Random rows are drawn once and repeated: drawing gigabytes takes longer than measuring.
SAMPLE_ROWS = 4096
AMAX = 5.0  # of random normal numbers, nearly
# Relative error in the norm: bf16 operands are rounded to 2^-9, and outputs too.
TOLERANCE = 1e-2
# Gradients go through one more rounded product.
GRADIENT_TOLERANCE = 3e-2


@dataclass(frozen=True)
class Heads:
    """One attention layer: kv = K heads, group = G query heads on each, dim = D."""

    kv: int = 8
    group: int = 4
    dim: int = 128

    @property
    def scoring(self) -> Scoring:
        """Plain scaled dot products."""
        return Scoring(self.dim**-0.5)


@dataclass(frozen=True)
class Paged:
    """Layers of one cache, and queries for them.

    Attributes:
        heads: of every layer.
        pool: the pages of all layers.
        layers: their lists.
        q: queries [B, H, D], one tensor a layer.
    """

    heads: Heads
    pool: PagePool
    layers: list[PageTables]
    q: list[Tensor]

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.pool.keys.device

    def rows(self, layer: int, kind: str) -> Tensor:
        """Rows [B, K, S, D] in the model's dtype of a plain pool: "keys" or "values", padded to the longest list."""
        lists = self.layers[layer]
        slots = torch.arange(int(lists.live.max()), device=self.device)
        at = lists.rows_of(torch.where(slots < lists.live[..., None], slots, -1))
        codes: Tensor = getattr(self.pool, kind)
        return codes.flatten(0, 1)[at]


def row_formats(name: str, kv: int) -> tuple[RowFormat | None, RowFormat | None]:
    """Key and value format: FP8 with a scale a KV head, NVFP4 with its one global scale, or the model's dtype."""
    if name == "fp8":
        return (Fp8(torch.full((kv,), AMAX)),) * 2
    if name == "nvfp4":
        return (Nvfp4(torch.tensor([AMAX])),) * 2
    return None, None


def make_pool(
    pages: int, heads: Heads, form: RowFormat | None, dtype: torch.dtype, device: torch.device
) -> PagePool:
    """An empty pool whose keys and values lie alike."""
    layout = RowLayout.of(form, heads.dim, dtype)
    return PagePool.make(pages, layout, layout, device)


def lengths_of(lists: int, mean: int, spread: float, device: torch.device) -> Tensor:
    """Lengths [lists] int32 with this mean; the longest is `spread` times the shortest, the others between."""
    shortest = 2 * mean / (1 + spread)
    even = torch.linspace(shortest, spread * shortest, lists).round().int()
    return even[torch.randperm(lists)].to(device)


def paged(
    lengths: Sequence[Tensor], heads: Heads, name: str, dtype: torch.dtype, device: torch.device
) -> Paged:
    """Layers with lists of these lengths [lists] each, whose pages lie in random order, full of random rows.

    Written without the ops, so that a fault in one is not seen in another.
    """
    form, _ = row_formats(name, heads.kv)
    counts = [-(-n // PAGE) for n in lengths]  # pages of each list
    total = int(sum(int(n.sum()) for n in counts))
    pool = make_pool(total, heads, form, dtype, device)
    for codes, scales in ((pool.keys, pool.key_scales), (pool.values, pool.value_scales)):
        _random_rows(codes, scales, pool.key_layout, form, heads)
    ids = (torch.randperm(total, device=device) + 1).int()
    layers, queries = [], []
    for live, count in zip(lengths, counts, strict=True):
        layers.append(_lists(live, count, ids[: int(count.sum())], heads, name))
        ids = ids[int(count.sum()) :]
        shape = (layers[-1].batch, heads.kv * heads.group, heads.dim)
        queries.append(torch.randn(shape, device=device).to(dtype))
    return Paged(heads, pool, layers, queries)


def empty_lists(
    batch: int, pages: int, heads: Heads, name: str, window: int, device: torch.device
) -> PageTables:
    """Lists of a layer, empty, that can own so many pages each."""
    active = torch.ones(batch, dtype=torch.bool, device=device)
    formats = row_formats(name, heads.kv)
    return PageTables.make(batch, heads.kv, pages, window, 0, active, formats)


def clear(pool: PagePool, layers: Sequence[PageTables]) -> None:
    """Make lists empty again, and all pages free."""
    pool.free.copy_(torch.arange(pool.pages, -1, -1, dtype=torch.int32))
    pool.counters.fill_(pool.pages)
    for lists in layers:
        for state in (lists.table, lists.live, lists.seen):
            state.zero_()
        lists.ring_slot.fill_(-1)
        lists.ring_evict.zero_()


def random_rows(
    batch: int, tokens: int, heads: Heads, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Key or value rows [B, K, T, D]."""
    return torch.randn(batch, heads.kv, tokens, heads.dim, device=device).to(dtype)


def random_eviction(
    batch: int, tokens: int, heads: Heads, share: float, device: torch.device
) -> Tensor:
    """Decisions [B, K, T] bool; a random share is True."""
    return torch.rand(batch, heads.kv, tokens, device=device) < share


def random_gate(
    batch: int, features: int, heads: Heads, dtype: torch.dtype, device: torch.device
) -> LinearGate:
    """A gate that marks about half of the tokens of every head."""
    return LinearGate(
        features=torch.randn(batch, features, device=device).to(dtype),
        weight=torch.randn(heads.kv, features, device=device) * features**-0.5,
        threshold=torch.zeros(heads.kv, device=device),
        positions=torch.full((batch,), 1000, device=device),
        scale=1.0,
        offset=0.0,
        protect=0,
    )


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted| in the norm; NaN where got has one."""
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    return float((got - wanted).norm() / wanted.norm())


def _lists(live: Tensor, count: Tensor, ids: Tensor, heads: Heads, name: str) -> PageTables:
    batch, width = len(live) // heads.kv, int(count.max())
    lists = empty_lists(batch, width, heads, name, 256, live.device)
    owned = torch.arange(width, device=live.device) < count[:, None]  # [lists, P]
    lists.table.view(-1, width)[owned] = ids
    lists.live.view(-1).copy_(live)
    lists.seen.copy_(lists.live)
    return lists


def _random_rows(
    codes: Tensor, scales: Tensor | None, layout: RowLayout, form: RowFormat | None, heads: Heads
) -> None:
    rows = torch.randn(1, heads.kv, SAMPLE_ROWS // heads.kv, heads.dim, device=codes.device)
    stored = (rows.to(codes.dtype) if form is None else form.encode(rows)).flatten(0, 2)
    index = torch.arange(len(codes) * PAGE, device=codes.device) % len(stored)
    codes.flatten(0, 1).copy_(stored[:, : layout.codes][index])
    if scales is not None:
        held = stored[:, layout.codes :].contiguous().view(scales.dtype)
        scales.flatten(0, 1).copy_(held[index])
