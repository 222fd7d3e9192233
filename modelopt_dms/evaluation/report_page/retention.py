# SPDX-License-Identifier: Apache-2.0
"""Which KV heads still hold each token of a text when it has been read."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from modelopt_dms.evaluation.memories import read
from modelopt_dms.gates.gate import gates, record_alpha
from modelopt_dms.kernels.reference import shift_decisions


@dataclass(frozen=True)
class Retention:
    """A text of T tokens in the cache of H KV heads, those of all layers with a gate.

    Attributes:
        tokens: as text, with the spaces in front of them [T].
        rows: layer and KV head of every row of `held` [H].
        held: whether a head holds a token [H, T], bool.
        window: the newest `window + 1` tokens are always held.
        spans: parts of the text that are asked about, as ranges of positions.
    """

    tokens: list[str]
    rows: list[tuple[int, int]]
    held: Tensor
    window: int
    spans: tuple[range, ...] = ()

    def heads_holding(self) -> list[int]:
        """How many heads hold each token [T]."""
        counts: list[int] = self.held.sum(0).tolist()
        return counts

    def figures(self) -> dict[str, object]:
        """For the page: `held` as a hexadecimal number a token, whose highest bit is the first row."""
        digits = -(-len(self.rows) // 4)
        columns = self.held.T.int().tolist()
        resident: list[int] = self.held.sum(1).tolist()
        return {
            "tokens": self.tokens,
            "rows": [list(x) for x in self.rows],
            "counts": self.heads_holding(),
            "held": [f"{int(''.join(map(str, bits)), 2):0{digits}x}" for bits in columns],
            "resident": resident,
            "window": self.window,
            "spans": [[x.start, x.stop] for x in self.spans],
        }


@torch.no_grad()
def retention(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    spans: Sequence[range] = (),
) -> Retention:
    """Read a text of token ids [T] once through the cache, and note what every head holds of it."""
    with record_alpha(model) as record:
        read(model, ids)
    rows, marks = [], []
    for layer, decisions in sorted(record.hard.items()):
        rows += [(layer, head) for head in range(decisions.shape[1])]
        marks.append(shift_decisions(decisions[0], gates(model)[0].shift).cpu())
    if not rows:  # switched off: nothing was decided
        raise ValueError("eviction is switched off in this model: it holds every token")
    window = gates(model)[0].window
    held = ~torch.cat(marks)
    held[:, max(0, len(ids) - window - 1) :] = True  # these have not left the delay window yet
    tokens = [str(tokenizer.decode([x])) for x in ids]
    return Retention(tokens, rows, held, window, tuple(spans))
