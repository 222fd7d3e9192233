# SPDX-License-Identifier: Apache-2.0
"""What each of our ops means in standard ONNX ops: functions that go into the graph's file beside their nodes.

A runtime without our kernels computes them; TensorRT takes the plugin of the same name instead. Scores and sums are
float32. Shapes and names as in `runtime.operators`; every list is padded to E = P * S slots.
"""

from onnx import FunctionProto
from onnxscript import opset21 as op
from onnxscript import script
from onnxscript.values import OnnxFunction

from modelopt_dms.exporters.onnx.rows import ENCODE, FLOAT, INT64, OWN, READ, AllSlots, PlaceRows
from modelopt_dms.runtime.operators import OPERATORS

OPSET = 21
INT32 = 6


@script(OWN, default_opset=op)
def Masked(x, ok, other: float):
    """Numbers of x where ok, another elsewhere."""
    return op.Where(ok, x, op.Constant(value_float=other))


@script(OWN, default_opset=op)
def Choose(which, this, that):
    """Where, of bools: onnxruntime has none."""
    return op.Or(op.And(which, this), op.And(op.Not(which), that))


@script(OWN, default_opset=op)
def Scores(q, k, scale: float, softcap: float):
    """Scores of queries on keys, capped if softcap is not 0."""
    found = op.MatMul(q, op.Transpose(k, perm=[0, 1, 2, 4, 3])) * op.Constant(value_float=scale)
    cap = op.Constant(value_float=softcap)
    zero = op.Constant(value_float=0.0)
    divisor = op.Where(cap == zero, op.Constant(value_float=1.0), cap)
    return op.Where(cap == zero, found, cap * op.Tanh(found / divisor))


@script(OWN, default_opset=op)
def Grouped(q, table):
    """Queries [B, H, ..] by KV head [B, K, G, ..], in float32."""
    heads = op.Concat(
        op.Shape(table, start=0, end=2), op.Constant(value_ints=[-1]), op.Shape(q, start=2), axis=0
    )
    return op.Reshape(op.Cast(q, to=FLOAT), heads)


def _cache_update(key_number: str, value_number: str) -> OnnxFunction:
    encode_keys, encode_values = ENCODE[key_number], ENCODE[value_number]

    @script(OWN, default_opset=op)
    def DmsCacheUpdate(
        k, v, evict, active, scales, table, keys, values, live, seen, ring_slot, ring_evict, window: int, shift: int
    ):  # fmt: skip
        """One token of every active sequence goes to the slot of the marked one that leaves, or a new one."""
        last = op.Constant(value_ints=[-1])
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        ring = op.Constant(value_int=window) + one
        moves = op.Unsqueeze(active, last)  # [B, 1]
        past = op.Cast(seen, to=INT64)
        column = op.Unsqueeze(op.Mod(past, ring), last)  # [B, K, 1]
        # With shift 1 the decision is about the token before.
        before = op.Unsqueeze(op.Mod(past + ring - one, ring), last)
        governs = op.And(op.And(moves, past > zero), op.Constant(value_int=shift) == one)
        held = op.Squeeze(op.GatherElements(ring_evict, before, axis=2), last)
        decided = op.ScatterElements(
            ring_evict, before, op.Unsqueeze(Choose(governs, evict, held), last), axis=2
        )
        expired = op.Squeeze(op.GatherElements(ring_slot, column, axis=2), last)  # [B, K]
        marked = op.Squeeze(op.GatherElements(decided, column, axis=2), last)
        oldest = op.Cast(expired, to=INT64)
        length = op.Cast(live, to=INT64)
        reuse = op.And(marked, oldest >= zero)
        slot = op.Where(reuse, oldest, length)
        limit = op.Shape(table, start=2, end=3) * op.Shape(keys, start=1, end=2)
        fits = slot < limit
        place = op.Where(fits, slot, op.Constant(value_int=-1))
        target = op.Unsqueeze(op.Where(moves, place, op.Constant(value_int=-1)), last)
        new_rows = op.Constant(value_ints=[2])
        key_codes = encode_keys(op.Unsqueeze(k, new_rows), op.Gather(scales, zero))
        value_codes = encode_values(
            op.Unsqueeze(v, new_rows), op.Gather(scales, op.Constant(value_int=2))
        )
        new_keys = PlaceRows(keys, key_codes, target, table)
        new_values = PlaceRows(values, value_codes, target, table)
        grows = op.And(op.And(moves, fits), op.Not(reuse))
        new_live = live + op.Cast(grows, to=INT32)
        new_seen = seen + op.Cast(op.Expand(moves, op.Shape(seen)), to=INT32)
        entered = op.Where(moves, op.Cast(place, to=INT32), expired)
        new_ring_slot = op.ScatterElements(ring_slot, column, op.Unsqueeze(entered, last), axis=2)
        known = op.And(evict, op.Constant(value_int=shift) == zero)
        mark = Choose(moves, known, marked)
        new_ring_evict = op.ScatterElements(decided, column, op.Unsqueeze(mark, last), axis=2)
        return new_keys, new_values, new_live, new_seen, new_ring_slot, new_ring_evict

    return DmsCacheUpdate


