# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modelopt_dms.kv_quant import Fp8, Int8, Nvfp4, RowFormat
from modelopt_dms.ops import decode, decode_reference
from modelopt_dms.ops.paged import PAGE, LayerLists, PagePool, RowLayout
from modelopt_dms.ops.reference import Scoring
from modelopt_dms.ops.rows import write_rows

AMAX = 4.0
FORMATS = {
    "plain": lambda heads: None,
    "fp8": lambda heads: Fp8(torch.linspace(AMAX, 2 * AMAX, heads)),
    "fp8_row": lambda heads: Fp8(None),
    "int8": lambda heads: Int8(torch.linspace(AMAX, 2 * AMAX, heads)),
    "int8_row": lambda heads: Int8(None),
    "nvfp4": lambda heads: Nvfp4(torch.linspace(AMAX, 2 * AMAX, heads)),
}


class Cache:
    """Paged lists of given lengths [B][K] with random rows, and the rows as they are stored, in float64."""

    def __init__(
        self,
        live: list[list[int]],
        dims: tuple[int, int],
        formats: tuple[str, str] = ("plain", "plain"),
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        pages_seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        lengths = torch.tensor(live, dtype=torch.int32)
        B, K = lengths.shape
        most = int(lengths.max())
        P = max(1, -(-most // PAGE))
        k_format, v_format = (FORMATS[name](K) for name in formats)
        self.lists = LayerLists.make(
            B, K, P, 4, 0, torch.ones(B, dtype=torch.bool), (k_format, v_format)
        )
        layouts = [
            RowLayout.of(form, dim, dtype)
            for form, dim in zip((k_format, v_format), dims, strict=True)
        ]
        needed = -(-lengths // PAGE)
        self.pool = PagePool.make(int(needed.sum()) + 5, *layouts, torch.device("cpu"))
        _fill_with_garbage(self.pool)
        generator = torch.Generator().manual_seed(pages_seed)
        ids = (torch.randperm(self.pool.pages, generator=generator) + 1).int()
        owned = torch.arange(P) < needed[..., None]
        self.lists.table[owned] = ids[: int(owned.sum())]
        self.lists.live.copy_(lengths)
        k, v = (
            torch.randn(B, K, most, dims[0]).to(dtype),
            torch.randn(B, K, most, dims[1]).to(dtype),
        )
        slots = torch.arange(most).expand(B, K, most)
        slots = torch.where(slots < lengths[..., None], slots, -1)
        write_rows(self.pool, self.lists, slots, k, v)
        _fill_with_garbage(self.pool, page=0)
        self.keys, self.values = _stored(k_format, k), _stored(v_format, v)


def _fill_with_garbage(pool: PagePool, page: int | slice = slice(None)) -> None:
    for x in (pool.keys, pool.values, pool.key_scales, pool.value_scales):
        if x is not None:
            x[page] = 0x7F if x.dtype == torch.uint8 else float("nan")


def _stored(form: RowFormat | None, x: Tensor) -> Tensor:
    if form is None:
        return x.double()
    return form.decode(form.encode(x), x.shape[-1], torch.float64)


def _expected(q: Tensor, k: Tensor, v: Tensor, live: Tensor, scoring: Scoring) -> Tensor:
    """Head by head and key by key, in float64: [B, H, Dv]."""
    B, H, _ = q.shape
    G = H // k.shape[1]
    out = torch.zeros(B, H, v.shape[-1], dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            n = int(live[b, h // G])
            if n == 0:
                continue
            scores = k[b, h // G, :n] @ q[b, h].double() * scoring.scale
            if scoring.softcap is not None:
                scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
            if scoring.sinks is not None:
                scores = torch.cat([scores, scoring.sinks[h : h + 1].double()])
            out[b, h] = scores.softmax(-1)[:n] @ v[b, h // G, :n]
    return out


def _check(
    live: list[list[int]],
    dims: tuple[int, int],
    group: int,
    formats: tuple[str, str] = ("plain", "plain"),
    *,
    softcap: float | None = None,
    sinks: bool = False,
    dtype: torch.dtype = torch.float32,
    programs: tuple[int | None, ...] = (3,),
    tolerance: float = 2e-5,
) -> None:
    cache = Cache(live, dims, formats, dtype)
    heads = len(live[0]) * group
    q = torch.randn(len(live), heads, dims[0]).to(dtype)
    sink_logits = torch.randn(heads).to(dtype) if sinks else None
    scoring = Scoring(1.5 / math.sqrt(dims[0]), softcap, sink_logits)
    expected = _expected(q, cache.keys, cache.values, cache.lists.live, scoring)
    plain = decode_reference.decode_attention(q, cache.pool, cache.lists, scoring)
    torch.testing.assert_close(plain.double(), expected, atol=tolerance, rtol=tolerance)
    for count in programs:
        out = decode.decode_attention(q, cache.pool, cache.lists, scoring, programs=count)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("value_format", ["plain", "fp8", "nvfp4"])
@pytest.mark.parametrize("key_format", FORMATS)
def test_formats_of_keys_and_values_are_independent(key_format: str, value_format: str) -> None:
    _check([[70, 3]], (32, 32), 2, (key_format, value_format))


@pytest.mark.parametrize("value_format", FORMATS)
def test_values_of_every_format(value_format: str) -> None:
    _check([[70, 130]], (32, 64), 2, ("plain", value_format))


@pytest.mark.parametrize("dim", [8, 16, 32, 64, 80, 96, 128, 192, 256])
def test_head_dims(dim: int) -> None:
    _check([[65, 1]], (dim, dim), 2)


@pytest.mark.parametrize("key_format", ["fp8", "nvfp4", "int8_row"])
@pytest.mark.parametrize("dim", [16, 64, 80, 96, 128])
def test_head_dims_of_quantized_rows(dim: int, key_format: str) -> None:
    _check([[65, 1]], (dim, dim), 2, (key_format, key_format))


def test_values_have_a_head_dim_of_their_own() -> None:
    _check([[65, 1]], (96, 64), 2, ("fp8", "nvfp4"))


@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
def test_groups(group: int) -> None:
    _check([[66, 9]], (16, 16), group, sinks=True)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_softcap_and_sinks(softcap: float | None, sinks: bool) -> None:
    _check([[130, 1, 0]], (16, 16), 3, softcap=softcap, sinks=sinks, programs=(1, 2, 7))


def test_large_scores_do_not_overflow() -> None:
    cache = Cache([[70]], (16, 16))
    q = 1e4 * torch.randn(1, 2, 16)
    for softcap in (None, 30.0):
        scoring = Scoring(1.0, softcap)
        out = decode.decode_attention(q, cache.pool, cache.lists, scoring, programs=2)
        expected = _expected(q, cache.keys, cache.values, cache.lists.live, scoring)
        torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 128])
def test_page_borders(length: int) -> None:
    _check([[length, 5]], (16, 16), 2, programs=(1, 2, 5))


@pytest.mark.parametrize("programs", [1, 2, 3, 5, 8, 40])
def test_ragged_lists_over_any_number_of_programs(programs: int) -> None:
    live = [[300, 1, 64], [0, 0, 0], [65, 129, 7], [0, 200, 0]]
    _check(live, (16, 16), 2, sinks=True, programs=(programs,))


def test_more_lists_than_a_program_looks_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "LISTS", 4)
    _check([[70, 0], [0, 0], [0, 0], [0, 3], [0, 0], [65, 1]], (16, 16), 2, programs=(1, 3, 16))


def test_all_lists_empty() -> None:
    _check([[0, 0]], (16, 16), 2, sinks=True, programs=(1, 4))


@settings(max_examples=12, derandomize=True, deadline=None)
@given(
    live=st.lists(st.integers(0, 200), min_size=4, max_size=4),
    programs=st.integers(1, 12),
    number=st.sampled_from(["plain", "fp8", "nvfp4"]),
)
def test_any_lengths(live: list[int], programs: int, number: str) -> None:
    _check([live[:2], live[2:]], (16, 16), 2, (number, number), programs=(programs,))


def test_number_of_programs_changes_rounding_only() -> None:
    cache = Cache([[300, 65], [1, 190]], (16, 16), ("fp8", "nvfp4"))
    q = torch.randn(2, 4, 16)
    one, *others = (
        decode.decode_attention(q, cache.pool, cache.lists, Scoring(0.3), programs=n)
        for n in (1, 2, 3, 7, 20)
    )
    for other in others:
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("number", ["plain", "int8_row", "nvfp4"])
def test_page_ids_do_not_change_a_bit(number: str) -> None:
    outs = []
    for pages_seed in (0, 1):
        cache = Cache([[130, 65], [0, 70]], (16, 16), (number, number), pages_seed=pages_seed)
        q = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(7))
        outs.append(decode.decode_attention(q, cache.pool, cache.lists, Scoring(0.3), programs=3))
    assert torch.equal(*outs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    _check([[70, 3]], (32, 32), 2, sinks=True, dtype=dtype, tolerance=1e-2)
    _check([[70, 3]], (32, 32), 2, ("fp8", "nvfp4"), dtype=dtype, tolerance=1e-2)


@pytest.mark.parametrize(("heads", "latent", "rotary"), [(16, 32, 16), (70, 32, 8), (128, 16, 16)])
def test_latents_are_keys_and_values(heads: int, latent: int, rotary: int) -> None:
    cache = Cache([[130], [0], [64]], (latent, rotary))
    q = torch.randn(3, heads, latent + rotary)
    for scoring in (Scoring(0.2), Scoring(0.2, 3.0, torch.randn(heads))):
        keys = torch.cat([cache.keys, cache.values], dim=-1)
        expected = _expected(q, keys, cache.keys, cache.lists.live, scoring)
        plain = decode_reference.decode_latent(q, cache.pool, cache.lists, scoring)
        torch.testing.assert_close(plain.double(), expected, atol=2e-5, rtol=2e-5)
        for programs in (1, 4):
            out = decode.decode_latent(q, cache.pool, cache.lists, scoring, programs=programs)
            torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


def test_latents_in_another_format_are_refused() -> None:
    cache = Cache([[3]], (32, 16), ("fp8", "plain"))
    with pytest.raises(ValueError, match="fp8"):
        decode.decode_latent(torch.randn(1, 16, 48), cache.pool, cache.lists, Scoring(0.2))
