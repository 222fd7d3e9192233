# SPDX-License-Identifier: Apache-2.0
"""Triton device functions that turn stored codes into numbers: FP8 e4m3, int8, and e2m1 with block scales (NVFP4).

The opposite of `kernels.encoding`. Codes come as 32-bit words, four or eight
a word, and leave in another order: first the first code of every word, then the second of every word, and so on
(`code_order`). So two words at a time become pairs of 16-bit numbers, without handling single bytes. Every code becomes
its number exactly, but for a power of two (`number_factor`) that is multiplied into scores or outputs instead.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from modelopt_dms.kernels.layout import Number


def number_factor(number: Number, dot: tl.dtype) -> float:
    """What numbers decoded to this dtype must still be multiplied by."""
    if number != "nvfp4":
        return 1.0
    # e2m1's bits put in place are 2^(1 - bias) too small; block scales make up for what does not overflow.
    return 2.0**7 if dot == tl.float16 else 2.0**26


@triton.constexpr_function
def word_codes(number: str) -> int:
    """Codes that an element holds: a word of 32 bits, or a plain number."""
    return {"plain": 1, "fp8": 4, "int8": 4, "nvfp4": 8}[number]


def as_words(codes: Tensor) -> Tensor:
    """Codes as kernels read them: bytes four at a time."""
    return codes.view(torch.int32) if codes.dtype == torch.uint8 else codes


@triton.jit
def code_order(START: tl.constexpr, WIDTH: tl.constexpr, NUMBER: tl.constexpr):
    """The dims START to START + WIDTH of a row, in the order in which decoding leaves them: [WIDTH]."""
    WORD: tl.constexpr = word_codes(NUMBER)
    words: tl.constexpr = WIDTH // WORD
    at = tl.arange(0, WIDTH)
    return START + at % words * WORD + at // words


# The PTX below takes two words ($4 $5, or $8 $9 and their scales in $10) and leaves in $0 the first code of both as a
# pair of numbers, in $1 the second, and so on.
def _lines(*parts: str) -> tl.constexpr:
    return tl.constexpr("{ .reg .b32 t, m, s, c; .reg .b16 x, y; " + " ".join(parts) + " }")


# Exponent and mantissa of e4m3 moved to bfloat16's places are 2^-120 times the number, also where e4m3 is subnormal.
# The hardware converts to float16 only, and from there to bfloat16 one by one.
E4M3_BF16 = _lines(
    "mov.b32 c, 0x7b807b80;",  # 2^120
    *(
        f"prmt.b32 t, $4, $5, 0x{4 + i}0{i}0;"  # code i of both words, in the upper byte of each half
        "shr.b32 m, t, 4; and.b32 m, m, 0x07f007f0; lop3.b32 m, t, 0x80008000, m, 0xea;"  # (t & sign) | m
        f"mul.rn.bf16x2 ${i}, m, c;"
        for i in range(4)
    ),
)
E4M3_FP16 = _lines(
    *(
        f"prmt.b32 t, $4, $5, 0x{i + 5}{i + 1}{i + 4}{i}; mov.b32 {{x, y}}, t;"
        f"cvt.rn.f16x2.e4m3x2 ${i}, x; cvt.rn.f16x2.e4m3x2 ${i + 1}, y;"
        for i in (0, 2)
    )
)
# 128 + the lower seven bits, less 128 or, for negative codes, 256.
INT8_BF16 = _lines(
    "mov.b32 c, 0x43004300;",
    *(
        f"prmt.b32 t, $4, $5, 0x0{4 + i}0{i};"
        "lop3.b32 m, t, 0x007f007f, c, 0xea; lop3.b32 s, t, 0x00800080, c, 0xea;"
        f"sub.rn.bf16x2 ${i}, m, s;"
        for i in range(4)
    ),
)
# 1024 + (code + 128), less 1152.
INT8_FP16 = _lines(
    "mov.b32 c, 0x64806480;",
    *(
        f"prmt.b32 t, $4, $5, 0x0{4 + i}0{i};"
        f"lop3.b32 m, t, 0x00ff00ff, c, 0x6a; sub.rn.f16x2 ${i}, m, c;"  # (t & byte) ^ c
        for i in range(4)
    ),
)


def _e2m1(kind: str, first_bit: int) -> tl.constexpr:
    """Magnitudes to the dtype's first mantissa bit (`first_bit`) and last two exponent bits, signs to bit 15."""
    steps = []
    for half, selector in enumerate(("0x5410", "0x7632")):
        steps.append(f"prmt.b32 t, $8, $9, {selector};")
        for i in range(4):
            left = first_bit - 4 * i
            shift = f"shl.b32 m, t, {left};" if left > 0 else f"shr.b32 m, t, {-left};"
            mask = 0x00070007 << first_bit
            steps.append(f"{shift} and.b32 m, m, {mask:#010x}; shl.b32 s, t, {12 - 4 * i};")
            steps.append("lop3.b32 m, s, 0x80008000, m, 0xea;")
            steps.append(f"mul.rn.{kind} ${4 * half + i}, m, $10;")
    return _lines(*steps)