def _decode_partial(key_number: str, value_number: str) -> OnnxFunction:
    read_keys, read_values = READ[key_number], READ[value_number]

    @script(OWN, default_opset=op)
    def DmsDecodePartial(
        q, keys, values, scales, table, live, scale: float, softcap: float, programs: int, rows: int, value_dim: int
    ):  # fmt: skip
        """Attention of one query a sequence over every list, as if one program had each list whole."""
        last = op.Constant(value_ints=[-1])
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        k = read_keys(keys, table, op.Gather(scales, one))  # [B, K, E, D]
        v = read_values(values, table, op.Gather(scales, op.Constant(value_int=3)))
        ends = op.Unsqueeze(op.Cast(live, to=INT64), op.Constant(value_ints=[2, 3]))
        slots = op.Range(zero, op.Squeeze(op.Shape(k, start=2, end=3)), one)
        ok = slots < ends  # [B, K, 1, E]
        query = op.Unsqueeze(Grouped(q, table), op.Constant(value_ints=[3]))  # [B, K, G, 1, D]
        found = Scores(query, op.Unsqueeze(k, op.Constant(value_ints=[2])), scale, softcap)
        scores = Masked(op.Squeeze(found, op.Constant(value_ints=[3])), ok, -3.0e38)
        top = op.ReduceMax(scores, last)
        weights = op.Exp(scores - top) * op.Cast(ok, to=FLOAT)
        total = op.Max(op.ReduceSum(weights, last), op.Constant(value_float=1.0e-30))
        out = op.MatMul(weights, v) / total  # [B, K, G, DV]
        shape = op.Concat(op.Shape(q, start=0, end=2), last, axis=0)
        whole = op.CastLike(op.Reshape(out, shape), q)
        parts = op.Concat(
            op.Reshape(op.Constant(value_int=programs), op.Constant(value_ints=[1])),
            op.Constant(value_ints=[2]),
            op.Reshape(op.Constant(value_int=rows), op.Constant(value_ints=[1])),
            axis=0,
        )
        dims = op.Reshape(op.Constant(value_int=value_dim), op.Constant(value_ints=[1]))
        partial = op.Expand(op.Constant(value_float=0.0), op.Concat(parts, dims, axis=0))
        partial_lse = op.Expand(op.Constant(value_float=0.0), parts)
        pairs = op.Concat(op.Shape(live), op.Constant(value_ints=[2]), axis=0)
        spans = op.Cast(op.Expand(zero, pairs), to=INT32)
        return whole, partial, partial_lse, spans

    return DmsDecodePartial


