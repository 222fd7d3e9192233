# SPDX-License-Identifier: Apache-2.0
"""Numbers to FP8, int8 and NVFP4 inside Triton kernels: bit for bit what `kv_quant` stores for finite numbers.

Only float32 arithmetic that rounds correctly everywhere, and integers: Triton's interpreter converts float32 to e4m3
wrongly, and its plain division on a GPU is approximate.
"""

import triton
import triton.language as tl


@triton.jit
def _nearest_float(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """Codes int32, without sign, of the floats nearest to |x|, ties to even, for few mantissa and exponent bits.

    LARGEST is the largest of them, as the bits of a float32.
    """
    bits = tl.minimum(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, LARGEST)
    DROPPED: tl.constexpr = 23 - MANTISSA
    half = (1 << (DROPPED - 1)) - 1
    normal = ((bits + half + ((bits >> DROPPED) & 1)) >> DROPPED) - ((127 - BIAS) << MANTISSA)
    # Below the smallest normal number, added to a float32 whose last bit is worth one step, the sum counts steps.
    COUNTER: tl.constexpr = 127 + 24 - BIAS - MANTISSA  # its exponent
    counter = tl.full(bits.shape, COUNTER << 23, tl.int32).to(tl.float32, bitcast=True)
    summed = bits.to(tl.float32, bitcast=True) + counter
    subnormal = summed.to(tl.int32, bitcast=True) - (COUNTER << 23)
    return tl.where(bits >= (128 - BIAS) << 23, normal, subnormal)


@triton.jit
def to_e4m3(x):
    """Codes uint8 of float32 numbers, saturating at 448."""
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (_nearest_float(x, 3, 7, 0x43E00000) | sign).to(tl.uint8)


@triton.jit
def to_int8(x):
    """Codes uint8 of float32 numbers, ties to even, saturating at -128 and 127."""
    x = tl.minimum(tl.maximum(x, -128.0), 127.0)
    # The last bit of 1.5 * 2^23 is worth 1.
    return ((x + 12582912.0).to(tl.int32, bitcast=True) & 0xFF).to(tl.uint8)


@triton.jit
def to_e2m1(x):
    """Codes int32 of float32 numbers, ties to the even code, saturating at 6; -0 is 0."""
    return _nearest_float(x, 1, 1, 0x40C00000) + tl.where(x < 0.0, 8, 0)


@triton.jit
def e4m3_to_float(codes):
    """Float32 of int32 codes without a sign."""
    normal = ((codes << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    return tl.where(codes < 8, codes.to(tl.float32) * 0.001953125, normal)


@triton.jit
def row_scale(largest, NUMBER: tl.constexpr):
    """What a row whose largest magnitude this is gets multiplied by."""
    largest = tl.where(largest <= 5.9604644775390625e-08, 1.0, largest)  # 2^-24
    # PyTorch computes 448 / x as 448 * (1 / x), and int8's 127 / x in one step.
    dividend = tl.full(largest.shape, 1.0 if NUMBER == "fp8" else 127.0, tl.float32)
    scale = tl.div_rn(dividend, largest)
    return scale * 448.0 if NUMBER == "fp8" else scale


@triton.jit
def load_rows(x_ptr, rows, wanted, NUMBER: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of numbers [.., D]: [ROWS, BLOCK_D], or [ROWS, BLOCK_D / 16, 8, 2] for NVFP4; 0 where not wanted.

    Args:
        x_ptr: numbers, contiguous.
        rows: which rows [ROWS] int64.
        wanted: [ROWS] bool.
        NUMBER: "plain" leaves them in their dtype; others make them float32.
        D: numbers of a row.
        BLOCK_D: the power of two above.
    """
    if NUMBER == "nvfp4":
        block = tl.arange(0, BLOCK_D // 16)[None, :, None, None]
        pair = tl.arange(0, 8)[None, None, :, None]
        side = tl.arange(0, 2)[None, None, None, :]
        at = block * 16 + pair * 2 + side
        mask = wanted[:, None, None, None] & (at < D)
        x = tl.load(x_ptr + rows[:, None, None, None] * D + at, mask, other=0.0)
    else:
        at = tl.arange(0, BLOCK_D)[None, :]
        mask = wanted[:, None] & (at < D)
        x = tl.load(x_ptr + rows[:, None] * D + at, mask, other=0.0)
    if NUMBER != "plain":
        x = x.to(tl.float32)
    return x


@triton.jit
def store_rows(
    x,
    rows,
    wanted,
    static_ptr,
    codes_ptr,
    scales_ptr,
    NUMBER: tl.constexpr,
    PER_ROW: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Encode what `load_rows` loaded and store it.

    Args:
        x: the numbers.
        rows: which rows of the store [ROWS] int64.
        wanted: [ROWS] bool.
        static_ptr: the calibrated factor of encoding, float32; not read where PER_ROW or "plain".
        codes_ptr: codes of the store.
        scales_ptr: scales stored with the rows, where there are any.
        NUMBER: format, as in `RowLayout`.
        PER_ROW: every row has a float32 scale.
        D: numbers of a row.
        BLOCK_D: the power of two above.
    """
    if NUMBER == "nvfp4":
        double_scale = tl.load(static_ptr)
        low, high = tl.split(x)  # [ROWS, BLOCK_D / 16, 8]
        largest = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), axis=2)  # [ROWS, BLOCK_D / 16]
        scale = tl.div_rn(largest, tl.zeros_like(largest) + 6.0 * double_scale)
        scale = tl.where(scale == 0.0, 1.0, scale)
        # e4m3's smallest is 2^-9; a block is not scaled by 0.
        scale = to_e4m3(tl.maximum(scale, 0.001953125))
        factor = (e4m3_to_float(scale.to(tl.int32)) * double_scale)[:, :, None]
        factor = tl.broadcast_to(factor, low.shape)
        packed = to_e2m1(tl.div_rn(low, factor)) | (to_e2m1(tl.div_rn(high, factor)) << 4)
        block = tl.arange(0, BLOCK_D // 16)
        byte = block[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
        at = rows[:, None, None] * (D // 2) + byte
        tl.store(codes_ptr + at, packed.to(tl.uint8), wanted[:, None, None] & (byte < D // 2))
        at = rows[:, None] * (D // 16) + block[None, :]
        tl.store(scales_ptr + at, scale, wanted[:, None] & (block < D // 16)[None, :])
    else:
        at = tl.arange(0, BLOCK_D)[None, :]
        mask = wanted[:, None] & (at < D)
        codes = codes_ptr + rows[:, None] * D + at
        if NUMBER == "plain":
            tl.store(codes, x, mask)
        else:
            if PER_ROW:
                scale = row_scale(tl.max(tl.abs(x), axis=1), NUMBER)  # [ROWS]
                tl.store(scales_ptr + rows, scale, wanted)
                x = x * scale[:, None]
            else:
                x = x * tl.load(static_ptr)
            tl.store(codes, to_e4m3(x) if NUMBER == "fp8" else to_int8(x), mask)


@triton.jit
def copy_rows(from_ptr, from_rows, to_ptr, to_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Copy rows [.., WIDTH] as they are; from_rows and to_rows are [ROWS] int64."""
    at = tl.arange(0, BLOCK)[None, :]
    x = tl.load(from_ptr + from_rows[:, None] * WIDTH + at, at < WIDTH)
    tl.store(to_ptr + to_rows[:, None] * WIDTH + at, x, at < WIDTH)


@triton.jit
def _copy_codes(
    from_ptr, from_rows, to_ptr, to_rows, NUMBER: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Copy the codes of rows."""
    PACKED: tl.constexpr = 2 if NUMBER == "nvfp4" else 1
    copy_rows(from_ptr, from_rows, to_ptr, to_rows, D // PACKED, BLOCK_D // PACKED)


@triton.jit
def _copy_scales(
    from_ptr, from_rows, to_ptr, to_rows,
    NUMBER: tl.constexpr, PER_ROW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Copy the scales of rows, where they have any."""
    if NUMBER == "nvfp4":
        copy_rows(from_ptr, from_rows, to_ptr, to_rows, D // 16, BLOCK_D // 2)
    elif PER_ROW:
        copy_rows(from_ptr, from_rows, to_ptr, to_rows, 1, BLOCK_D)


@triton.jit
def copy_pair(
    from_rows,
    from_keys,
    from_values,
    from_key_scales,
    from_value_scales,
    to_rows,
    to_keys,
    to_values,
    to_key_scales,
    to_value_scales,
    KEY_NUMBER: tl.constexpr,
    KEY_PER_ROW: tl.constexpr,
    DK: tl.constexpr,
    BLOCK_DK: tl.constexpr,
    VALUE_NUMBER: tl.constexpr,
    VALUE_PER_ROW: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Copy stored key rows and value rows as they are."""
    _copy_codes(from_keys, from_rows, to_keys, to_rows, KEY_NUMBER, DK, BLOCK_DK)
    _copy_codes(from_values, from_rows, to_values, to_rows, VALUE_NUMBER, DV, BLOCK_DV)
    _copy_scales(
        from_key_scales, from_rows, to_key_scales, to_rows, KEY_NUMBER, KEY_PER_ROW, DK, BLOCK_DK
    )
    _copy_scales(
        from_value_scales, from_rows, to_value_scales, to_rows, VALUE_NUMBER, VALUE_PER_ROW, DV, BLOCK_DV
    )  # fmt: skip
