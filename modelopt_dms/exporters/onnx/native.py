# SPDX-License-Identifier: Apache-2.0
"""Bodies for graphs without plugins: attention is ONNX's own `Attention`, for which runtimes have layers of their own.

To a runtime that knows one length for all heads, lists are padded slots, and a mask for every head says which of them
live. Stands where the bodies of `bodies` that attend stood; shapes and names as in `runtime.operators`.
"""

from onnxscript import opset23 as op
from onnxscript import script
from onnxscript.values import OnnxFunction

from modelopt_dms.exporters.onnx.bodies import SeenByChunk
from modelopt_dms.exporters.onnx.rows import INT64, OWN, READ

OPSET = 23  # the first with Attention


@script(OWN, default_opset=op)
def HeadMask(ok, q):
    """What Attention adds to scores [B, H, T, E], from which keys [B, K, T, E] are seen."""
    # Not -inf: a list without a live slot would be NaN, and spread through page 0.
    hidden = op.Where(ok, op.Constant(value_float=0.0), op.Constant(value_float=-30000.0))
    group = op.Shape(q, start=1, end=2) / op.Shape(ok, start=1, end=2)
    ones = op.Constant(value_ints=[1, 1])
    spread = op.Expand(
        op.Unsqueeze(hidden, op.Constant(value_ints=[2])), op.Concat(ones, group, ones, axis=0)
    )
    shape = op.Concat(op.Shape(q, start=0, end=2), op.Shape(ok, start=2, end=4), axis=0)
    return op.CastLike(op.Reshape(spread, shape), q)


def _decode_partial(key_number: str, value_number: str) -> OnnxFunction:
    read_keys, read_values = READ[key_number], READ[value_number]

    @script(OWN, default_opset=op)
    def DmsDecodePartial(
        q, keys, values, scales, table, live, scale: float, softcap: float, programs: int, rows: int, value_dim: int
    ):  # fmt: skip
        """Attention of one query a sequence; partial results have no meaning here."""
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        token = op.Constant(value_ints=[2])
        k = op.CastLike(read_keys(keys, table, op.Gather(scales, one)), q)
        v = op.CastLike(read_values(values, table, op.Gather(scales, op.Constant(value_int=3))), q)
        ends = op.Unsqueeze(op.Cast(live, to=INT64), op.Constant(value_ints=[2, 3]))
        slots = op.Range(zero, op.Squeeze(op.Shape(k, start=2, end=3)), one)
        query = op.Unsqueeze(q, token)  # [B, H, 1, D]
        mask = HeadMask(slots < ends, query)
        out = op.Attention(query, k, v, mask, scale=scale, softcap=softcap)
        whole = op.Squeeze(out, token)
        nothing = op.Cast(op.Reshape(live, op.Constant(value_ints=[-1])), to=1)
        spans = op.Concat(op.Unsqueeze(live, op.Constant(value_ints=[2])), axis=2)
        return whole, nothing, nothing, spans

    return DmsDecodePartial


@script(OWN, default_opset=op)
def DmsDecodeCombine(whole, partial, partial_lse, spans, live):
    """The output as it is."""
    return op.Identity(whole)


def _prefill_attention(key_number: str, value_number: str) -> OnnxFunction:
    read_keys, read_values = READ[key_number], READ[value_number]

    @script(OWN, default_opset=op)
    def DmsPrefillAttention(
        q, k, v, bias, starts, first, expiry, keys, values, scales, table, live,
        scale: float, softcap: float, window: int
    ):  # fmt: skip
        """Attention of T new tokens over what lives and among themselves."""
        one, three = op.Constant(value_int=1), op.Constant(value_int=3)
        old_k = op.CastLike(read_keys(keys, table, op.Gather(scales, one)), q)
        old_v = op.CastLike(read_values(values, table, op.Gather(scales, three)), q)
        seen = SeenByChunk(q, bias, starts, first, expiry, live, window)
        mask = HeadMask(seen, q)
        all_k, all_v = op.Concat(old_k, k, axis=2), op.Concat(old_v, v, axis=2)
        out = op.Attention(q, all_k, all_v, mask, scale=scale, softcap=softcap)
        return out, op.Identity(keys), op.Identity(values)

    return DmsPrefillAttention


def attending(key_number: str, value_number: str) -> list[OnnxFunction]:
    """For `bodies.functions`."""
    formats = (key_number, value_number)
    return [HeadMask, _decode_partial(*formats), DmsDecodeCombine, _prefill_attention(*formats)]
