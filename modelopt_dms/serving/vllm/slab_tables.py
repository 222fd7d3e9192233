# SPDX-License-Identifier: Apache-2.0
"""Which slots the lists of all requests of a rank have. Tensors only; knows neither blocks nor an engine.

Requests have rows, and a layer's first rows lie together, so that one launch takes them as they are. Shapes: L layers,
S rows, K KV heads, R = W + 1, P pages a list can own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_dms.kernels.layout import NO_PAGE, PAGE, PageTables
from modelopt_dms.kernels.number_formats import RowFormat

PAGES = 8  # of a list at first


@dataclass(frozen=True)
class Rules:
    """What a model's gates were trained for.

    Attributes:
        window: W, tokens a marked token stays readable.
        shift: 1 if a token's decision governs the token before it, else 0.
        protect_first: tokens at the start that are never evicted.
    """

    window: int
    shift: int
    protect_first: int


@dataclass(frozen=True)
class SlabShape:
    """How many lists there can be.

    Attributes:
        layers: L, of the rank.
        heads: K, of the rank.
        requests: S.
        drafts: the most tokens of a request's draft.
    """

    layers: int
    heads: int
    requests: int
    drafts: int = 0


class SlabTables:
    """The lists [L, S, K].

    Attributes:
        table: page ids [L, S, K, P] int32; see `kernels.layout.PageTables`, as for the others.
        live: [L, S, K] int32.
        seen: [L, S, K] int32.
        ring_slot: [L, S, K, R] int32.
        ring_evict: [L, S, K, R] bool.
    """

    def __init__(
        self, shape: SlabShape, rules: Rules, form: RowFormat | None, device: torch.device
    ) -> None:
        """Start with empty lists.

        Args:
            shape: L, S and K.
            rules: of the model.
            form: number format of the rows, with one scale of 1; None: they are stored as they come.
            device: where to.
        """
        dims, ring = (shape.layers, shape.requests, shape.heads), rules.window + 1

        def ints(value: int, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=torch.int32, device=device)

        self.rules, self._formats = rules, (form, form)
        self.table = ints(NO_PAGE, *dims, PAGES)
        self.live = ints(0, *dims)
        self.seen = ints(0, *dims)
        self.ring_slot = ints(-1, *dims, ring)
        self.ring_evict = torch.zeros(*dims, ring, dtype=torch.bool, device=device)
        self._active = torch.ones(shape.layers * shape.requests, dtype=torch.bool, device=device)
        self._scales = torch.ones(4, shape.heads, device=device)

    def of_rows(self, layer: int, active: Tensor, pages: int) -> PageTables:
        """The lists of a layer's first rows [B, K]; changing them changes the tables.

        Args:
            layer: which.
            active: which rows [B] take in tokens.
            pages: how many places of the tables to look at.
        """
        at = (layer, slice(len(active)))
        table, *others = (x[at] for x in self._tensors())
        return self._lists(active, [table[..., :pages], *others])

    def of_row(self, layer: int, row: int) -> PageTables:
        """The lists of a layer's row [1, K]; changing them changes the tables."""
        at = (layer, slice(row, row + 1))
        return self._lists(self._active[:1], [x[at] for x in self._tensors()])

    def of_all(self) -> PageTables:
        """All lists [L * S, K]; changing them changes the tables."""
        return self._lists(self._active, [x.flatten(0, 1) for x in self._tensors()])

    def copied(self, rows: slice) -> PageTables:
        """The lists of some rows in all layers [L * rows, K], for `put_back`."""
        parts = [x[:, rows].flatten(0, 1).clone() for x in self._tensors()]
        return self._lists(self._active[: len(parts[0])], parts)

    def put_back(self, rows: slice, lists: PageTables) -> None:
        """Write what became of `copied`."""
        made = (lists.table, lists.live, lists.seen, lists.ring_slot, lists.ring_evict)
        for x, new in zip(self._tensors(), made, strict=True):
            x[:, rows] = new.unflatten(0, (len(x), -1))

    def forget(self, row: int) -> None:
        """Make a row's lists empty."""
        for x, nothing in zip(self._tensors(), (NO_PAGE, 0, 0, -1, False), strict=True):
            x[:, row] = nothing

    def widen(self, tokens: int) -> None:
        """Let lists own enough pages for so many tokens."""
        width = self.table.shape[-1]
        missing = -(-tokens // PAGE) - width
        if missing > 0:
            self.table = F.pad(self.table, (0, max(missing, width)), value=NO_PAGE)

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.table, self.live, self.seen, self.ring_slot, self.ring_evict

    def _lists(self, active: Tensor, parts: Sequence[Tensor]) -> PageTables:
        table, live, seen, ring_slot, ring_evict = parts
        return PageTables(
            self.rules.window,
            self.rules.shift,
            table=table,
            live=live,
            seen=seen,
            ring_slot=ring_slot,
            ring_evict=ring_evict,
            active=active,
            formats=self._formats,
            scales=self._scales,
        )


def only_active(lists: PageTables) -> PageTables:
    """Lists whose rows that are not active count as empty, so that nobody reads them."""
    return replace(lists, live=torch.where(lists.active[:, None], lists.live, 0))
