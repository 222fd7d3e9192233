# SPDX-License-Identifier: Apache-2.0
import math
import re
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_rows import FORMATS, Cache, expected_output
from torch import Tensor

from modelopt_dms.kernels import decode, decode_reference, decoding
from modelopt_dms.kernels.number_formats import Nvfp4
from modelopt_dms.kernels.reference import Scoring


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
    expected = expected_output(q, cache.keys, cache.values, cache.lists.live, scoring)
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
        expected = expected_output(q, cache.keys, cache.values, cache.lists.live, scoring)
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


@settings(max_examples=8, derandomize=True, deadline=None)
@given(
    live=st.lists(st.integers(0, 200), min_size=4, max_size=4),
    programs=st.integers(1, 12),
    number=st.sampled_from(["plain", "fp8", "nvfp4"]),
)
def test_any_lengths(live: list[int], programs: int, number: str) -> None:
    _check([live[:2], live[2:]], (16, 16), 2, (number, number), programs=(programs,))


def test_number_of_programs_changes_rounding_only() -> None:
    cache = Cache([[200, 65, 1]], (16, 16), ("fp8", "nvfp4"))
    q = torch.randn(1, 6, 16)
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


@pytest.mark.parametrize(("heads", "latent", "rotary"), [(16, 32, 8), (70, 16, 16)])
def test_latents_are_keys_and_values(heads: int, latent: int, rotary: int) -> None:
    cache = Cache([[70], [0], [32]], (latent, rotary))
    q = torch.randn(3, heads, latent + rotary)
    for scoring in (Scoring(0.2), Scoring(0.2, 3.0, torch.randn(heads))):
        keys = torch.cat([cache.keys, cache.values], dim=-1)
        expected = expected_output(q, keys, cache.keys, cache.lists.live, scoring)
        plain = decode_reference.decode_latent(q, cache.pool, cache.lists, scoring)
        torch.testing.assert_close(plain.double(), expected, atol=2e-5, rtol=2e-5)
        for programs in (4,) if heads > 64 else (1, 4):
            out = decode.decode_latent(q, cache.pool, cache.lists, scoring, programs=programs)
            torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=2e-5)


def test_latents_in_another_format_are_refused() -> None:
    cache = Cache([[3]], (32, 16), ("fp8", "plain"))
    with pytest.raises(ValueError, match="fp8"):
        decode.decode_latent(torch.randn(1, 16, 48), cache.pool, cache.lists, Scoring(0.2))


