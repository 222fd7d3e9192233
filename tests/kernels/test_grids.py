# SPDX-License-Identifier: Apache-2.0
"""Launches for more than 65535 lists and heads: only a grid's first dim goes beyond. No kernel runs."""

from typing import Any

import pytest
import torch

from modelopt_dms.exporters.tensorrt.expressions import evaluate
from modelopt_dms.exporters.tensorrt.kernels import launches
from modelopt_dms.kernels import append, decode, prefill, prefill_backward, prefill_chunk
from modelopt_dms.kernels.append_reference import Moves, Plan
from modelopt_dms.kernels.gating import Decided
from modelopt_dms.kernels.layout import LayerShape, PagePool, PageTables, RowLayout
from modelopt_dms.kernels.prefill_reference import Chunk
from modelopt_dms.kernels.reference import Prompt, Scoring

B, K, H, D, T = 16385, 4, 8, 16, 33
MOST = 65535
KERNELS = {
    append: ("_append_kernel", "_pack_kernel", "_move_kernel"),
    decode: ("_decode", "_combine"),
    prefill: ("_forward_kernel",),
    prefill_backward: ("_delta_kernel", "_key_kernel", "_query_kernel"),
    prefill_chunk: ("_chunk_kernel",),
}


class Recorder(dict[str, tuple[int, ...]]):
    """Grids by kernel; nothing is launched."""

    def kernel(self, name: str) -> Any:
        recorder = self

        class Kernel:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                recorder[name] = grid
                return lambda *args, **kwargs: None

        return Kernel()


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(module, name, recorder.kernel(name))
    return recorder


def _rows(heads: int, T: int) -> torch.Tensor:
    return torch.zeros(1).expand(B, heads, T, D)  # no launch reads them


def test_grids_of_many_lists_and_heads(grids: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    # Copies of rows that nothing reads would take gigabytes.
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x, **_: x)
    scoring = Scoring(1.0)
    layout = RowLayout.of(None, D, torch.float32)
    pool = PagePool.make(1, layout, layout, torch.device("cpu"))
    lists = PageTables.make(B, K, 1, 1, 0, torch.ones(B, dtype=torch.bool), (None, None))
    k, q, evict = _rows(K, T), _rows(H, T), torch.zeros(1, dtype=torch.bool).expand(B, K, T)

    append.append_token(k[:, :, 0], k[:, :, 0], Decided(evict[..., 0].clone()), pool, lists)
    slots = torch.zeros(1, dtype=torch.int32).expand(B, K, T)
    monkeypatch.setattr(append, "allocate_pages", lambda *_: None)
    monkeypatch.setattr(append, "update_metadata", lambda *_: None)
    moves = Moves(slots, slots, lists.live)
    append.apply_plan(Plan(slots, lists.live, slots, evict, moves), k, k, pool, lists)
    decode.decode_attention(q[:, :, 0], pool, lists, scoring)
    prefill_chunk.attend_chunk(Chunk(q, k, k, evict, lists.seen[:, 0]), pool, lists, scoring)
    prompt = Prompt(q[..., :1, :], k[..., :1, :], k[..., :1, :], torch.zeros(B, K, 1), 1)
    out, lse = prefill.prefill_forward(prompt, None, scoring)
    prefill_backward.prefill_backward(out, out, lse, prompt, None, scoring)

    assert set(grids) == {name for names in KERNELS.values() for name in names}
    assert {x: grid for x, grid in grids.items() if max(grid[1:], default=1) > MOST} == {}
    assert grids["_chunk_kernel"] == (B * H, 2)
    assert grids["_forward_kernel"] == grids["_query_kernel"] == (B * H, 1)
    assert grids["_key_kernel"] == (1, K, B)
    assert grids["_pack_kernel"][0] == B * K
    assert grids["_append_kernel"] == grids["_move_kernel"] == (B * K,)


def test_grids_of_an_engine_with_many_lists_and_heads() -> None:
    layout = RowLayout.of(None, 128, torch.bfloat16)
    shape = LayerShape(layout, layout, K, H // K, torch.bfloat16, 256, 0)
    dims = {"B": B, "K": K, "H": H, "T": 2048, "P": 9, "E": 576, "programs": 264, "rows": H // K}
    for name, launch in launches(shape, Scoring(1.0), 2048, B * K).items():
        grid = [evaluate(x, dims) for x in launch.grid]
        assert max(grid[1:]) <= MOST and grid[0] < 2**31, name
