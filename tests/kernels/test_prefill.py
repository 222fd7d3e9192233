# SPDX-License-Identifier: Apache-2.0
"""Prefill kernels, interpreted on the CPU, against float64 references."""

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modelopt_dms.kernels import (
    dispatch,
    prefill,
    prefill_backward,
    prefill_chunk,
    prefill_reference,
)
from modelopt_dms.kernels.layout import PAGE, PagePool, PageTables, RowLayout
from modelopt_dms.kernels.number_formats import Fp8, Int8, Nvfp4, RowFormat
from modelopt_dms.kernels.prefill_blocks import Tile, split
from modelopt_dms.kernels.prefill_reference import Chunk
from modelopt_dms.kernels.reference import Prompt, Scoring
from modelopt_dms.kernels.rows import read_rows, write_rows

NEVER = 2**31 - 1  # no position comes after it


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_default_device("cuda" if "gpu" in request.keywords else "cpu")
    yield
    torch.set_default_device(None)


@pytest.fixture(autouse=True)
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "gpu" in request.keywords:
        return
    # Queries and keys differ, so that borders fall into the middle of blocks; several blocks at few tokens.
    monkeypatch.setattr(prefill, "forward_tile", lambda *_: Tile(32, 16))
    monkeypatch.setattr(prefill_backward, "key_tile", lambda *_: Tile(16, 32))
    monkeypatch.setattr(prefill_backward, "query_tile", lambda *_: Tile(16, 16))
    monkeypatch.setattr(prefill_chunk, "chunk_tile", lambda *_: Tile(16, 16))


def _inputs(
    B: int = 1, K: int = 1, G: int = 1, T: int = 40, D: int = 16, DV: int = 16
) -> list[Tensor]:
    """Queries, keys, values and log-probabilities, of which some are 0 and some -inf."""
    torch.manual_seed(T + D)
    keep_logprob = torch.nn.functional.logsigmoid(3 * torch.randn(B, K, T))
    keep_logprob[torch.rand(B, K, T) < 0.2] = -math.inf
    keep_logprob[torch.rand(B, K, T) < 0.1] = 0.0
    heads = ((K * G, D), (K, D), (K, DV))
    return [*(torch.randn(B, h, T, d) for h, d in heads), keep_logprob]


def _mask(starts: Tensor) -> Tensor:
    """What starts [B, T] let queries see, [B, 1, T, T] bool."""
    keys = torch.arange(starts.shape[1])
    return (keys >= starts[..., None])[:, None] & (keys <= keys[:, None])


def _outputs_and_gradients(kernel: bool, inputs, window, starts, scoring) -> list[Tensor]:
    inputs = [x.clone() if kernel else x.double() for x in inputs]
    inputs = [x.requires_grad_() for x in inputs]
    mask = None if starts is None else _mask(starts)
    impl = "triton" if kernel else "reference"
    out = dispatch.prefill_attention(Prompt(*inputs, window, mask), scoring, impl=impl)
    torch.manual_seed(0)
    out.backward(torch.randn(out.shape).to(out.dtype))
    return [out.detach(), *(x.grad for x in inputs)]


def _attend(q, k, v, keep_logprob, window, scoring) -> Tensor:
    return dispatch.prefill_attention(Prompt(q, k, v, keep_logprob, window), scoring, impl="triton")


def _agree(inputs, window, starts, scoring) -> None:
    ours = _outputs_and_gradients(True, inputs, window, starts, scoring)
    theirs = _outputs_and_gradients(False, inputs, window, starts, scoring)
    for name, x, y in zip(("out", "q", "k", "v", "keep_logprob"), ours, theirs, strict=True):
        assert torch.isfinite(x).all(), name
        torch.testing.assert_close(
            x.double(), y, atol=5e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("window", "shape", "softcap"),
    [
        (0, {"T": 40}, None),
        (1, {"T": 20, "D": 40, "DV": 24}, None),  # 32 + 8 and 16 + 8 columns
        (7, {"T": 49, "G": 4}, None),
        (19, {"T": 50, "K": 2, "B": 2}, None),
        (100, {"T": 33, "D": 8, "DV": 32}, None),
        (5, {"T": 40, "G": 2}, 1.5),
    ],
)
def test_outputs_and_gradients_equal_the_reference(window, shape, softcap):
    inputs = _inputs(**shape)
    _agree(inputs, window, None, Scoring(inputs[0].shape[-1] ** -0.5, softcap))


