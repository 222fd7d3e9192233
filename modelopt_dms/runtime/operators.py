# SPDX-License-Identifier: Apache-2.0
"""The ops of an exported graph, in one table: ONNX nodes, reference bodies, TensorRT plugins and kernels all follow it.

Shapes: B sequences, K KV heads, H query heads, T tokens of a chunk, D and DV dims of a key and a value row, KC and VC
elements of their codes, N pages of S slots, P pages a list can own, E = P * S slots, R = window + 1.
"""

from dataclasses import dataclass
from typing import Literal

DOMAIN = "modelopt_dms"
VERSION = 1

# "model" is the dtype of queries; "keys" and "values" are it, or int8 where codes of a byte are stored.
Kind = Literal["model", "keys", "values", "float32", "int32", "bool"]


@dataclass(frozen=True)
class Argument:
    """A tensor that an op reads or writes.

    Attributes:
        name: as in the kernel's parameters, the body and the plugin.
        kind: of its elements.
        shape: names of its dims, or of attributes, or numbers.
        aliases: the input that this output is, changed in place; None if it is a tensor of its own.
        unchanged: the op only reads what it passes on.
    """

    name: str
    kind: Kind
    shape: tuple[str, ...]
    aliases: str | None = None
    unchanged: bool = False


@dataclass(frozen=True)
class Operator:
    """An op: tensors in, attributes, tensors out; in a plugin's order.

    Attributes:
        name: of the ONNX node and of the plugin.
        inputs: tensors that it reads.
        outputs: tensors that it writes.
        attributes: by name, with the type of their values.
    """

    name: str
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    attributes: dict[str, type]


def _arguments(text: str) -> tuple[Argument, ...]:
    """From lines of `name: kind dims`; `& input` where an output is that input, changed, `= input` if unchanged."""
    found = []
    for line in text.strip().splitlines():
        name, _, rest = line.strip().partition(":")
        mark = "=" if "=" in rest else "&"
        described, _, aliases = rest.partition(mark)
        kind, *shape = described.split()
        found.append(Argument(name, kind, tuple(shape), aliases.strip() or None, mark == "="))  # type: ignore[arg-type]
    return tuple(found)


_FORMATS: dict[str, type] = {"key_number": str, "value_number": str}

CACHE_UPDATE = Operator(
    "DmsCacheUpdate",
    _arguments("""
        k: model B K D
        v: model B K DV
        evict: bool B K
        active: bool B
        scales: float32 4 K
        table: int32 B K P
        keys: keys N S KC
        values: values N S VC
        live: int32 B K
        seen: int32 B K
        ring_slot: int32 B K R
        ring_evict: bool B K R
    """),
    _arguments("""
        new_keys: keys N S KC & keys
        new_values: values N S VC & values
        new_live: int32 B K & live
        new_seen: int32 B K & seen
        new_ring_slot: int32 B K R & ring_slot
        new_ring_evict: bool B K R & ring_evict
    """),
    {"window": int, "shift": int, **_FORMATS},
)

DECODE_PARTIAL = Operator(
    "DmsDecodePartial",
    _arguments("""
        q: model B H D
        keys: keys N S KC
        values: values N S VC
        scales: float32 4 K
        table: int32 B K P
        live: int32 B K
    """),
    _arguments("""
        whole: model B H value_dim
        partial: float32 programs 2 rows value_dim
        partial_lse: float32 programs 2 rows
        spans: int32 B K 2
    """),
    {
        "scale": float,
        "softcap": float,
        "programs": int,
        "rows": int,
        "value_dim": int,
        **_FORMATS,
    },
)

DECODE_COMBINE = Operator(
    "DmsDecodeCombine",
    _arguments("""
        whole: model B H DV
        partial: float32 programs 2 rows DV
        partial_lse: float32 programs 2 rows
        spans: int32 B K 2
        live: int32 B K
    """),
    _arguments("out: model B H DV"),
    {},
)

PREFILL_ATTENTION = Operator(
    "DmsPrefillAttention",
    _arguments("""
        q: model B H T D
        k: model B K T D
        v: model B K T DV
        bias: float32 B K TP
        starts: int32 B T
        first: int32 B
        expiry: int32 B K E
        keys: keys N S KC
        values: values N S VC
        scales: float32 4 K
        table: int32 B K P
        live: int32 B K
    """),
    # The pages pass through, so that they are written only after they were read.
    _arguments("""
        out: model B H T DV
        same_keys: keys N S KC = keys
        same_values: values N S VC = values
    """),
    {"scale": float, "softcap": float, "window": int, **_FORMATS},
)

PREFILL_WRITE = Operator(
    "DmsPrefillWrite",
    _arguments("""
        k: model B K T D
        v: model B K T DV
        slots: int32 B K T
        scales: float32 4 K
        table: int32 B K P
        keys: keys N S KC
        values: values N S VC
    """),
    _arguments("""
        new_keys: keys N S KC & keys
        new_values: values N S VC & values
    """),
    dict(_FORMATS),
)

OPERATORS = {
    x.name: x
    for x in (CACHE_UPDATE, DECODE_PARTIAL, DECODE_COMBINE, PREFILL_ATTENTION, PREFILL_WRITE)
}