@script(OWN, default_opset=op)
def DmsDecodeCombine(whole, partial, partial_lse, spans, live):
    """Lists that several programs shared, joined; others as they are; 0 for empty ones."""
    last = op.Constant(value_ints=[-1])
    zero, one, two = op.Constant(value_int=0), op.Constant(value_int=1), op.Constant(value_int=2)
    ends = op.Cast(spans, to=INT64)
    first = op.Unsqueeze(op.Gather(ends, zero, axis=2), last)  # [B, K, 1]
    final = op.Unsqueeze(op.Gather(ends, one, axis=2), last)
    count = op.Shape(partial, start=0, end=1)
    programs = op.Range(zero, op.Squeeze(count), one)
    some = op.And(programs >= first, programs <= final)  # [B, K, programs]
    place = two * programs + op.Cast(programs == first, to=INT64)
    flat = op.Concat(op.Constant(value_ints=[-1]), op.Shape(partial, start=2), axis=0)
    parts = op.Gather(op.Reshape(partial, flat), place)  # [B, K, programs, rows, DV]
    lengths = op.Concat(op.Constant(value_ints=[-1]), op.Shape(partial_lse, start=2), axis=0)
    lse = op.Gather(op.Reshape(partial_lse, lengths), place)
    ok = op.Unsqueeze(some, last)
    lse = Masked(lse, ok, -3.0e38)
    over = op.Constant(value_ints=[2])
    shares = op.Exp((lse - op.ReduceMax(lse, over)) * op.Constant(value_float=0.6931471805599453))
    shares = op.Unsqueeze(shares * op.Cast(ok, to=FLOAT), last)
    used = op.Where(shares > op.Constant(value_float=0.0), parts, op.Constant(value_float=0.0))
    total = op.Max(op.ReduceSum(shares, over, keepdims=0), op.Constant(value_float=1.0e-30))
    joined = op.ReduceSum(shares * used, over, keepdims=0) / total  # [B, K, rows, DV]
    by_list = op.Reshape(op.Cast(whole, to=FLOAT), op.Shape(joined))
    shared = op.Unsqueeze(first < final, last)
    filled = op.Unsqueeze(op.Cast(live, to=INT64) > zero, op.Constant(value_ints=[2, 3]))
    out = Masked(op.Where(shared, joined, by_list), filled, 0.0)
    return op.CastLike(op.Reshape(out, op.Shape(whole)), whole)


@script(OWN, default_opset=op)
def SeenByChunk(q, bias, starts, first, expiry, live, window: int):
    """Which of the E slots of lists and of the T tokens of a chunk each of its queries sees: [B, K, T, E + T]."""
    last, group = op.Constant(value_ints=[-1]), op.Constant(value_ints=[2])
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    tokens = op.Range(zero, op.Squeeze(op.Shape(q, start=2, end=3)), one)
    queries = op.Unsqueeze(tokens, last)  # [T, 1]
    heads = op.Constant(value_ints=[1, 3])
    begins = op.Unsqueeze(op.Cast(starts, to=INT64), heads)  # [B, 1, T, 1]

    positions = op.Unsqueeze(op.Cast(first, to=INT64), last) + tokens  # [B, T]
    until = op.Unsqueeze(op.Cast(expiry, to=INT64), group)  # [B, K, 1, E]
    slots = op.Range(zero, op.Squeeze(op.Shape(expiry, start=2, end=3)), one)
    ends = op.Unsqueeze(op.Cast(live, to=INT64), op.Constant(value_ints=[2, 3]))
    held = op.And(op.Unsqueeze(positions, heads) <= until, slots < ends)
    readable = op.And(held, begins < zero)  # [B, K, T, E]

    here = op.Slice(bias, op.Constant(value_ints=[0]), op.Shape(q, start=2, end=3), last)
    marked = op.Unsqueeze(here, group) < op.Constant(value_float=0.0)  # [B, K, 1, T]
    gone = op.And(queries - tokens > op.Constant(value_int=window), marked)  # [B, K, T, T]
    own = op.And(op.And(tokens <= queries, tokens >= begins), op.Not(gone))
    return op.Concat(readable, own, axis=-1)


