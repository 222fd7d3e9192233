# SPDX-License-Identifier: Apache-2.0
"""One list of a layer's cache in plain Python: which token is in which slot, from the definition of delayed eviction.

A token at position p whose eviction was decided is read by queries up to p + W. Tokens are numbers of the caller's.
"""

from copy import deepcopy
from dataclasses import dataclass, field

from modelopt_dms.kernels.rollback import LONGEST_DRAFT


@dataclass
class ListModel:
    """One (sequence, KV head).

    Attributes:
        window: W.
        shift: 1 if a decision governs the token before, else 0.
        seen: positions so far.
        slots: position and token in each slot.
        marked: positions whose eviction was decided.
        tokens: all of them by position, padding left out.
        before: what was there before each of the last tokens that can be taken back.
    """

    window: int
    shift: int
    seen: int = 0
    slots: list[tuple[int, int]] = field(default_factory=list)
    marked: set[int] = field(default_factory=set)
    tokens: dict[int, int] = field(default_factory=dict)
    before: list["ListModel"] = field(default_factory=list)

    def append(
        self, tokens: list[int], decisions: list[bool], valid: list[bool], rollback: int
    ) -> None:
        """Take in a chunk, the last tokens of it one by one if they may be taken back."""
        T = len(tokens)
        single = rollback
        if not all(valid):
            single = 0
        elif T == 1 or (rollback and max(rollback, LONGEST_DRAFT) >= T):
            single = T
        bulk = T - single
        if bulk:
            self.before = []
            self._append_chunk(tokens[:bulk], decisions[:bulk], valid[:bulk])
        for token, decision in zip(tokens[bulk:], decisions[bulk:], strict=True):
            self._append_one(token, decision)
        most = max(rollback, single) if rollback else 0
        self.before = self.before[max(0, len(self.before) - most) :]

    def crop(self, count: int) -> None:
        """Take back the last tokens."""
        before = self.before
        vars(self).update(vars(before[-count]))
        self.before = before[:-count]
        self.decide_previous(False)

    def decide_previous(self, decision: bool) -> None:
        """The next token's decision, where it governs the last one."""
        if self.shift:
            self._mark(self.seen - 1, decision)

    def held(self) -> list[int]:
        """Tokens that must be held, in their order: by the definition, without slots."""
        evicted = {p for p in self.marked if p + self.window < self.seen - 1}
        return [token for p, token in self.tokens.items() if p not in evicted]

    def pending(self) -> list[tuple[int, int]]:
        """Positions and slots of the tokens that are marked and still held."""
        return sorted((p, slot) for slot, (p, _) in enumerate(self.slots) if p in self.marked)

    def _append_one(self, token: int, decision: bool) -> None:
        before, self.before = self.before, []
        self.before = [*before, deepcopy(self)]
        self._append_chunk([token], [decision], [True])

    def _append_chunk(self, tokens: list[int], decisions: list[bool], valid: list[bool]) -> None:
        first, last = self.seen, self.seen + len(tokens) - 1
        for p, decision in enumerate(decisions, first - self.shift):
            self._mark(p, decision)
        self.seen = last + 1
        chunk = [(p, x) for (p, x), ok in zip(enumerate(tokens, first), valid, strict=True) if ok]
        self.tokens.update(chunk)
        gone = {p for p in self.marked if p + self.window < last}
        self._place([(p, x) for p, x in chunk if p not in gone], gone)

    def _place(self, coming: list[tuple[int, int]], gone: set[int]) -> None:
        """New tokens take the slots of those that are gone, in the order of the ring; the list may grow or shrink."""
        ring = self.window + 1
        holes = [slot for slot, (p, _) in enumerate(self.slots) if p in gone]
        holes.sort(key=lambda slot: self.slots[slot][0] % ring)
        end = len(self.slots) + len(coming) - len(holes)
        move = [slot for slot in range(end, len(self.slots)) if slot not in holes]
        holes = [slot for slot in holes if slot < end]
        for slot in move:
            self.slots[holes.pop(0)] = self.slots[slot]
        del self.slots[end:]
        for slot, token in zip(holes, coming, strict=False):
            self.slots[slot] = token
        self.slots += coming[len(holes) :]

    def _mark(self, position: int, decision: bool) -> None:
        if position >= 0 and decision:
            self.marked.add(position)
        else:
            self.marked.discard(position)
