# SPDX-License-Identifier: Apache-2.0
"""HeadCaches against the definition: which rows are held follows from the history alone, however it came about."""

import math
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from modelopt_dms.kvcache.head_caches import LONGEST_DRAFT, PAGE, ROLLBACK, HeadCaches

KEY_DIM, VALUE_DIM = 2, 3
ROW_BYTES = 4 * (KEY_DIM + VALUE_DIM)


@dataclass
class History:
    """All that was ever appended, and what must be held of it. Rows are told apart by their number.

    Attributes:
        number: of each row [B, K, T]; key rows are filled with it, value rows with its negative.
        decided: decisions [B, K, T].
        valid: False [B, T] for padding.
    """

    number: Tensor
    decided: Tensor
    valid: Tensor

    @property
    def length(self) -> int:
        return self.number.shape[-1]

    def marked(self, shift: int) -> Tensor:
        """Which tokens [B, K, T] somebody has decided to evict."""
        if shift == 0:
            return self.decided
        undecided = torch.zeros_like(self.decided[..., :1])
        return torch.cat([self.decided[..., 1:], undecided], dim=-1)

    def held(self, window: int, shift: int) -> Tensor:
        """Which tokens [B, K, T] must be in the cache."""
        age = self.length - 1 - torch.arange(self.length)
        return self.valid[:, None] & ~(self.marked(shift) & (age > window))

    def extend(self, more: "History") -> "History":
        return History(
            torch.cat([self.number, more.number], dim=-1),
            torch.cat([self.decided, more.decided], dim=-1),
            torch.cat([self.valid, more.valid], dim=-1),
        )

    def crop(self, tokens: int) -> "History":
        end = self.length - tokens
        return History(self.number[..., :end], self.decided[..., :end], self.valid[..., :end])

    def select(self, sequences: Tensor) -> "History":
        return History(self.number[sequences], self.decided[sequences], self.valid[sequences])


def chunk(B: int, K: int, T: int, first: int, rate: float, padding: float, seed: int) -> History:
    """Random decisions about T new tokens, the numbers counted from `first`."""
    generator = torch.Generator().manual_seed(seed)
    return History(
        torch.arange(first, first + B * K * T).view(B, K, T),
        torch.rand(B, K, T, generator=generator) < rate,
        torch.rand(B, T, generator=generator) >= padding,
    )


def append(slots: HeadCaches, new: History) -> None:
    k = new.number[..., None].expand(-1, -1, -1, KEY_DIM).float()
    v = -new.number[..., None].expand(-1, -1, -1, VALUE_DIM).float()
    slots.append(k, v, new.decided, new.valid)


def assert_holds(slots: HeadCaches, history: History) -> None:
    """Rows, lengths, pending tokens and bytes are what the history says."""
    slots.check_integrity()
    assert slots.seen == history.length
    held = history.held(slots.window, slots.shift)
    assert torch.equal(slots.live, held.sum(-1))
    assert torch.equal(slots.usage.live, slots.live)
    assert torch.equal(slots.usage.tokens, history.valid.sum(-1))
    marked = history.marked(slots.shift) & held
    for i in range(slots.lists):
        b, h = divmod(i, slots.K)
        keys, values = slots.rows(i, int(slots.live[b, h]))
        assert sorted(keys[:, 0].tolist()) == history.number[b, h][held[b, h]].tolist()
        assert torch.equal(values[:, :1], -keys[:, :1])
        positions, at = slots.pending(i)
        assert sorted(positions.tolist()) == marked[b, h].nonzero()[:, 0].tolist()
        assert keys[at, 0].tolist() == history.number[b, h][positions].tolist()
    buffers = sum(x.numel() * 4 for x in (*slots.keys, *slots.values))
    overwritten = sum(len(undo.rows) for undo in slots._undo) * ROW_BYTES
    assert slots.usage.kv_bytes == buffers + overwritten


def most_rows_for(live: int) -> int:
    return live + live // 16 + PAGE


