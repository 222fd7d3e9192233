# SPDX-License-Identifier: Apache-2.0
"""The two graphs of a model, traced by torch.onnx, with the bodies of our ops; and their ports. Writes no file."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass
from torch import Tensor
from torch.export import Dim
from transformers import PreTrainedModel

from modelopt_dms.exporters import ExportError
from modelopt_dms.exporters.onnx import native
from modelopt_dms.exporters.onnx.bodies import OPSET, functions
from modelopt_dms.exporters.onnx.describe import scales_of
from modelopt_dms.exporters.onnx.quantizers import as_nodes
from modelopt_dms.exporters.onnx.slots import CHANGED, STATE, SlotFormat
from modelopt_dms.exporters.onnx.tracing import Decode, Prefill, traceable
from modelopt_dms.kernels.layout import PAGE
from modelopt_dms.kernels.reference import Scoring
from modelopt_dms.runtime.manifest import Model, Port
from modelopt_dms.runtime.operators import DECODE_PARTIAL, DOMAIN, VERSION
from modelopt_dms.runtime.state import POOLS, dtype_of, shape_of

# Sizes to trace with: no two alike, and none 1, so that torch keeps them apart.
_BATCH, _PAGES = 3, 5


@dataclass(frozen=True)
class Sizes:
    """What is fixed in graphs.

    Attributes:
        chunk: T, tokens of a prefill chunk.
        pages_per_list: P.
        programs: that share a decode step's tiles.
    """

    chunk: int
    pages_per_list: int
    programs: int


@dataclass(frozen=True)
class Graph:
    """A traced graph and what goes in and out."""

    model: ir.Model
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def trace(
    model: PreTrainedModel, description: Model, sizes: Sizes, phase: str, plugin_free: bool = False
) -> Graph:
    """One graph of a model.

    Args:
        model: in eval mode.
        description: of it, see `describe.model_of`.
        sizes: what is fixed.
        phase: "decode" or "prefill".
        plugin_free: standard ops only, with ONNX's own Attention; else ours, with bodies.
    """
    inputs, outputs = ports(description, sizes, phase)
    slots = SlotFormat(
        description.window,
        description.shift,
        description.key_number,
        description.value_number,
        sizes.programs,
        description.heads // description.kv_heads,
    )
    step = (Decode if phase == "decode" else Prefill)(model, slots, scales_of(model)).eval()
    tensors = [_example(port, model.device) for port in inputs]
    dims = [{0: Dim.DYNAMIC} for _ in inputs]
    with traceable(model), as_nodes(model, model.dtype), _quiet():
        program = torch.export.export(
            step,
            tuple(tensors),
            dynamic_shapes=(*dims[:3], tuple(dims[3:])),
            strict=False,
        )
        found = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=[x.name for x in inputs],
            output_names=[x.name for x in outputs],
            verbose=False,
        )
    assert found is not None
    graph: Any = found.model
    _add_bodies(graph, description, plugin_free)
    graph.producer_name, graph.producer_version = "modelopt_dms", None
    _name_dims(graph, inputs, outputs)
    _replace_bool_where(graph)
    if plugin_free:
        InlinePass()(graph)
        graph.functions.clear()
        RemoveUnusedNodesPass()(graph)
        graph.opset_imports.pop(DOMAIN)
    return Graph(graph, inputs, outputs)


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, torch's converters do not warn of each other, nor of packages that nobody needs."""
    log = logging.getLogger("torch.onnx._internal.exporter")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def ports(
    description: Model, sizes: Sizes, phase: str
) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """What goes into a graph and comes out, in its order."""
    K, P = description.kv_heads, sizes.pages_per_list
    rows = {
        "keys": (description.key_number, description.key_dim),
        "values": (description.value_number, description.value_dim),
    }
    T = 1 if phase == "decode" else sizes.chunk
    inputs = [Port("input_ids", "int64", ("batch", T)), Port("positions", "int64", ("batch", T))]
    if phase == "decode":
        inputs.append(Port("active", "bool", ("batch",)))
    else:
        inputs.append(Port("padding", "int32", ("batch",)))
    outputs = [Port("logits", "float32", ("batch", description.vocabulary))]
    shapes: dict[str, tuple[str, tuple[int | str, ...]]] = {
        "table": ("int32", ("batch", K, P)),
        "live": ("int32", ("batch", K)),
        "seen": ("int32", ("batch", K)),
        "ring_slot": ("int32", ("batch", K, description.window + 1)),
        "ring_evict": ("bool", ("batch", K, description.window + 1)),
    }
    for name, (number, dim) in rows.items():
        shapes[name] = (description.dtype if number == "plain" else "int8", ("pages", PAGE, dim))
    for layer in range(description.layers):
        inputs += [Port(f"{name}.{layer}", *shapes[name]) for name in STATE]
        for name in CHANGED:
            state = f"{name}.{layer}"
            in_place = phase == "decode" or name in POOLS
            outputs.append(
                Port(
                    f"new_{state}", *shapes[name], aliases=state if in_place else None, state=state
                )
            )
    return tuple(inputs), tuple(outputs)


def _example(port: Port, device: torch.device) -> Tensor:
    return torch.zeros(shape_of(port, _BATCH, _PAGES), dtype=dtype_of(port), device=device)


def _add_bodies(graph: ir.Model, description: Model, plugin_free: bool) -> None:
    """Put what our ops mean into a graph."""
    formats = (description.key_number, description.value_number)
    attending = native.attending(*formats) if plugin_free else None
    for proto in functions(*formats, attending):
        function = ir.from_proto(proto)
        graph.functions[function.identifier()] = function
    graph.opset_imports[DOMAIN] = VERSION
    if plugin_free:
        # What else there is means the same in both versions.
        for owner in (graph, *graph.functions.values()):
            owner.opset_imports[""] = native.OPSET


def _name_dims(graph: ir.Model, inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> None:
    """Call the dynamic dims what the ports call them; torch has names of its own, one for every tensor."""
    for values, named in ((graph.graph.inputs, inputs), (graph.graph.outputs, outputs)):
        for value, port in zip(values, named, strict=True):
            assert value.name == port.name, f"{value.name} stands where {port.name} should"
            value.shape = ir.Shape(port.shape)


def _replace_bool_where(graph: ir.Model) -> None:
    """Where of bools becomes And, Or and Not: onnxruntime has no such kernel."""
    for node in [x for x in graph.graph if x.op_type == "Where"]:
        which, this, that = node.inputs
        if node.outputs[0].dtype != ir.DataType.BOOL:
            continue
        taken, other = ir.node("And", [which, this]), ir.node("Not", [which])
        left = ir.node("And", [other.outputs[0], that])
        both = ir.node("Or", [taken.outputs[0], left.outputs[0]])
        new = [taken, other, left, both]
        for made in new:
            made.outputs[0].dtype = ir.DataType.BOOL
        ir.convenience.replace_nodes_and_values(
            graph.graph, node, [node], new, node.outputs, both.outputs
        )


def scoring_of(graph: ir.Model) -> Scoring:
    """How all attention of a traced decode step is scored.

    Raises:
        ExportError: not all layers alike.
    """
    found = {
        (node.attributes["scale"].as_float(), node.attributes["softcap"].as_float())
        for node in graph.graph
        if node.op_type == DECODE_PARTIAL.name
    }
    if len(found) != 1:
        raise ExportError(
            f"layers score attention differently ((scale, softcap): {sorted(found)}); kernels of engines are for one"
        )
    scale, softcap = found.pop()
    return Scoring(scale, softcap or None)