def test_sinks_take_their_share_of_the_weights():
    inputs = _inputs(K=2, G=2, T=24)
    _agree(inputs, 4, None, Scoring(0.25, sinks=torch.tensor([0.5, -1.0, 3.0, 0.0])))


def test_sinks_that_want_a_gradient_are_refused():
    sinks = torch.zeros(1, requires_grad=True)
    with pytest.raises(ValueError, match="gradient of sinks"):
        _attend(*_inputs(T=3), 4, Scoring(0.25, sinks=sinks))


def test_documents_and_padding_do_not_see_each_other():
    documents = torch.tensor([0] * 9 + [9] * 20 + [29] * 11)
    left_padding = torch.tensor([*range(18), *[18] * 22])
    padding_within = torch.tensor([0] * 10 + [10] + [0] * 12 + [23] + [0] * 16)
    starts = torch.stack([documents, left_padding, padding_within]).int()
    _agree(_inputs(B=3, T=40), 5, starts, Scoring(0.25))


@settings(max_examples=5, derandomize=True, deadline=None)
@given(st.data())
def test_any_lengths_windows_and_starts_equal_the_reference(data):
    T = data.draw(st.integers(1, 40))
    window = data.draw(st.integers(0, 50))
    starts = None
    if data.draw(st.booleans()):
        starts = torch.tensor([[data.draw(st.integers(0, t)) for t in range(T)]]).int()
    _agree(_inputs(T=T), window, starts, Scoring(0.25))


def test_bfloat16_keeps_its_dtype():
    inputs = _inputs(T=20)
    inputs = [x.bfloat16() for x in inputs[:3]] + inputs[3:]
    ours = _outputs_and_gradients(True, inputs, 3, None, Scoring(0.25))
    theirs = _outputs_and_gradients(False, inputs, 3, None, Scoring(0.25))
    assert [x.dtype for x in ours] == [torch.bfloat16] * 4 + [torch.float32]
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.double(), y, atol=2e-2, rtol=2e-2)