class Histories(RuleBasedStateMachine):
    """Chunks, padding, beams and rollbacks in any order."""

    @initialize(
        window=st.sampled_from([1, 2, 5, 9]),
        shift=st.integers(0, 1),
        rollback=st.sampled_from([0, 2, 6]),
        B=st.integers(1, 2),
        K=st.integers(1, 3),
        T=st.integers(1, 12),
        padding=st.sampled_from([0.0, 0.5]),
        seed=st.integers(0, 999),
    )
    def start(
        self,
        window: int,
        shift: int,
        rollback: int,
        B: int,
        K: int,
        T: int,
        padding: float,
        seed: int,
    ) -> None:
        self.slots = HeadCaches(window, shift)
        self.slots.rollback = rollback
        self.history = chunk(B, K, T, 1, 0.5, padding, seed)
        self.next_number = 1 + self.history.number.numel()
        append(self.slots, self.history)
        self.recoverable = min(T, rollback) if bool(self.history.valid.all()) else 0
        self.longest = self.slots.live.flatten().tolist()

    @rule(
        T=st.integers(1, 12),
        rate=st.sampled_from([0.0, 0.5, 1.0]),
        padding=st.sampled_from([0.0, 0.0, 0.6, 1.0]),
        seed=st.integers(0, 999),
        announced=st.booleans(),
    )
    def append(self, T: int, rate: float, padding: float, seed: int, announced: bool) -> None:
        B, K = self.history.number.shape[:2]
        new = chunk(B, K, T, self.next_number, rate, padding, seed)
        self.next_number += new.number.numel()
        if announced:  # as attention over the past needs it, before the rows are taken in
            self.slots.decide_previous(new.decided[..., 0])
        append(self.slots, new)
        self.history = self.history.extend(new)
        kept = self.recoverable if self.slots.rollback >= T else 0
        recoverable = min(T + kept, self.slots.rollback)
        self.recoverable = recoverable if bool(new.valid.all()) else 0

    @rule(steps=st.integers(1, 14), rate=st.sampled_from([0.3, 1.0]), seed=st.integers(0, 999))
    def decode(self, steps: int, rate: float, seed: int) -> None:
        for step in range(steps):
            self.append(T=1, rate=rate, padding=0.0, seed=seed + step, announced=False)

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        sequences = data.draw(
            st.lists(st.integers(0, self.slots.B - 1), min_size=1, max_size=3), label="sequences"
        )
        self.slots.select(torch.tensor(sequences))
        self.history = self.history.select(torch.tensor(sequences))
        K = self.slots.K
        self.longest = [x for b in sequences for x in self.longest[b * K : (b + 1) * K]]
        self.recoverable = 0

    @precondition(lambda self: self.recoverable)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        tokens = data.draw(st.integers(1, self.recoverable), label="tokens")
        self.slots.crop(tokens)
        self.history = self.history.crop(tokens)
        self.recoverable -= tokens

    @rule(excess=st.integers(1, 9))
    def crop_too_much(self, excess: int) -> None:
        tokens = max(self.recoverable, len(self.slots._undo)) + excess
        with pytest.raises(ValueError, match=f"cannot take back {tokens} tokens"):
            self.slots.crop(tokens)

    @invariant()
    def holds_what_the_history_says(self) -> None:
        if hasattr(self, "slots"):
            assert_holds(self.slots, self.history)
            assert len(self.slots._undo) >= self.recoverable

    @invariant()
    def allocates_little_more_than_it_ever_held(self) -> None:
        if hasattr(self, "slots"):
            live = self.slots.live.flatten().tolist()
            self.longest = [max(pair) for pair in zip(self.longest, live, strict=True)]
            for buffer, longest in zip(self.slots.keys, self.longest, strict=True):
                assert len(buffer) <= most_rows_for(longest)


