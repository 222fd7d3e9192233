# SPDX-License-Identifier: Apache-2.0
"""Reading and writing rows of pages in standard ONNX ops, one function for each number format.

As `kv_quant` and `kernels.rows` do it. Bytes are int8 in a graph, whatever they hold: TensorRT takes no other.
"""

from typing import Any

import numpy as np
from onnx import TensorProto, numpy_helper
from onnxscript import opset21 as op
from onnxscript import script
from onnxscript.values import OnnxFunction, Opset

from modelopt_dms.runtime.operators import DOMAIN, VERSION

OWN = Opset(DOMAIN, VERSION)
FLOAT, INT8, INT64 = TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT64


def _constant(values: list[float]) -> Any:
    return numpy_helper.from_array(np.array(values, dtype=np.float32))


# e4m3 by binade: where each begins, the step within it, and the code it begins with; subnormal numbers first.
_EXPONENTS = range(-6, 9)
_BEGINS = [0.0, *(2.0**e for e in _EXPONENTS)]
_STEPS = [2.0**-9, *(2.0 ** (e - 3) for e in _EXPONENTS)]
_MAGNITUDES = [b + i * s for b, s in zip(_BEGINS, _STEPS, strict=True) for i in range(8)]
_MAGNITUDES[127] = 0.0  # NaN, which is never stored
_BINADES, _FIRST = _constant(_BEGINS[1:]), _constant([8.0 * i for i in range(16)])
_BEGIN, _STEP = _constant(_BEGINS), _constant(_STEPS)
# By the code as a signed byte, plus 128: those with the sign bit come first.
_VALUES = _constant([-x for x in _MAGNITUDES] + _MAGNITUDES)


@script(OWN, default_opset=op)
def AllSlots(codes, table):
    """Codes [N, S, C] of all slots of lists with pages [B, K, P]: [B, K, P * S, C]."""
    shape = op.Concat(
        op.Shape(table, start=0, end=2),
        op.Constant(value_ints=[-1]),
        op.Shape(codes, start=2),
        axis=0,
    )
    return op.Reshape(op.Gather(codes, table), shape)


@script(OWN, default_opset=op)
def ReadPlain(codes, table, factor):
    """Rows [B, K, E, D] float32 of all slots."""
    return op.Cast(AllSlots(codes, table), to=FLOAT)


@script(OWN, default_opset=op)
def ReadInt8(codes, table, factor):
    """The same of integers, which factor [K] multiplies."""
    heads = op.Reshape(factor, op.Constant(value_ints=[1, -1, 1, 1]))
    return op.Cast(AllSlots(codes, table), to=FLOAT) * heads


@script(OWN, default_opset=op)
def ReadFp8(codes, table, factor):
    """The same of e4m3 codes."""
    heads = op.Reshape(factor, op.Constant(value_ints=[1, -1, 1, 1]))
    index = op.Cast(AllSlots(codes, table), to=INT64) + op.Constant(value_int=128)
    return op.Gather(op.Constant(value=_VALUES), index) * heads


@script(OWN, default_opset=op)
def EncodePlain(x, factor):
    """Codes [B, K, n, D] of rows: as they are."""
    return op.Identity(x)


@script(OWN, default_opset=op)
def EncodeInt8(x, factor):
    """The nearest integers of rows times factor [K]."""
    heads = op.Reshape(factor, op.Constant(value_ints=[1, -1, 1, 1]))
    scaled = op.Round(op.Cast(x, to=FLOAT) * heads)
    low, high = op.Constant(value_float=-128.0), op.Constant(value_float=127.0)
    return op.Cast(op.Clip(scaled, low, high), to=INT8)


@script(OWN, default_opset=op)
def EncodeFp8(x, factor):
    """Codes of the nearest e4m3 numbers of rows times factor [K], ties to the even code."""
    heads = op.Reshape(factor, op.Constant(value_ints=[1, -1, 1, 1]))
    scaled = op.Cast(x, to=FLOAT) * heads
    size = op.Min(op.Abs(scaled), op.Constant(value_float=448.0))
    last = op.Constant(value_ints=[-1])
    reached = op.Unsqueeze(size, last) >= op.Constant(value=_BINADES)
    binade = op.ReduceSum(op.Cast(reached, to=INT64), last, keepdims=0)
    steps = (size - op.Gather(op.Constant(value=_BEGIN), binade)) / op.Gather(
        op.Constant(value=_STEP), binade
    )
    # Binades begin at even codes, so that rounding to even steps is rounding to even codes.
    code = op.Gather(op.Constant(value=_FIRST), binade) + op.Round(steps)
    negative = scaled < op.Constant(value_float=0.0)
    return op.Cast(op.Where(negative, code - op.Constant(value_float=128.0), code), to=INT8)


@script(OWN, default_opset=op)
def PlaceRows(store, codes, slots, table):
    """The store [N, S, C] with codes [B, K, n, C] in slots [B, K, n] of lists; -1 goes to page 0, which nobody owns."""
    size = op.Shape(store, start=1, end=2)
    wanted = op.Cast(slots, to=INT64)
    pages = op.Shape(table, start=2, end=3)
    at = op.Clip(
        wanted / size, op.Constant(value_int=0), op.Squeeze(pages) - op.Constant(value_int=1)
    )
    page = op.Cast(op.GatherElements(table, at, axis=2), to=INT64)
    row = page * size + op.Mod(wanted, size)
    row = op.Where(wanted < op.Constant(value_int=0), op.Constant(value_int=0), row)
    flat = op.Reshape(
        store, op.Concat(op.Constant(value_ints=[-1]), op.Shape(store, start=2), axis=0)
    )
    placed = op.ScatterND(flat, op.Unsqueeze(row, op.Constant(value_ints=[-1])), codes)
    return op.Reshape(placed, op.Shape(store))


READ: dict[str, OnnxFunction] = {"plain": ReadPlain, "int8": ReadInt8, "fp8": ReadFp8}
ENCODE: dict[str, OnnxFunction] = {"plain": EncodePlain, "int8": EncodeInt8, "fp8": EncodeFp8}