@triton.jit
def _decode_words(
    words, scales, out, NUMBER: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr
):
    rows, cols = tl.arange(0, ROWS), tl.arange(0, WORDS)
    x = tl.load(words + rows[:, None] * WORDS + cols[None, :])
    if NUMBER == "nvfp4":
        blocks = tl.arange(0, WORDS // 2)
        scale = tl.load(scales + rows[:, None] * (WORDS // 2) + blocks[None, :])
        numbers = decoding.from_e2m1(x, scale, tl.float32)
    elif NUMBER == "fp8":
        numbers = decoding.from_e4m3(x, tl.float32)
    else:
        numbers = decoding.from_int8(x, tl.float32)
    width: tl.constexpr = WORDS * decoding.word_codes(NUMBER)
    dims = decoding.code_order(0, width, NUMBER)
    tl.store(out + rows[:, None] * width + dims[None, :], numbers)


def _all_codes(number: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [16, 16] uint8, scales [16, 2] uint8 and the numbers [16, 16 or 32] they mean."""
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scales = torch.tensor([[1, 2], [7, 8], [9, 0x7E], [0x38, 3]], dtype=torch.uint8).repeat(4, 1)
    if number == "fp8":
        return codes, scales, codes.view(torch.float8_e4m3fn).float()
    if number == "int8":
        return codes, scales, codes.view(torch.int8).float()
    form = Nvfp4(torch.tensor([6.0 * 448.0]))  # a double scale of 1
    return codes, scales, form.decode(torch.cat([codes, scales], dim=-1), 32, torch.float32)


@pytest.mark.parametrize("number", ["fp8", "int8", "nvfp4"])
def test_every_code_is_decoded_exactly(number: str) -> None:
    codes, scales, expected = _all_codes(number)
    out = torch.empty_like(expected)
    _decode_words[(1,)](codes.view(torch.int32), scales, out, number, 16, 4)
    out *= decoding.number_factor(number, tl.float32)
    assert torch.equal(out[~expected.isnan()], expected[~expected.isnan()])


# The PTX that GPUs run in the place of what interpreters run, by an interpreter of ours.
PTX = {
    ("fp8", torch.bfloat16): decoding.E4M3_BF16,
    ("fp8", torch.float16): decoding.E4M3_FP16,
    ("int8", torch.bfloat16): decoding.INT8_BF16,
    ("int8", torch.float16): decoding.INT8_FP16,
    ("nvfp4", torch.bfloat16): decoding.E2M1_BF16,
    ("nvfp4", torch.float16): decoding.E2M1_FP16,
}


def _pair(bits: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([bits & 0xFFFF, bits >> 16], dtype=torch.uint16).view(dtype)


def _bits(pair: Tensor) -> int:
    low, high = pair.view(torch.uint16).tolist()
    return low | high << 16


def _run_ptx(text: str, inputs: dict[str, int]) -> dict[str, int]:
    """Registers after straight-line PTX on 32-bit registers."""
    registers = dict(inputs)

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def on_pairs(kind: str, how: Callable[[Tensor, Tensor], Tensor], a: str, b: str) -> int:
        dtype = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}[kind]
        return _bits(how(_pair(value(a), dtype), _pair(value(b), dtype)))

    for line in text.strip("{} ").split(";"):
        op, *operands = re.split(r"[ ,]+", line.replace("{", "").replace("}", "").strip())
        if op in ("", ".reg"):
            continue
        to, *of = operands
        if op == "mov.b32" and len(of) == 2:  # of one register to two halves
            registers[to], registers[of[0]] = value(of[1]) & 0xFFFF, value(of[1]) >> 16
        elif op == "mov.b32":
            registers[to] = value(of[0])
        elif op == "prmt.b32":
            source = (value(of[0]) | value(of[1]) << 32).to_bytes(8, "little")
            selector = value(of[2])
            chosen = bytes(source[selector >> 4 * i & 7] for i in range(4))
            registers[to] = int.from_bytes(chosen, "little")
        elif op == "and.b32":
            registers[to] = value(of[0]) & value(of[1])
        elif op == "shl.b32":
            registers[to] = value(of[0]) << value(of[1]) & 0xFFFFFFFF
        elif op == "shr.b32":
            registers[to] = value(of[0]) >> value(of[1])
        elif op == "lop3.b32":
            a, b, c = (value(x) for x in of[:3])
            registers[to] = {0xEA: (a & b) | c, 0x6A: (a & b) ^ c}[value(of[3])]
        elif op == "cvt.rn.f16x2.e4m3x2":
            codes = torch.tensor([value(of[0]) & 0xFF, value(of[0]) >> 8], dtype=torch.uint8)
            registers[to] = _bits(codes.view(torch.float8_e4m3fn).half())
        elif op.startswith("mul.rn."):
            registers[to] = on_pairs(op[7:], torch.mul, *of)
        elif op.startswith("sub.rn."):
            registers[to] = on_pairs(op[7:], torch.sub, *of)
        else:
            raise AssertionError(f"unknown PTX: {line}")
    return registers


@pytest.mark.parametrize(("number", "dtype"), PTX)
def test_ptx_decodes_every_code_exactly(number: str, dtype: torch.dtype) -> None:
    codes, scales, expected = _all_codes(number)
    parts = 8 if number == "nvfp4" else 4
    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
    scale_gain = 2.0**7 if dtype == torch.float16 else 2.0**100
    words = (codes.view(torch.int32).long() & 0xFFFFFFFF).tolist()
    for row in range(16):
        for pair in range(2):
            inputs = {f"${parts}": words[row][2 * pair], f"${parts + 1}": words[row][2 * pair + 1]}
            scale = scales[row, pair].view(torch.float8_e4m3fn).float() * scale_gain
            inputs[f"${parts + 2}"] = _bits(scale.to(dtype).repeat(2))
            registers = _run_ptx(PTX[number, dtype].value, inputs)
            found = torch.stack([_pair(registers[f"${i}"], dtype) for i in range(parts)], dim=1)
            found = found.float().flatten() * decoding.number_factor(number, dot)
            wanted = expected[row, 2 * parts * pair : 2 * parts * (pair + 1)]
            assert torch.equal(found[~wanted.isnan()], wanted[~wanted.isnan()])
