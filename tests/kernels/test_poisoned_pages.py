# SPDX-License-Identifier: Apache-2.0
"""What recycled pages hold behind the last row, NaN here, is read by no kernel and no reference."""

from collections.abc import Callable

import pytest
import torch
from paged_rows import FORMATS, Cache
from torch import Tensor

from modelopt_dms.kernels import decode, decode_reference, prefill_chunk, prefill_reference
from modelopt_dms.kernels.append import append_token, pack
from modelopt_dms.kernels.append_reference import append_token as append_reference
from modelopt_dms.kernels.gating import Decided
from modelopt_dms.kernels.layout import PAGE, PagePool, PageTables
from modelopt_dms.kernels.prefill_blocks import Tile
from modelopt_dms.kernels.prefill_reference import NEVER, Chunk
from modelopt_dms.kernels.reference import Scoring
from modelopt_dms.kernels.rollback import UndoLog, take_back
from modelopt_dms.kernels.rows import read_rows

SCORING = Scoring(0.25)
LIVE = [[70, 3]]  # the last page of each is mostly poison


def chunk_kernel(chunk: Chunk, pool: PagePool, lists: PageTables, scoring: Scoring) -> Tensor:
    return prefill_chunk.attend_chunk(chunk, pool, lists, scoring, Tile(16, 16))


@pytest.mark.parametrize("expires", [False, True])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("attend", [chunk_kernel, prefill_reference.attend_chunk])
def test_a_chunk_reads_no_row_behind_the_last(attend: Callable, name: str, expires: bool) -> None:
    cache = Cache(LIVE, (32, 48), (name, name))
    q, k, v = (torch.randn(1, 2, 5, d) for d in (32, 32, 48))
    expiry = torch.full((1, 2, 2 * PAGE), NEVER, dtype=torch.int32) if expires else None
    evict = torch.zeros(1, 2, 5, dtype=torch.bool)
    chunk = Chunk(q, k, v, evict, torch.tensor([100]), expiry=expiry)
    out = attend(chunk, cache.pool, cache.lists, SCORING)
    for head in range(2):
        n = LIVE[0][head]
        keys = torch.cat([cache.keys[0, head, :n], k[0, head].double()])
        values = torch.cat([cache.values[0, head, :n], v[0, head].double()])
        seen = torch.ones(5, n + 5).tril(n).bool()
        scores = (q[0, head].double() @ keys.T * SCORING.scale).masked_fill(~seen, -torch.inf)
        torch.testing.assert_close(
            out[0, head].double(), scores.softmax(-1) @ values, atol=2e-5, rtol=2e-5
        )


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("attend", [decode.decode_attention, decode_reference.decode_attention])
def test_a_decode_step_reads_no_row_behind_the_last(attend: Callable, name: str) -> None:
    cache = Cache(LIVE, (32, 48), (name, name))
    assert attend(torch.randn(1, 2, 32), cache.pool, cache.lists, SCORING).isfinite().all()


@pytest.mark.parametrize("attend", [decode.decode_latent, decode_reference.decode_latent])
def test_a_latent_decode_step_reads_no_row_behind_the_last(attend: Callable) -> None:
    cache = Cache([[33]], (32, 16))
    assert attend(torch.randn(1, 2, 48), cache.pool, cache.lists, SCORING).isfinite().all()


@pytest.mark.parametrize("append", [append_token, append_reference])
def test_rows_taken_in_moved_and_taken_back_are_not_of_what_was_there(append: Callable) -> None:
    cache = Cache(LIVE, (32, 48))
    pool, lists = cache.pool, cache.lists
    for _ in range(3):  # fills the ring with marked tokens, whose slots the next ones move into
        marked = torch.ones(1, 2, 6, dtype=torch.bool)
        pack(torch.randn(1, 2, 6, 32), torch.randn(1, 2, 6, 48), marked, None, pool, lists)
    before = held(pool, lists)
    log = UndoLog.make(4, pool, lists)
    for _ in range(3):
        row = torch.randn(1, 2, 32), torch.randn(1, 2, 48)
        append(*row, Decided(torch.ones(1, 2, dtype=torch.bool)), pool, lists, log)
        assert all(x.isfinite().all() for x in held(pool, lists))
    for _ in range(3):
        take_back(log, pool, lists)
    assert all(torch.equal(x, y) for x, y in zip(held(pool, lists), before, strict=True))


def held(pool: PagePool, lists: PageTables) -> tuple[Tensor, Tensor]:
    """All rows of all lists."""
    slots = torch.arange(lists.table.shape[2] * PAGE)
    return read_rows(
        pool, lists, torch.where(slots < lists.live[..., None], slots, -1), torch.float32
    )
