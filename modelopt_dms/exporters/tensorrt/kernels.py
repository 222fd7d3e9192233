# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of an engine's ops as PTX files for sm_90a, and how each is launched. Needs no GPU.

A kernel is compiled for a model: head dims, formats, window and scale are numbers in it. How many sequences there are,
and how long, it learns from dims at every launch.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modelopt_dms.exporters import ExportError
from modelopt_dms.exporters.tensorrt.ptx import POINTER, check_signature, rewrite
from modelopt_dms.kernels.layout import MOST_ROWS, LayerShape, RowLayout
from modelopt_dms.kernels.reference import Scoring
from modelopt_dms.kernels.variants import Variant, assemble, compile_variant
from modelopt_dms.runtime.manifest import Kernel, Model
from modelopt_dms.runtime.operators import OPERATORS

ARCHITECTURE = "sm_90a"
DIRECTORY = "kernels"
MULTIPROCESSORS = 132  # of H100 SXM and H200
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
NUMBERS = ("plain", "fp8", "int8")


@dataclass(frozen=True)
class Launch:
    """How an op's kernel is compiled and launched.

    Attributes:
        variant: what is compiled.
        grid: expressions of dims.
        integers: expression of every int32 parameter by its name in the kernel, in the kernel's order.
        names: the op's names of tensors that bear another one in the kernel.
    """

    variant: Variant
    grid: tuple[str, str, str]
    integers: dict[str, str]
    names: dict[str, str]

    def tensor(self, parameter: str) -> str:
        """The op's name of the tensor that a pointer of the kernel points to."""
        return self.names.get(parameter, parameter.removesuffix("_ptr"))


def layer_shape(model: Model) -> LayerShape:
    """What the kernels of a model's layers are compiled for.

    Raises:
        ExportError: a model that there are no kernels for.
    """
    if model.dtype not in DTYPES:
        raise ExportError(
            f"dtype={model.dtype!r}: kernels of engines are for {' or '.join(DTYPES)} (float32 products spill "
            "registers); load the model in one of these, or export with plugin_free"
        )
    for name in ("key_number", "value_number"):
        if getattr(model, name) not in NUMBERS:
            raise ExportError(
                f"{name}={getattr(model, name)!r}: kernels of engines read {', '.join(NUMBERS)}"
            )
    if model.heads % model.kv_heads or model.heads // model.kv_heads > MOST_ROWS:
        raise ExportError(
            f"{model.heads} heads on {model.kv_heads} KV heads; expected a multiple, at most {MOST_ROWS}"
        )
    dtype = DTYPES[model.dtype]
    keys = _layout(model.key_number, model.key_dim, dtype)
    values = _layout(model.value_number, model.value_dim, dtype)
    group = model.heads // model.kv_heads
    return LayerShape(keys, values, model.kv_heads, group, dtype, model.window, model.shift)


def _layout(number: Any, dim: int, dtype: torch.dtype) -> RowLayout:
    return RowLayout(number, dim, dtype if number == "plain" else torch.uint8)


def decode_programs(model: Model, multiprocessors: int = MULTIPROCESSORS) -> int:
    """Programs that share a decode step's tiles: what so many multiprocessors hold at a time."""
    _need_triton()
    from modelopt_dms.kernels import decode

    return decode.engine_programs(layer_shape(model), multiprocessors)


def compile_kernels(
    model: Model, scoring: Scoring, *, chunk: int, programs: int, batch: int = 64
) -> list[tuple[Kernel, str]]:
    """Manifest entry and PTX of every op's kernel.

    Args:
        model: what they are compiled for.
        scoring: scale and softcap, the same for all layers.
        chunk: tokens of a prefill chunk.
        programs: of a decode step.
        batch: sequences that one is mostly used for; more are no error.

    Raises:
        ExportError: there are no kernels for such a model, or no compiler.
    """
    if scoring.sinks is not None:
        raise ExportError("attention sinks: engines have no kernels for them yet")
    shape = layer_shape(model)
    _need_triton()
    values = {
        "window": model.window,
        "shift": model.shift,
        "scale": scoring.scale,
        "softcap": scoring.softcap or 0.0,
        "programs": programs,
        "rows": shape.group,
        "value_dim": model.value_dim,
        "key_number": model.key_number,
        "value_number": model.value_number,
    }
    made = launches(shape, scoring, chunk, batch * model.kv_heads)
    return [_compiled(name, launch, values) for name, launch in made.items()]