def test_two_runs_agree_to_the_last_bit():
    inputs = _inputs(T=24, G=2)
    runs = [_outputs_and_gradients(True, inputs, 3, None, Scoring(0.25)) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_keep_logprob_has_the_slope_that_its_gradient_says():
    q, k, v, keep_logprob = _inputs(T=36)
    keep_logprob = keep_logprob.clamp(min=-2.0)
    weight = torch.randn(1, 1, 36, 16)

    def loss(x: Tensor) -> Tensor:
        return (_attend(q, k, v, x, 5, Scoring(0.25)) * weight).sum()

    x = keep_logprob.clone().requires_grad_()
    loss(x).backward()
    direction = torch.randn(keep_logprob.shape)
    up, down = loss(keep_logprob + 0.01 * direction), loss(keep_logprob - 0.01 * direction)
    assert x.grad is not None
    torch.testing.assert_close((up - down) / 0.02, (x.grad * direction).sum(), rtol=2e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("D", "DV"), [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_compiled_kernels_with_blocks_as_shipped(D, DV):
    inputs = _inputs(B=2, K=2, G=4, T=700, D=D, DV=DV)
    inputs = [x.bfloat16() for x in inputs[:3]] + inputs[3:]
    starts = torch.tensor([[0] * 300 + [300] * 400, [*range(100), *[100] * 600]]).int()
    for some in (None, starts):
        ours = _outputs_and_gradients(True, inputs, 150, some, Scoring(D**-0.5))
        theirs = _outputs_and_gradients(False, inputs, 150, some, Scoring(D**-0.5))
        for x, y in zip(ours, theirs, strict=True):
            # bf16 has 8 bits; sums of rounded numbers err relative to the largest, not to themselves.
            assert (x.double() - y).norm() < 1e-2 * y.norm()


def test_head_dims_are_two_powers_of_two():
    assert {d: split(d) for d in (8, 64, 80, 96, 128, 192, 256)} == {
        8: (16, 0),
        64: (64, 0),
        80: (64, 16),
        96: (64, 32),
        128: (128, 0),
        192: (128, 64),
        256: (256, 0),
    }


def _lists(
    live: list[list[int]],
    dims: tuple[int, int],
    formats: tuple[RowFormat | None, RowFormat | None] = (None, None),
    pages: tuple[int, ...] = (3, 5, 1, 2, 8, 4, 7, 6),
) -> tuple[PagePool, PageTables]:
    """Lists of random rows, in pages of this order, with a window of 3."""
    layouts = [RowLayout.of(f, d, torch.float32) for f, d in zip(formats, dims, strict=True)]
    pool = PagePool.make(max(pages), *layouts, torch.get_default_device())
    B, K = len(live), len(live[0])
    active = torch.ones(B, dtype=torch.bool)
    lists = PageTables.make(B, K, len(pages) // (B * K), 3, 0, active, formats)
    lists.table.copy_(torch.tensor(pages).view(lists.table.shape))
    lists.live.copy_(torch.tensor(live))
    torch.manual_seed(1)
    keys, values = (torch.randn(B, K, lists.table.shape[2] * PAGE, d) for d in dims)
    write_rows(pool, lists, _slots(lists), keys, values)
    return pool, lists


def _slots(lists: PageTables) -> Tensor:
    """All slots [B, K, S] that pages hold, -1 behind a list's end."""
    slots = torch.arange(lists.table.shape[2] * PAGE)
    return torch.where(slots < lists.live[..., None], slots, -1)


def _chunk(lists: PageTables, dims: tuple[int, int], G: int, T: int) -> list[Tensor]:
    """Queries, keys, values and decisions of a chunk."""
    torch.manual_seed(2)
    B, K = lists.live.shape
    D, DV = dims
    heads = ((K * G, D), (K, D), (K, DV))
    return [*(torch.randn(B, h, T, d) for h, d in heads), torch.rand(B, K, T) < 0.5]


def _one_by_one(chunk: Chunk, pool, lists, scoring) -> Tensor:
    """Attention of a chunk in float64, a query and a head at a time, by the words of the definition."""
    q, k, v, evict = chunk.q, chunk.k, chunk.v, chunk.evict
    first, starts, expiry = chunk.first, chunk.starts, chunk.expiry
    B, H, T, _ = q.shape
    G = H // k.shape[1]
    past = read_rows(pool, lists, _slots(lists), torch.float64)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            head = h // G
            for i in range(T):
                start = -NEVER if starts is None else int(starts[b, i])
                position = int(first[b]) + i
                old = [
                    s
                    for s in range(int(lists.live[b, head]))
                    if start < 0 and (expiry is None or position <= int(expiry[b, head, s]))
                ]
                new = [
                    j
                    for j in range(i + 1)
                    if j >= start and (i - j <= lists.window or not evict[b, head, j]) or j == i
                ]
                keys = torch.cat([past[0][b, head, old], k[b, head, new].double()])
                values = torch.cat([past[1][b, head, old], v[b, head, new].double()])
                scores = keys @ q[b, h, i].double() * scoring.scale
                if scoring.softcap is not None:
                    scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
                if scoring.sinks is not None:
                    scores = torch.cat([scores, scoring.sinks[h : h + 1].double()])
                out[b, h, i] = scores.softmax(0)[: len(values)] @ values
    return out


def _chunk_agrees(chunk, starts, first, expiry, pool, lists, scoring) -> None:
    bounds = (torch.tensor(first, dtype=torch.int32), starts, expiry)
    more = (pool, lists, scoring)
    expected = _one_by_one(Chunk(*chunk, *bounds), *more)
    ours = prefill_chunk.attend_chunk(Chunk(*chunk, *bounds), *more)
    torch.testing.assert_close(ours.double(), expected, atol=3e-6, rtol=1e-5)
    floats = [x.double() for x in chunk[:3]]
    meaning = prefill_reference.attend_chunk(Chunk(*floats, chunk[3], *bounds), *more)
    torch.testing.assert_close(meaning, expected, atol=1e-9, rtol=1e-9)


def _amax() -> Tensor:
    return torch.tensor([3.0, 4.0])  # one a KV head


@pytest.mark.parametrize(
    ("keys", "values", "dims"),
    [
        (None, None, (24, 16)),
        (Fp8(_amax()), Fp8(_amax()), (16, 16)),
        (Fp8(None), Fp8(None), (24, 16)),
        (Int8(_amax()), Int8(None), (16, 16)),
        (Nvfp4(_amax()), Nvfp4(_amax()), (32, 48)),
        (Fp8(_amax()), Nvfp4(_amax()), (16, 32)),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_a_chunk_reads_pages_of_every_format(keys, values, dims):
    pool, lists = _lists([[70, 0]], dims, (keys, values), pages=(3, 1, 2, 4))
    chunk = _chunk(lists, dims, 1, 18)
    _chunk_agrees(chunk, None, [100], None, pool, lists, Scoring(dims[0] ** -0.5))


def test_a_chunk_reads_ragged_lists_up_to_their_ends_and_expiries():
    dims = (16, 16)
    pool, lists = _lists([[64, 65], [1, 128]], dims)
    chunk = _chunk(lists, dims, 2, 20)
    torch.manual_seed(3)
    expiry = torch.full((2, 2, 2 * PAGE), NEVER, dtype=torch.int32)
    expiry[torch.rand(expiry.shape) < 0.3] = 210
    _chunk_agrees(chunk, None, [200, 205], expiry, pool, lists, Scoring(0.25, softcap=2.0))


def test_a_chunk_that_starts_documents_does_not_read_what_was_before():
    dims = (16, 16)
    pool, lists = _lists([[30], [70]], dims, pages=(1, 2, 3, 4))
    chunk = _chunk(lists, dims, 2, 33)
    starts = torch.tensor([[-30] * 20 + [20] * 13, [0] * 5 + [5, 6] + [7] * 26])
    sinks = torch.tensor([0.5, -1.0])
    _chunk_agrees(chunk, starts, [30, 80], None, pool, lists, Scoring(0.25, sinks=sinks))


def test_page_ids_change_no_bit():
    dims = (16, 16)
    first = torch.tensor([70])
    outs = []
    for pages in ((3, 1), (2, 3), (1, 2)):
        pool, lists = _lists([[70]], dims, pages=pages)
        chunk = _chunk(lists, dims, 1, 10)
        outs.append(prefill_chunk.attend_chunk(Chunk(*chunk, first), pool, lists, Scoring(0.25)))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_a_prompt_in_chunks_equals_the_whole_prompt():
    T, border, window = 60, 37, 3
    q, k, v, _ = _inputs(T=T, K=2, G=2)
    evict = torch.rand(1, 2, T) < 0.5
    keep_logprob = torch.zeros(evict.shape).masked_fill(evict, -math.inf)
    whole = _attend(q, k, v, keep_logprob, window, Scoring(0.25))

    pool, lists = _lists([[0, 0]], (16, 16), pages=(3, 1, 2, 4))
    outs = []
    expiry = None
    for start, end in ((0, border), (border, T)):
        parts = [x[:, :, start:end] for x in (q, k, v, evict)]
        chunk = Chunk(*parts, torch.tensor([start]), expiry=expiry)
        outs.append(prefill_chunk.attend_chunk(chunk, pool, lists, Scoring(0.25)))
        # The survivors of the first chunk; those that are marked expire in the second.
        expiry = torch.full((1, 2, 2 * PAGE), NEVER, dtype=torch.int32)
        for head in range(2):
            kept = [j for j in range(end) if not evict[0, head, j] or end - j <= window]
            slots = torch.full((1, 2, end), -1)
            slots[0, head, kept] = torch.arange(len(kept))
            write_rows(pool, lists, slots, k[:, :, :end], v[:, :, :end])
            lists.live[0, head] = len(kept)
            for slot, j in enumerate(kept):
                if evict[0, head, j]:
                    expiry[0, head, slot] = j + window
    torch.testing.assert_close(torch.cat(outs, dim=2), whole, atol=2e-6, rtol=1e-5)