Histories.TestCase.settings = settings(max_examples=60, stateful_step_count=12, deadline=None)
test_rows_held_follow_from_the_history_alone = Histories.TestCase


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    window=st.sampled_from([1, 8, 30]),
    shift=st.integers(0, 1),
    rate=st.sampled_from([0.0, 0.7, 1.0]),
)
def test_length_and_memory_follow_the_formula_whatever_the_chunks(
    sizes: list[int], window: int, shift: int, rate: float
) -> None:
    T = sum(sizes)
    whole = chunk(2, 2, T, 1, rate, 0.0, seed=T)
    slots = HeadCaches(window, shift)
    for end, size in zip(torch.tensor(sizes).cumsum(0).tolist(), sizes, strict=True):
        start = end - size
        append(
            slots,
            History(
                whole.number[..., start:end],
                whole.decided[..., start:end],
                whole.valid[..., start:end],
            ),
        )
    retained = (~whole.marked(shift))[..., : max(0, T - window - 1)].sum(-1)
    assert torch.equal(slots.live, retained + min(T, window + 1))
    for i, live in enumerate(slots.live.flatten().tolist()):
        assert len(slots.keys[i]) == len(slots.values[i]) <= most_rows_for(live)
    assert slots.usage.dense_bytes == 2 * 2 * T * ROW_BYTES


@given(st.integers(1, 20), st.integers(0, 1), st.integers(0, 99))
def test_taking_back_and_appending_again_equals_never_having_appended(
    tokens: int, shift: int, seed: int
) -> None:
    prompt = chunk(1, 2, 30, 1, 0.5, 0.0, seed)
    wrong = chunk(1, 2, tokens, 1000, 0.5, 0.0, seed + 1)
    right = chunk(1, 2, 15, 2000, 0.5, 0.0, seed + 2)
    detour, straight = HeadCaches(7, shift), HeadCaches(7, shift)
    for slots in (detour, straight):
        append(slots, prompt)
    append(detour, wrong)
    detour.crop(tokens)
    for slots in (detour, straight):
        append(slots, right)
    history = prompt.extend(right)
    assert_holds(detour, history)
    assert_holds(straight, history)


def test_after_a_prompt_a_draft_of_the_default_length_can_be_taken_back() -> None:
    history = chunk(1, 1, LONGEST_DRAFT + 1, 1, 0.5, 0.0, 0)
    slots = HeadCaches(4, 0)
    append(slots, history)
    slots.crop(ROLLBACK)
    assert_holds(slots, history.crop(ROLLBACK))
    with pytest.raises(ValueError, match="only the last 0 are still held"):
        slots.crop(1)


def test_a_long_draft_can_be_taken_back_whole_until_the_next_chunk() -> None:
    prompt, draft = chunk(1, 2, 100, 1, 0.5, 0.0, 0), chunk(1, 2, LONGEST_DRAFT, 200, 0.5, 0.0, 1)
    slots = HeadCaches(4, 0)
    append(slots, prompt)
    append(slots, draft)
    slots.crop(LONGEST_DRAFT)
    assert_holds(slots, prompt)


def test_a_crop_that_fails_changes_nothing() -> None:
    history = chunk(1, 2, LONGEST_DRAFT + 1, 1, 0.5, 0.0, 0)
    slots = HeadCaches(4, 0)
    append(slots, history)
    with pytest.raises(ValueError, match="cannot take back 25 tokens.*delay window 4, limit 24"):
        slots.crop(25)
    assert_holds(slots, history)


def test_memory_stops_growing_when_everything_is_evicted() -> None:
    slots = HeadCaches(15, 0)
    sizes = []
    for step in range(200):
        append(slots, chunk(1, 1, 1, step, 1.0, 0.0, step))
        sizes.append(slots.usage.kv_bytes)
    assert slots.live.tolist() == [[16]]
    assert sizes[60] == sizes[-1]
    assert math.ceil(16 / PAGE) * PAGE == len(slots.keys[0])


def test_copied_sequences_do_not_share_memory() -> None:
    slots = HeadCaches(3, 0)
    history = chunk(2, 1, 10, 1, 0.5, 0.0, 0)
    append(slots, history)
    slots.select(torch.tensor([1, 1, 0, 1]))
    starts = [x.data_ptr() for x in (*slots.keys, *slots.values)]
    assert len(set(starts)) == len(starts)