def _prefill_attention(key_number: str, value_number: str) -> OnnxFunction:
    read_keys, read_values = READ[key_number], READ[value_number]

    @script(OWN, default_opset=op)
    def DmsPrefillAttention(
        q, k, v, bias, starts, first, expiry, keys, values, scales, table, live,
        scale: float, softcap: float, window: int
    ):  # fmt: skip
        """Attention of T new tokens over what lives and among themselves, marked ones hidden behind the window."""
        last, group = op.Constant(value_ints=[-1]), op.Constant(value_ints=[2])
        one = op.Constant(value_int=1)
        old_k = read_keys(keys, table, op.Gather(scales, one))  # [B, K, E, D]
        old_v = read_values(values, table, op.Gather(scales, op.Constant(value_int=3)))
        query = Grouped(q, table)  # [B, K, G, T, D]
        seen = SeenByChunk(q, bias, starts, first, expiry, live, window)  # [B, K, T, E + T]
        ok = op.Unsqueeze(seen, group)
        all_k = op.Concat(old_k, op.Cast(k, to=FLOAT), axis=2)
        all_v = op.Concat(old_v, op.Cast(v, to=FLOAT), axis=2)
        scores = Masked(Scores(query, op.Unsqueeze(all_k, group), scale, softcap), ok, -3.0e38)
        weights = op.Exp(scores - op.ReduceMax(scores, last)) * op.Cast(ok, to=FLOAT)
        out = op.MatMul(weights, op.Unsqueeze(all_v, group)) / op.ReduceSum(weights, last)
        shape = op.Concat(op.Shape(q, start=0, end=3), last, axis=0)
        same_keys, same_values = op.Identity(keys), op.Identity(values)
        return op.CastLike(op.Reshape(out, shape), q), same_keys, same_values

    return DmsPrefillAttention


def _prefill_write(key_number: str, value_number: str) -> OnnxFunction:
    encode_keys, encode_values = ENCODE[key_number], ENCODE[value_number]

    @script(OWN, default_opset=op)
    def DmsPrefillWrite(k, v, slots, scales, table, keys, values):
        """Rows of a chunk go to their slots; those of slot -1 are lost."""
        key_codes = encode_keys(k, op.Gather(scales, op.Constant(value_int=0)))
        value_codes = encode_values(v, op.Gather(scales, op.Constant(value_int=2)))
        new_keys = PlaceRows(keys, key_codes, slots, table)
        new_values = PlaceRows(values, value_codes, slots, table)
        return new_keys, new_values

    return DmsPrefillWrite


def functions(
    key_number: str, value_number: str, attending: list[OnnxFunction] | None = None
) -> list[FunctionProto]:
    """The bodies of all ops, and what they call.

    Args:
        key_number: number format of keys.
        value_number: of values.
        attending: in place of the bodies that attend, with what these call; see `native`.
    """
    formats = (key_number, value_number)
    if attending is None:
        attending = [_decode_partial(*formats), DmsDecodeCombine, _prefill_attention(*formats)]
    ours = [_cache_update(*formats), _prefill_write(*formats), *attending]
    called = [
        AllSlots, PlaceRows, Masked, Choose, Scores, Grouped, SeenByChunk,
        *{x.name: x for x in (READ[key_number], READ[value_number])}.values(),
        *{x.name: x for x in (ENCODE[key_number], ENCODE[value_number])}.values(),
    ]  # fmt: skip
    found = [x.to_function_proto() for x in called + ours]
    for proto in found:
        # A node carries all attributes of its table's row, also those that a body does not look at.
        operator = OPERATORS.get(proto.name)
        missing = (
            [] if operator is None else [x for x in operator.attributes if x not in proto.attribute]
        )
        proto.attribute.extend(missing)
    return found
