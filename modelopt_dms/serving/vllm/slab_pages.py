# SPDX-License-Identifier: Apache-2.0
"""Which pages of a pool each request may use, and which of those are free. Tensors on the device; knows no engine.

A slab is a list of blocks of the pool that somebody else hands out (`serving.vllm.accounting`). Block b holds the pages
b * lists .. (b + 1) * lists - 1, one for each (layer, KV head) list of the rank, and any list of the request may use
any of them. Block 0 is never handed out: page 0 is where nobody looks (`kernels.layout.NO_PAGE`). Shapes: S rows of
requests, F the most pages of a slab.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from modelopt_dms.kernels.layout import NO_PAGE, OutOfPagesError, PagePool


class SlabPages:
    """The slabs of all rows.

    Attributes:
        lists: pages of a block.
        ids: pages [S, F] int32 of each slab in its order, NO_PAGE behind them.
        free: those that no list owns [S, F] int32, as `PagePool.free` has them: the slab's first ones are taken first.
        counters: [S, 2] int32, as `PagePool.counters`.
    """

    def __init__(self, lists: int, requests: int, device: torch.device) -> None:
        """Start with empty slabs."""
        self.lists = lists
        self.ids = torch.zeros(requests, lists, dtype=torch.int32, device=device)
        self.free = torch.zeros_like(self.ids)
        self.counters = torch.zeros(requests, 2, dtype=torch.int32, device=device)

    def of_row(self, pool: PagePool, row: int) -> PagePool:
        """The pool, as the lists of one row take pages from it."""
        return replace(pool, free=self.free[row], counters=self.counters[row])

    def of_rows(self, pool: PagePool, rows: int) -> PagePool:
        """The pool, as the lists of the first rows do."""
        return replace(pool, free=self.free[:rows], counters=self.counters[:rows])

    def assign(self, slabs: Mapping[int, Sequence[int]]) -> None:
        """Give rows these blocks, in this order; `restack` must follow."""
        most = max(map(len, slabs.values()))
        missing = most * self.lists - self.ids.shape[1]
        if missing > 0:
            more = max(missing, self.ids.shape[1])
            self.ids, self.free = (F.pad(x, (0, more)) for x in (self.ids, self.free))
        padded = [[*blocks, *[0] * (most - len(blocks))] for blocks in slabs.values()]
        blocks = torch.tensor(padded, dtype=torch.int32, device=self.ids.device)[..., None]
        places = torch.arange(self.lists, dtype=torch.int32, device=self.ids.device)
        ids = torch.where(blocks > 0, blocks * self.lists + places, NO_PAGE).flatten(1)
        rows = torch.tensor(list(slabs), device=self.ids.device)
        self.ids[rows] = F.pad(ids, (0, self.ids.shape[1] - ids.shape[1]), value=NO_PAGE)

    def restack(self, rows: Sequence[int], table: Tensor, pages: int) -> None:
        """Find anew what is free of the slabs of some rows: all but what their lists own.

        Args:
            rows: of the requests, each once.
            table: pages of all lists [L, S, K, P].
            pages: of the pool.
        """
        at = torch.tensor(rows, device=table.device)
        owned = torch.zeros(pages, dtype=torch.bool, device=table.device)
        owned[table[:, at].flatten().long()] = True
        owned[NO_PAGE] = True  # what stands behind a slab's end
        # The last free page is given out first.
        ids = self.ids[at].flip(1)
        taken = owned[ids.long()]
        self.free[at] = ids.gather(1, taken.to(torch.uint8).argsort(dim=1, stable=True))
        self.counters[at] = (~taken).sum(1, keepdim=True, dtype=torch.int32).expand(-1, 2)

    def compact(
        self, row: int, before: int, after: int, table: Tensor, stores: Sequence[Tensor]
    ) -> None:
        """Move what lies in the last blocks of a slab into its first ones. Waits for the device.

        Args:
            row: of the request.
            before: blocks that it has.
            after: blocks that it keeps.
            table: pages of its lists [L, K, P]; changed.
            stores: what lies in pages, each [pages, ..]; changed.

        Raises:
            OutOfPagesError: the others have no room for it.
        """
        kept, leaving = self.ids[row, : before * self.lists].split(
            [after * self.lists, (before - after) * self.lists]
        )
        places = torch.isin(table, leaving).nonzero(as_tuple=True)
        sources = table[places]
        targets = kept[~torch.isin(kept, table)][: len(sources)]
        if len(targets) < len(sources):
            raise OutOfPagesError(
                f"a request was to keep {after} of its {before} blocks, which hold more; please report this"
            )
        for x in stores:
            x[targets.long()] = x[sources.long()]
        table[places] = targets