def write_kernels(directory: Path, compiled: Iterable[tuple[Kernel, str]]) -> tuple[Kernel, ...]:
    """Write what `compile_kernels` made below an exported directory; returns the manifest's entries."""
    (directory / DIRECTORY).mkdir(parents=True, exist_ok=True)
    kernels = []
    for kernel, ptx in compiled:
        (directory / kernel.file).write_text(ptx, encoding="utf-8", newline="\n")
        kernels.append(kernel)
    return tuple(kernels)


def _need_triton() -> None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise ExportError(
            "Triton compiles the kernels of engines and is not installed; `pip install triton`, or export with "
            "plugin_free"
        ) from error


def launches(shape: LayerShape, scoring: Scoring, chunk: int, items: int) -> dict[str, Launch]:
    """How every op's kernel is compiled and launched, for chunks of so many tokens and about so many lists."""
    from modelopt_dms.kernels import append, decode, prefill_chunk

    lists = "B * K"
    attention = prefill_chunk.engine_chunk(shape, scoring)
    pack = append.engine_pack(shape)
    return {
        "DmsCacheUpdate": Launch(
            append.engine_append(shape), (lists, "1", "1"), {"pages": "P"}, {}
        ),
        "DmsDecodePartial": Launch(
            decode.engine_decode(shape, scoring, items),
            ("programs", "1", "1"),
            {"items": lists, "pages": "P"},
            {"out": "whole"},
        ),
        "DmsDecodeCombine": Launch(decode.engine_combine(shape), (lists, "rows", "1"), {}, {}),
        "DmsPrefillAttention": Launch(
            attention,
            ("B * H", f"ceil(T / {attention.constexprs['M']})", "1"),
            {"T": "T", "window": str(min(shape.window, chunk)), "P": "P", "E": "E // 64"},
            {"head_scales": "scales"},
        ),
        "DmsPrefillWrite": Launch(
            pack,
            (lists, f"ceil(T / {pack.constexprs['ROWS']})", "1"),
            {"tokens": "T", "pages": "P"},
            {},
        ),
    }


def _compiled(name: str, launch: Launch, values: dict[str, Any]) -> tuple[Kernel, str]:
    operator, variant = OPERATORS[name], launch.variant
    made = compile_variant(variant)
    ptx = rewrite(made.ptx, operator, _parameters(name, launch), len(launch.integers))
    registers, spills = assemble(ptx, ARCHITECTURE)
    if spills:
        raise ExportError(
            f"{name}: the kernel for {values['key_number']} keys and {values['value_number']} values of "
            f"{values['value_dim']} dims does not fit: with {registers} registers a thread, {spills} bytes spill"
        )
    attributes = {x: values[x] for x in operator.attributes}
    # `programs` is an attribute and no dim of this op's inputs; it and others like it become numbers.
    grid = tuple(str(attributes.get(x, x)) for x in launch.grid)
    kernel = Kernel(
        operator=name,
        file=f"{DIRECTORY}/{name}.ptx",
        entry=name,
        sha256=hashlib.sha256(ptx.encode()).hexdigest(),
        arch=ARCHITECTURE,
        threads=32 * variant.num_warps,
        shared=made.shared,
        grid=(grid[0], grid[1], grid[2]),
        integers=tuple(launch.integers.values()),
        attributes=attributes,
    )
    check_signature(operator, kernel, ptx)
    return kernel, ptx


def _parameters(name: str, launch: Launch) -> list[tuple[str, str]]:
    """What the kernel's parameters are in `ptx.schema`, and their types, in the kernel's order."""
    operator, variant = OPERATORS[name], launch.variant
    inputs = {x.name for x in operator.inputs}
    changed = {x.aliases: x.name for x in operator.outputs if x.aliases and not x.unchanged}
    found = []
    for parameter in variant.kernel.arg_names:
        kind = variant.signature.get(parameter)
        if kind is None:
            continue
        if not kind.startswith("*"):
            found.append((f"int_{list(launch.integers).index(parameter)}", "u32"))
            continue
        tensor = launch.tensor(parameter)
        # What is changed in place is reached through the output's pointer; the input's stays unused.
        role = f"in_{tensor}" if tensor in inputs else f"out_{tensor}"
        found.append((f"out_{changed[tensor]}" if tensor in changed else role, POINTER))
    return found
