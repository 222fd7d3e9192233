# SPDX-License-Identifier: Apache-2.0
"""Draft tokens that requests' lists have taken in and may have to give up again. Tensors only; knows no engine.

A draft is taken in token by token, as `kernels.rollback` logs it: what each token overwrote, the row of an evicted
token among it, is kept until the request's next step says how many tokens of the draft were accepted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate

import torch
from torch import Tensor

from modelopt_dms.kernels.append_reference import spanned_pages
from modelopt_dms.kernels.layout import NO_PAGE, PagePool
from modelopt_dms.kernels.rollback import UndoLog, take_back
from modelopt_dms.kvcache.forced_eviction import note_taken_back
from modelopt_dms.serving.vllm.slab_tables import SlabTables


@dataclass(frozen=True)
class Step:
    """What a request gets in a step.

    Attributes:
        computed: tokens that stay of those it has taken in before.
        drafts: how many of the step's tokens, the last ones, may be rejected.
    """

    computed: int
    drafts: int = 0


@dataclass(frozen=True)
class Round:
    """One token of each of n requests, out of all tokens of a step.

    Attributes:
        rows: of the requests [n] int64.
        at: which tokens [n] int64; None: all, in order.
        active: which of the first B rows [B] have one.
    """

    rows: Tensor
    at: Tensor | None
    active: Tensor

    def spread(self, x: Tensor) -> Tensor:
        """What belongs to tokens [n, ..] by row [B, ..], zeros elsewhere."""
        return x.new_zeros(len(self.active), *x.shape[1:]).index_copy_(0, self.rows, x)


def rounds(rows: Sequence[int], counts: Sequence[int], width: int, like: Tensor) -> list[Round]:
    """Requests with some tokens each, one after the other, as rounds of one token each.

    Args:
        rows: of n requests.
        counts: of their tokens, at least 1.
        width: B.
        like: a tensor on the device.
    """
    starts = [0, *accumulate(counts)]
    found = []
    for j in range(max(counts)):
        which = [i for i, count in enumerate(counts) if count > j]
        on_host = torch.tensor([[rows[i], starts[i] + j] for i in which])
        chosen, at = on_host.to(like.device).unbind(1)
        active = torch.zeros(width, dtype=torch.bool, device=like.device)
        active.index_fill_(0, chosen, True)
        found.append(Round(chosen, None if max(counts) == 1 else at, active))
    return found


class DraftLogs:
    """What tokens that may be taken back have overwritten, of a rank's first B rows, in every layer.

    Attributes:
        rows: B.
        tokens: U, that a request can take back, and one more.
    """

    def __init__(self, tables: SlabTables, pool: PagePool, tokens: int) -> None:
        """Start with no row."""
        self._tables, self._pool, self.tokens = tables, pool, tokens
        self.rows = 0
        self._logs: list[UndoLog] = []

    def reserve(self, rows: int) -> int:
        """See to it that there are so many rows at least: B."""
        if rows > self.rows:
            more = min(self._tables.live.shape[1], max(rows, 2 * self.rows))
            old, self._logs = self._logs, [self._log(more) for _ in self._tables.live]
            for before, log in zip(old, self._logs, strict=False):
                for x, y in zip(_parts(before), _parts(log), strict=True):
                    y[:, : self.rows] = x
            self.rows = more
        return self.rows

    def of_layer(self, layer: int) -> UndoLog:
        """Of one layer, [U, B, K, ..]."""
        return self._logs[layer]

    def lengths_before(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Lengths [L, n, K] of lists of rows [n] before they took in the tokens at these positions [n]."""
        return torch.stack([log.live[positions % self.tokens, rows] for log in self._logs])

    def reject(self, rejected: Sequence[int], positions: Tensor) -> None:
        """Take the last tokens out of rows, and put back what they had overwritten; on the device.

        Args:
            rejected: how many tokens of each of the first B rows.
            positions: of the tokens in all slots; changed.
        """
        tables, rows = self._tables, slice(self.rows)
        layers = len(self._logs)
        lists = tables.copied(rows)
        counts = torch.tensor(rejected, device=lists.live.device).repeat(layers)
        joined = [
            torch.stack(x, dim=1).flatten(1, 2) for x in zip(*map(_parts, self._logs), strict=True)
        ]
        log = _filled(self._logs[0], joined)
        for j in range(max(rejected)):
            part = replace(lists, active=counts > j)
            take_back(log, self._pool, part)
            note_taken_back(positions, part)
        lists.table.masked_fill_(~spanned_pages(lists, lists.live), NO_PAGE)
        tables.put_back(rows, lists)

    def _log(self, rows: int) -> UndoLog:
        active = torch.ones(rows, dtype=torch.bool, device=self._tables.live.device)
        return UndoLog.make(self.tokens, self._pool, self._tables.of_rows(0, active, 1))


def _parts(log: UndoLog) -> list[Tensor]:
    """Its tensors, those that there are."""
    return [x for field in fields(log) if (x := getattr(log, field.name)) is not None]


def _filled(log: UndoLog, parts: Sequence[Tensor]) -> UndoLog:
    """A log like this one with these tensors."""
    names = [field.name for field in fields(log) if getattr(log, field.name) is not None]
    return replace(log, **dict(zip(names, parts, strict=True)))
