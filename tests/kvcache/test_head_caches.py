# SPDX-License-Identifier: Apache-2.0
"""The memory of HeadCaches: what its buffers take, and who shares them. Which rows it holds: test_conformance.py."""

import hypothesis.strategies as st
import torch
from hypothesis import given

from modelopt_dms.kvcache.head_caches import PAGE, HeadCaches

KEY_DIM, VALUE_DIM = 2, 3
ROW_BYTES = 4 * (KEY_DIM + VALUE_DIM)


def append(caches: HeadCaches, decisions: list[bool], batch: int = 1) -> None:
    """Random rows of two heads; only the first one's tokens are evicted."""
    evict = torch.tensor(decisions).expand(batch, 2, -1) & torch.tensor([[True], [False]])
    shape = (batch, 2, len(decisions))
    caches.append(torch.randn(*shape, KEY_DIM), torch.randn(*shape, VALUE_DIM), evict, None)


def assert_counts_its_bytes(caches: HeadCaches) -> None:
    buffers = sum(x.numel() * 4 for x in (*caches.keys, *caches.values))
    overwritten = sum(len(undo.rows) for undo in caches._undo) * ROW_BYTES
    assert caches.usage.kv_bytes == buffers + overwritten


@given(
    chunks=st.lists(st.lists(st.booleans(), min_size=1, max_size=40), min_size=1, max_size=6),
    window=st.sampled_from([1, 8, 30]),
    shift=st.integers(0, 1),
    rollback=st.sampled_from([0, 6, 24]),
)
def test_length_and_memory_follow_the_formula_whatever_the_chunks(
    chunks: list[list[bool]], window: int, shift: int, rollback: int
) -> None:
    caches = HeadCaches(window, shift)
    caches.rollback = rollback
    for chunk in chunks:
        append(caches, chunk)
        assert_counts_its_bytes(caches)
    decisions = sum(chunks, [])
    T = len(decisions)
    marked = [*decisions[shift:], *[False] * shift]
    retained = marked[: max(0, T - window - 1)].count(False)
    assert caches.live.tolist() == [[retained + min(T, window + 1), T]]
    for i, live in enumerate(caches.live.flatten().tolist()):
        assert len(caches.keys[i]) == len(caches.values[i]) <= live + live // 16 + PAGE
    assert caches.usage.dense_bytes == 2 * T * ROW_BYTES
    caches.crop(min(rollback, len(chunks[-1])))
    assert_counts_its_bytes(caches)


def test_memory_stops_growing_when_everything_is_evicted() -> None:
    caches = HeadCaches(15, 0)
    for _ in range(200):
        append(caches, [True])
    assert caches.live.tolist() == [[16, 200]]
    assert len(caches.keys[0]) == 16


def test_copied_sequences_do_not_share_memory() -> None:
    caches = HeadCaches(3, 0)
    append(caches, [True, False] * 5, batch=2)
    caches.select(torch.tensor([1, 1, 0, 1]))
    starts = [x.data_ptr() for x in (*caches.keys, *caches.values)]
    assert len(set(starts)) == len(starts)
    assert_counts_its_bytes(caches)
