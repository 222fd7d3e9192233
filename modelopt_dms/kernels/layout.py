# SPDX-License-Identifier: Apache-2.0
"""Where KV rows lie on a device: pages that all layers share, and for each layer the lists that own them. Tensors only.

Every (sequence, KV head) of a layer is a list: slots 0..live-1, slot s in row s % PAGE of page table[b, k, s // PAGE].
All bookkeeping is on the device and of fixed shape, so that a decode step neither synchronizes with the host nor
changes an address.

Shapes: N pages, B sequences, K KV heads, P pages a list can own, W delay window, R = W + 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from modelopt_dms.kernels.number_formats import RowFormat
from modelopt_dms.kernels.row_bytes import BLOCK, PAGE, Number, row_bytes

NO_PAGE = (
    0  # page 0 is never given out: what has no page reads and writes there, where nobody looks
)

PADDING = 128  # the most keys or queries of a block of prefill kernels
MOST_ROWS = 64  # query heads of a KV head that decode kernels take at a time


class OutOfPagesError(RuntimeError):
    """The page pool is used up; the message names its size and what to change."""


@dataclass(frozen=True)
class RowLayout:
    """How a key row, or a value row, of D numbers lies in a page.

    Attributes:
        number: "plain" is the model's own dtype.
        dim: D.
        dtype: of the codes: the model's, or uint8.
        per_row: fp8 and int8: every row has a float32 scale of its own, else a KV head has one.
    """

    number: Number
    dim: int
    dtype: torch.dtype
    per_row: bool = False

    @staticmethod
    def of(form: RowFormat | None, dim: int, dtype: torch.dtype) -> "RowLayout":
        """The layout of rows [D] that a model of this dtype stores in this format (None: as they are).

        Raises:
            ValueError: NVFP4 rows that are not whole blocks.
        """
        if form is None:
            return RowLayout("plain", dim, dtype)
        if form.name == "nvfp4" and dim % BLOCK:
            raise ValueError(
                f"a paged NVFP4 KV cache needs a head dim that is a multiple of {BLOCK}, got {dim}; use FP8"
            )
        return RowLayout(form.name, dim, torch.uint8, form.name != "nvfp4" and form.amax is None)  # type: ignore[arg-type]

    @property
    def codes(self) -> int:
        """Elements of a row's codes: D, or D / 2 bytes with two NVFP4 numbers each, low nibble first."""
        return self.dim // 2 if self.number == "nvfp4" else self.dim

    @property
    def scales(self) -> tuple[int, torch.dtype] | None:
        """Scales stored with a row: D / 16 e4m3 bytes (NVFP4), one float32 (per_row), or none."""
        if self.number == "nvfp4":
            return self.dim // BLOCK, torch.uint8
        return (1, torch.float32) if self.per_row else None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, scales included."""
        return row_bytes(self.number, self.dim, self.dtype.itemsize, self.per_row)


@dataclass(frozen=True)
class LayerShape:
    """What is the same for a layer's every launch, so that kernels are compiled for it.

    Attributes:
        keys: how key rows are stored.
        values: likewise.
        heads: KV heads.
        group: query heads of each.
        dtype: of queries, and of rows before they are stored.
        window: W.
        shift: 1 if a token's decision governs the token before it, else 0.
    """

    keys: RowLayout
    values: RowLayout
    heads: int
    group: int
    dtype: torch.dtype = torch.bfloat16
    window: int = 256
    shift: int = 0


@dataclass(frozen=True)
class PagePool:
    """Pages, and which of them are free. Page i holds PAGE key rows and PAGE value rows.

    Attributes:
        key_layout: of keys.
        value_layout: of values.
        keys: codes [N, PAGE, key_layout.codes].
        values: codes [N, PAGE, value_layout.codes].
        key_scales: [N, PAGE, S], or None.
        value_scales: likewise.
        free: [N] int32; the first `counters[0]` are the ids of the free pages. Or [B, F]: each sequence has its own.
        counters: [2] int32: free pages now, and the fewest there ever were; negative: the pool ran out. Or [B, 2].
    """

    key_layout: RowLayout
    value_layout: RowLayout
    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    free: Tensor
    counters: Tensor

    @staticmethod
    def make(pages: int, keys: RowLayout, values: RowLayout, device: torch.device) -> "PagePool":
        """A pool of `pages` free pages, and one more that is never given out."""

        def rows(layout: RowLayout) -> Tensor:
            # Zeros, not empty: rows behind a list's end are read and masked, and 0 * NaN is NaN.
            shape = (pages + 1, PAGE, layout.codes)
            return torch.zeros(shape, dtype=layout.dtype, device=device)

        def scales(layout: RowLayout) -> Tensor | None:
            if layout.scales is None:
                return None
            width, dtype = layout.scales
            return torch.zeros(pages + 1, PAGE, width, dtype=dtype, device=device)

        # The last id is given out first; ids run 1 .. pages.
        free = torch.arange(pages, -1, -1, dtype=torch.int32, device=device)
        counters = torch.tensor([pages, pages], dtype=torch.int32, device=device)
        return PagePool(
            keys, values, rows(keys), rows(values), scales(keys), scales(values), free, counters
        )

    @property
    def pages(self) -> int:
        """Pages that can be given out."""
        return len(self.keys) - 1

    @property
    def page_bytes(self) -> int:
        """Bytes of one page, keys, values and scales."""
        return PAGE * (self.key_layout.row_bytes + self.value_layout.row_bytes)

    @property
    def shared(self) -> bool:
        """Whether all sequences take from one stack of free pages."""
        return self.free.ndim == 1

    def take(self, wanted: Tensor) -> Tensor:
        """Pages int32 for those places of `wanted` bool that want one, else NO_PAGE; on the device.

        Where the pool runs out, NO_PAGE too, and the counters say so.

        Args:
            wanted: [n], or [B, n] where each sequence takes from its own stack.
        """
        left = self.counters[..., :1]  # [1] or [B, 1]
        index = left - wanted.cumsum(-1).to(torch.int32)
        given = wanted & (index >= 0)
        pages = torch.where(given, self.free.gather(-1, index.clamp(min=0).long()), NO_PAGE)
        left -= wanted.sum(-1, keepdim=True).to(torch.int32)
        self.counters[..., 1:].clamp_(max=left)
        return pages

    def give_back(self, pages: Tensor) -> None:
        """Take back pages [n] int32, NO_PAGE among them ignored; on the device. Of a shared stack only."""
        real = pages != NO_PAGE
        self.counters[0].clamp_(min=0)  # what nobody got is not owed
        at = self.counters[0] + real.cumsum(0) - 1  # [n]
        # The last place of `free` is never read: there can be at most N - 1 free pages.
        last = len(self.free) - 1
        self.free.scatter_(0, torch.where(real, at, last).long(), pages)
        self.counters[0] += real.sum().to(torch.int32)

    def forget_shortage(self) -> None:
        """Where all pages are free again, nothing lacks the rows that were lost; on the device."""
        free, lowest = self.counters
        lowest.copy_(torch.where(free == self.pages, lowest.clamp(min=0), lowest))

    def check(self, option: str) -> int:
        """The most pages ever in use. Waits for the device.

        Args:
            option: what to change where the pool ran out, for the message.

        Raises:
            OutOfPagesError: the pool ran out; what was written since is lost.
        """
        lowest = int(self.counters[1])
        if lowest < 0:
            raise OutOfPagesError(
                f"the KV cache ran out of pages: it has {self.pages} of {PAGE} slots ({self.pages * self.page_bytes} "
                f"bytes), and at least {-lowest} more were asked for; {option}"
            )
        return self.pages - lowest


@dataclass
class PageTables:
    """One layer's lists: which slots live, and what was decided about the newest.

    Attributes:
        window: W, tokens a marked token stays readable.
        shift: 1 if a token's decision governs the token before it, else 0.
        table: page ids [B, K, P] int32, NO_PAGE where a list owns none.
        live: slots in use [B, K] int32.
        seen: positions seen [B, K] int32, padding included; the same for all heads of a sequence (every list counts for
            itself, so that no program waits for another).
        ring_slot: slots [B, K, R] int32 of the last R positions, position p in column p % R; -1 where there is none.
        ring_evict: decisions [B, K, R] bool about them.
        active: [B] bool; a sequence that is not active takes in no tokens. One tensor for all layers of a cache.
        formats: number formats of keys and values; None is the model's own dtype.
        scales: float32 [4, K], one column a KV head: what encoding and what decoding keys multiplies by, and
            the same of values. fp8: 448 / amax and its inverse; int8: 127 / amax and its inverse; nvfp4: the double
            scale amax / (6 * 448) in both rows; 1 elsewhere.
    """

    window: int
    shift: int
    table: Tensor
    live: Tensor
    seen: Tensor
    ring_slot: Tensor
    ring_evict: Tensor
    active: Tensor
    formats: tuple[RowFormat | None, RowFormat | None]
    scales: Tensor

    @staticmethod
    def make(
        batch: int,
        heads: int,
        pages: int,
        window: int,
        shift: int,
        active: Tensor,
        formats: tuple[RowFormat | None, RowFormat | None] = (None, None),
    ) -> "PageTables":
        """Empty lists of `batch` sequences and `heads` KV heads that can own `pages` pages each."""

        def ints(value: int, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=active.device)

        scales = torch.stack([row for form in formats for row in _scales(form, heads)])
        return PageTables(
            window,
            shift,
            table=ints(NO_PAGE, batch, heads, pages),
            live=ints(0, batch, heads),
            seen=ints(0, batch, heads),
            ring_slot=ints(-1, batch, heads, window + 1),
            ring_evict=torch.zeros(
                batch, heads, window + 1, dtype=torch.bool, device=active.device
            ),
            active=active,
            formats=formats,
            scales=scales.to(active.device),
        )

    @property
    def batch(self) -> int:
        """B."""
        return self.live.shape[0]

    @property
    def heads(self) -> int:
        """K."""
        return self.live.shape[1]

    @property
    def ring(self) -> int:
        """R."""
        return self.window + 1

    def rows_of(self, slots: Tensor) -> Tensor:
        """Rows [B, K, n] int64 of the pool, seen as [N * PAGE, .], where slots [B, K, n] lie; 0 for slot -1."""
        page = self.table.gather(2, (slots // PAGE).clamp(0, self.table.shape[2] - 1).long())
        return torch.where(slots >= 0, page.long() * PAGE + slots % PAGE, 0)

    def ring_positions(self) -> Tensor:
        """Position [B, K, R] of the token in each column of the ring; negative where there was none yet."""
        return ring_positions(self.seen, self.ring)


def ring_positions(seen: Tensor, ring: int) -> Tensor:
    """Position [..., R] of the token in each column of a ring of size R, after `seen` [...] tokens; see above."""
    last = seen[..., None] - 1
    columns = torch.arange(ring, device=seen.device)
    return last - (last - columns) % ring


def _scales(form: RowFormat | None, heads: int) -> tuple[Tensor, Tensor]:
    """Factors [K] of encoding and of decoding."""
    if form is None or form.amax is None:
        return torch.ones(heads), torch.ones(heads)
    encode, decode = form.factors()
    return encode.cpu().expand(heads), decode.cpu().expand(heads)


def padded_length(T: int) -> int:
    """Length of vectors [T] that prefill kernels read in blocks and a block ahead, without asking where they end."""
    return -(-T // PADDING) * PADDING + PADDING
