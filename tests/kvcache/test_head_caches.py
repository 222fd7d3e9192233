# SPDX-License-Identifier: Apache-2.0
"""The memory of HeadCaches: what its buffers take, and who shares them. Which rows it holds: test_conformance.py."""

import hypothesis.strategies as st
import torch
from hypothesis import given

from modelopt_dms.kvcache.head_caches import GROWTH, SPREAD, STEP, HeadCaches

KEY_DIM, VALUE_DIM = 2, 3
ROW_BYTES = 4 * (KEY_DIM + VALUE_DIM)


def append(caches: HeadCaches, decisions: list[bool], batch: int = 1) -> None:
    """Random rows of two heads; only the first one's tokens are evicted."""
    evict = torch.tensor(decisions).expand(batch, 2, -1) & torch.tensor([[True], [False]])
    shape = (batch, 2, len(decisions))
    caches.append(torch.randn(*shape, KEY_DIM), torch.randn(*shape, VALUE_DIM), evict, None)


def rooms(caches: HeadCaches) -> dict[int, int]:
    """Rows for which each list has room."""
    return {i: x.keys.shape[1] for x in caches.buckets for i in x.lists.tolist()}


def assert_counts_its_bytes(caches: HeadCaches) -> None:
    buffers = sum(x.keys.nbytes + x.values.nbytes for x in caches.buckets)
    overwritten = sum(len(undo.keys) for undo in caches._undo) * ROW_BYTES
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
        assert live <= rooms(caches)[i] <= (live + live // GROWTH + STEP) * (1 + SPREAD) + STEP
    assert caches.usage.dense_bytes == 2 * T * ROW_BYTES
    caches.crop(min(rollback, len(chunks[-1])))
    assert_counts_its_bytes(caches)


def test_memory_stops_growing_when_everything_is_evicted() -> None:
    caches = HeadCaches(15, 0)
    for _ in range(200):
        append(caches, [True])
    assert caches.live.tolist() == [[16, 200]]
    assert rooms(caches)[0] == 16


def test_lists_of_about_one_length_are_attended_to_at_once() -> None:
    caches = HeadCaches(3, 0)
    append(caches, [True, False] * 100, batch=3)
    assert [x.lists.tolist() for x in caches.buckets] == [[0, 2, 4], [1, 3, 5]]
    for bucket in caches.buckets:
        for n, index in enumerate(bucket.lists.tolist()):
            keys, values = caches.rows(index)
            assert torch.equal(bucket.keys[n, bucket.bias[n] == 0], keys)
            assert torch.equal(bucket.values[n, bucket.bias[n] == 0], values)


def test_copied_sequences_do_not_share_memory() -> None:
    caches = HeadCaches(3, 0)
    append(caches, [True, False] * 5, batch=2)
    caches.select(torch.tensor([1, 1, 0, 1]))
    starts = [caches.rows(i)[0].data_ptr() for i in range(caches.lists)]
    assert len(set(starts)) == len(starts)
    assert_counts_its_bytes(caches)