E2M1_BF16 = _e2m1("bf16x2", 6)
E2M1_FP16 = _e2m1("f16x2", 9)


# What such PTX leaves.
FOUR_BF16, FOUR_FP16 = tl.constexpr((tl.bfloat16,) * 4), tl.constexpr((tl.float16,) * 4)
EIGHT_BF16, EIGHT_FP16 = tl.constexpr((tl.bfloat16,) * 8), tl.constexpr((tl.float16,) * 8)


@triton.jit
def _four(a, b, c, d):
    """Parts [n, m] one after the other, [n, 4 * m]."""
    x = tl.join(tl.join(a, b), tl.join(c, d))  # [n, m, 2, 2], of parts [[a, c], [b, d]]
    return x.permute(0, 3, 2, 1).reshape([a.shape[0], 4 * a.shape[1]])


@triton.jit
def _eight(a, b, c, d, e, f, g, h):
    """Parts [n, m] one after the other, [n, 8 * m]."""
    x = tl.join(tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, h)))
    return x.permute(0, 4, 3, 2, 1).reshape([a.shape[0], 8 * a.shape[1]])


@triton.jit
def from_e4m3(words, DOT: tl.constexpr):
    """Numbers [n, 4 * m] in DOT of FP8 codes, words [n, m] int32. The codes of NaN are 480, or NaN in float16."""
    if DOT.is_bf16():
        a, b, c, d = tl.inline_asm_elementwise(
            E4M3_BF16, "=r,=r,=r,=r,r,r", [words], FOUR_BF16.value, is_pure=True, pack=2
        )
    elif DOT.is_fp16():
        a, b, c, d = tl.inline_asm_elementwise(
            E4M3_FP16, "=r,=r,=r,=r,r,r", [words], FOUR_FP16.value, is_pure=True, pack=2
        )
    else:
        a, b = _e4m3_float32(words), _e4m3_float32(words >> 8)
        c, d = _e4m3_float32(words >> 16), _e4m3_float32(words >> 24)
    return _four(a, b, c, d)


@triton.jit
def _e4m3_float32(x):
    """The number of the lower eight bits."""
    bits = ((x & 0x7F) << 20) | ((x & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def from_int8(words, DOT: tl.constexpr):
    """Numbers [n, 4 * m] in DOT of int8 codes, words [n, m] int32."""
    if DOT.is_bf16():
        a, b, c, d = tl.inline_asm_elementwise(
            INT8_BF16, "=r,=r,=r,=r,r,r", [words], FOUR_BF16.value, is_pure=True, pack=2
        )
    elif DOT.is_fp16():
        a, b, c, d = tl.inline_asm_elementwise(
            INT8_FP16, "=r,=r,=r,=r,r,r", [words], FOUR_FP16.value, is_pure=True, pack=2
        )
    else:
        a, b = ((words << 24) >> 24).to(DOT), ((words << 16) >> 24).to(DOT)
        c, d = ((words << 8) >> 24).to(DOT), (words >> 24).to(DOT)
    return _four(a, b, c, d)


@triton.jit
def from_e2m1(words, scales, DOT: tl.constexpr):
    """Numbers over `number_factor` [n, 8 * m] in DOT of NVFP4 codes, words [n, m] int32, scales [n, m / 2] uint8."""
    # As large as lets no product overflow; smaller ones would lose bits: 2^7 and 2^100.
    gain: tl.constexpr = 128.0 if DOT.is_fp16() else 1.2676506002282294e30
    scale = (scales.to(tl.float8e4nv, bitcast=True).to(tl.float32) * gain).to(DOT)
    scale = tl.join(scale, scale).reshape(words.shape)  # a block is two words
    if DOT.is_bf16():
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            E2M1_BF16,
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r",
            [words, scale],
            EIGHT_BF16.value,
            is_pure=True,
            pack=2,
        )
    elif DOT.is_fp16():
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            E2M1_FP16,
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r",
            [words, scale],
            EIGHT_FP16.value,
            is_pure=True,
            pack=2,
        )
    else:
        a, b = _e2m1_float32(words << 28, scale), _e2m1_float32(words << 24, scale)
        c, d = _e2m1_float32(words << 20, scale), _e2m1_float32(words << 16, scale)
        e, f = _e2m1_float32(words << 12, scale), _e2m1_float32(words << 8, scale)
        g, h = _e2m1_float32(words << 4, scale), _e2m1_float32(words, scale)
    return _eight(a, b, c, d, e, f, g, h)


@triton.jit
def _e2m1_float32(x, scale):
    """The number, times scale and 2^-126, of the upper four bits."""
    bits = ((x >> 6) & 0x01C00000) | (x & -0x80000000)
    return bits.to(tl.float32, bitcast=True) * scale
