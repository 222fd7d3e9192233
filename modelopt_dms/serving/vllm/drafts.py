# SPDX-License-Identifier: Apache-2.0
"""Draft tokens that a request's lists have taken in and may have to give up again. Tensors only; knows no engine.

A draft is taken in token by token, as `kernels.rollback` logs it: what each token overwrote, the row of an evicted
token among it, is kept until the next step says how many tokens of the draft were accepted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from modelopt_dms.kernels.layout import PagePool, PageTables
from modelopt_dms.kernels.rollback import UndoLog, take_back
from modelopt_dms.kvcache.forced_eviction import note_taken_back


@dataclass(frozen=True)
class Step:
    """What a request gets in a step.

    Attributes:
        computed: tokens that stay of those it has taken in before.
        drafts: how many of the step's tokens, the last ones, may be rejected.
    """

    computed: int
    drafts: int = 0


@dataclass
class Draft:
    """A draft that a request holds.

    Attributes:
        tokens: of it.
        logs: by layer of the rank, what it and the token before it have overwritten, in lists [1, K].
    """

    tokens: int = 0
    logs: dict[int, UndoLog] = field(default_factory=dict)

    def lengths_before(self, seen: int) -> Tensor:
        """Lengths [L, K] of all lists before the draft, where `seen` tokens were taken in with it."""
        logs = [log for _, log in sorted(self.logs.items())]
        return torch.stack([log.live[(seen - self.tokens) % log.tokens, 0] for log in logs])


def of_requests(log: UndoLog, requests: slice) -> UndoLog:
    """The part of a log that is about some of its requests; what is written there is written to the log."""
    tensors = {x.name: getattr(log, x.name) for x in fields(log)}
    return replace(log, **{name: x[:, requests] for name, x in tensors.items() if x is not None})


def reject(log: UndoLog, pool: PagePool, lists: PageTables, positions: Tensor, tokens: int) -> None:
    """Take the last tokens out of lists [1, K], and put back what they had overwritten.

    Args:
        log: of a draft of at least as many tokens.
        pool: where rows lie; changed.
        lists: changed, in place.
        positions: of the tokens in all slots; changed.
        tokens: how many.
    """
    for _ in range(tokens):
        take_back(log, pool, lists)
        note_taken_back(positions, lists)


def rounds(counts: Sequence[int]) -> list[int]:
    """How many of the requests have a j-th token, for each j; they must be sorted, the most tokens first."""
    return [sum(x > j for x in counts) for j in range(max(counts))]
