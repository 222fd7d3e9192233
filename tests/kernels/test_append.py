# SPDX-License-Identifier: Apache-2.0
"""Taking tokens into paged lists: kernels (interpreted) and their meaning in PyTorch, one op at a time."""

from dataclasses import replace
from types import ModuleType

import pytest
import torch
import triton
import triton.language as tl
from paged_oracle import FORMATS, Formats, stored
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modelopt_dms.config.dms import DMSConfig
from modelopt_dms.gates.gate import EvictionGate
from modelopt_dms.kernels import append, append_reference, encoding
from modelopt_dms.kernels.gating import Decided, LinearGate
from modelopt_dms.kernels.layout import PAGE, OutOfPagesError, PagePool, PageTables, RowLayout
from modelopt_dms.kernels.number_formats import _to_e2m1
from modelopt_dms.kernels.rollback import UndoLog, take_back
from modelopt_dms.kernels.rows import stored_rows

IMPLS = {"triton": append, "reference": append_reference}
CPU = torch.device("cpu")
B, K, D = 2, 2, 16


@pytest.fixture(params=IMPLS)
def ops(request: pytest.FixtureRequest) -> ModuleType:
    return IMPLS[request.param]


def made(
    formats: Formats,
    window: int = 3,
    shift: int = 0,
    dims: tuple[int, int] = (D, D),
    pages: int = 40,
    width: int = 4,
    batch: int = B,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[PagePool, PageTables]:
    layouts = [RowLayout.of(form, dim, dtype) for form, dim in zip(formats, dims, strict=True)]
    pool = PagePool.make(pages, layouts[0], layouts[1], CPU)
    active = torch.ones(batch, dtype=torch.bool)
    return pool, PageTables.make(batch, K, width, window, shift, active, formats)


def rows(seed: int, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def coin(seed: int, chance: float, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < chance


# Numbers


@triton.jit
def _encode(x_ptr, out_ptr, NUMBER: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    if NUMBER == "fp8":
        code = encoding.to_e4m3(x).to(tl.int32)
    elif NUMBER == "int8":
        code = encoding.to_int8(x).to(tl.int32)
    else:
        code = encoding.to_e2m1(x)
    tl.store(out_ptr + at, code)


def codes(x: Tensor, number: str) -> Tensor:
    """What the kernels make of float32 numbers [N]."""
    size = triton.next_power_of_2(len(x))
    padded = torch.nn.functional.pad(x, (0, size - len(x)))
    out = torch.empty(size, dtype=torch.int32)
    _encode[(1,)](padded, out, number, size)
    return out[: len(x)]


def awkward(grid: Tensor) -> Tensor:
    """A grid of numbers, what lies halfway between them, and the nearest float32 numbers on both sides; any sign."""
    ties = (grid[1:] + grid[:-1]) / 2
    exact = torch.cat([grid, ties, torch.tensor([0.0, 1e-45, 1e-38, 2.0**-10, 3e38, torch.inf])])
    up = torch.nextafter(exact, torch.tensor(torch.inf))
    down = torch.nextafter(exact, torch.tensor(-torch.inf))
    x = torch.cat([exact, up, down])
    return torch.cat([x, -x])


ALL_BF16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
ALL_BF16 = ALL_BF16[~ALL_BF16.isnan()]


def test_fp8_codes_are_pytorchs_for_ties_subnormals_and_too_large_numbers() -> None:
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    for x in (awkward(grid), ALL_BF16):
        expected = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
        assert torch.equal(codes(x, "fp8"), expected.int())


def test_int8_codes_are_pytorchs_for_ties_and_too_large_numbers() -> None:
    for x in (awkward(torch.arange(130).float()), ALL_BF16):
        expected = x.round().clamp(-128, 127).to(torch.int8).view(torch.uint8)
        assert torch.equal(codes(x, "int8"), expected.int())


def test_nvfp4_codes_are_those_of_the_row_format_for_ties_and_too_large_numbers() -> None:
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for x in (awkward(grid), ALL_BF16):
        assert torch.equal(codes(x, "nvfp4"), _to_e2m1(x).int())


@pytest.mark.parametrize("dims", [(16, 16), (80, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_stored_bytes_are_the_row_formats(
    name: str, dtype: torch.dtype, dims: tuple[int, int], ops: ModuleType
) -> None:
    formats = FORMATS[name]
    T = 6
    k, v = (rows(i, B, K, T, dim, dtype=torch.float32) for i, dim in enumerate(dims))
    # Zero rows, zero blocks, negative zeros, rows near the smallest numbers and beyond the calibrated range.
    k[:, :, 0], v[:, :, 1, :16], v[:, :, 2] = 0, -0.0, 0
    k[:, 0, 1] *= 1e-8
    k[:, :, 2] *= 100
    v[:, 1, 3] *= 1e-30
    k[:, :, 3] = k[:, :, 3].round(decimals=1)
    k, v = k.to(dtype), v.to(dtype)
    pool, lists = made(formats, dims=dims, dtype=dtype)
    evict = torch.zeros(B, K, T, dtype=torch.bool)
    ops.pack(k[:, :, :-1], v[:, :, :-1], evict[..., :-1], None, pool, lists)
    ops.append_token(k[:, :, -1], v[:, :, -1], Decided(evict[..., -1]), pool, lists)
    for i in range(B * K):
        for got, form, x in zip(stored_rows(pool, lists, i), formats, (k, v), strict=True):
            assert torch.equal(got, stored(form, x).flatten(0, 1)[i])


# Decisions


@pytest.mark.parametrize("granularity", ["head", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 70])
def test_decisions_are_the_gates(
    granularity: str,
    dtype: torch.dtype,
    width: int,
    ops: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(append, "FEATURES", 32)
    batch = 6
    config = DMSConfig(granularity=granularity, scale=0.5, offset=1.5, protect_first=3, window=2)
    gate = EvictionGate(config, 0, K, width)
    # Whole numbers: sums have no rounding, so that those equal to the threshold are equal for everybody.
    x = torch.randint(-3, 4, (batch, 1, width), generator=torch.Generator().manual_seed(1)).to(
        dtype
    )
    with torch.no_grad():
        gate.weight.copy_(
            torch.randint(-2, 3, gate.weight.shape, generator=torch.Generator().manual_seed(2))
        )
        logits = gate.logits(x)
        gate.threshold.copy_(logits.amax(dim=(0, 2)).clamp(max=logits.median()))
    for positions in (torch.tensor([0, 2, 3, 4, 5, 9]), torch.tensor([7])):
        expected = gate.decide(x, positions[:, None])[..., 0]
        pool, lists = made((None, None), window=2, batch=batch)
        zeros = torch.zeros(batch, K, D, dtype=torch.bfloat16)
        linear = LinearGate(
            x[:, 0], gate.weight.detach(), gate.threshold, positions, gate.scale, gate.offset, 3
        )
        ops.append_token(zeros, zeros, linear, pool, lists)
        assert expected.any() and not expected.all()
        assert torch.equal(lists.ring_evict[..., 0], expected)


# Limits


def test_a_pool_that_runs_out_says_so_and_harms_nobody(ops: ModuleType) -> None:
    pool, lists = made((None, None), pages=3)
    keep = torch.zeros(B, K, 1, dtype=torch.bool)
    for t in range(3):
        k = rows(t, B, K, 1, D)
        ops.append_token(k[:, :, 0], k[:, :, 0], Decided(keep[..., 0]), pool, lists)
    with pytest.raises(OutOfPagesError, match="3 of 64 slots.*at least 1 more.*turn the knob"):
        pool.check("turn the knob")
    owned = lists.table[lists.table > 0].tolist()
    assert sorted(owned) == [1, 2, 3]


@pytest.mark.parametrize("chunk", [1, 2])
def test_sequences_with_free_pages_of_their_own_take_those(chunk: int, ops: ModuleType) -> None:
    shared, lists = made((None, None))
    free = torch.tensor([[5, 6, 7, 0, 0], [1, 10, 8, 9, 0]], dtype=torch.int32)
    counters = torch.tensor([[3, 3], [4, 4]], dtype=torch.int32)
    pool = replace(shared, free=free, counters=counters)
    k = rows(0, B, K, PAGE + chunk, D)
    keep = torch.zeros(B, K, PAGE + chunk, dtype=torch.bool)

    def take_in(part: slice) -> None:
        if chunk == 1 and part.start:
            ops.append_token(k[:, :, -1], k[:, :, -1], Decided(keep[..., -1]), pool, lists)
        else:
            ops.pack(k[:, :, part], k[:, :, part], keep[..., part], None, pool, lists)

    take_in(slice(0, PAGE))
    assert sorted(lists.table[0, :, 0].tolist()) == [6, 7]
    assert sorted(lists.table[1, :, 0].tolist()) == [8, 9]
    assert counters.tolist() == [[1, 1], [2, 2]]
    take_in(slice(PAGE, PAGE + chunk))
    # The first sequence lacks a page, and the second one knows nothing of it.
    assert sorted(lists.table[0, :, 1].tolist()) == [0, 5]
    assert sorted(lists.table[1, :, 1].tolist()) == [1, 10]
    assert counters.tolist() == [[-1, -1], [0, 0]]
    assert torch.equal(stored_rows(pool, lists, 1)[0][:PAGE], k[0, 1, :PAGE])
    assert torch.equal(stored_rows(pool, lists, 3)[0], k[1, 1])


@pytest.mark.parametrize("chunk", [1, 40])
def test_a_list_that_outgrows_its_table_loses_rows_and_harms_nobody(
    chunk: int, ops: ModuleType
) -> None:
    pool, lists = made((None, None), width=1)
    k = rows(0, B, K, PAGE + 8, D)
    keep = torch.zeros(B, K, PAGE + 8, dtype=torch.bool)
    ops.pack(k[:, :, :60], k[:, :, :60], keep[..., :60], None, pool, lists)
    if chunk == 1:
        for t in range(60, 66):
            ops.append_token(k[:, :, t], k[:, :, t], Decided(keep[..., t]), pool, lists)
    else:
        ops.pack(k[:, :, 60:], k[:, :, 60:], keep[..., 60:], None, pool, lists)
    assert lists.live.tolist() == [[PAGE] * K] * B
    assert torch.equal(stored_rows(pool, lists, 3)[0], k[1, 1, :PAGE])
    with pytest.raises(OutOfPagesError):
        pool.check("")


class NoQuestions(TorchDispatchMode):
    """Refuses ops that wait for a device, or whose shapes depend on numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "item"), name
        if name == "index":
            assert all(x is None or x.dtype != torch.bool for x in args[1]), "index by a mask"
        return func(*args, **(kwargs or {}))


def test_no_op_asks_the_device() -> None:
    pool, lists = made((None, None), shift=1)
    log = UndoLog.make(4, pool, lists)
    k, evict = rows(0, B, K, 9, D), coin(0, 0.5, B, K, 9)
    gate = Decided(evict[..., 0])
    valid = coin(1, 0.5, B, 9)
    with NoQuestions():
        append_reference.pack(k, k, evict, None, pool, lists)
        append_reference.pack(k, k, evict, valid, pool, lists)
        append_reference.append_token(k[:, :, 0], k[:, :, 0], gate, pool, lists, log)
        take_back(log, pool, lists)
