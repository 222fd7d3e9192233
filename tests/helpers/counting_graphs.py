# SPDX-License-Identifier: Apache-2.0
"""Real ONNX graphs of a manifest that count: the next token is the last one plus one, and `seen` counts tokens.

Knows nothing of attention. What onnxruntime is fed and what becomes of its outputs can be seen in them.
"""

from pathlib import Path

import onnx
from onnx import TensorProto, helper

from modelopt_dms.runtime.manifest import Manifest, Phase, Port


def write_graphs(manifest: Manifest, place: Path) -> None:
    """The graphs and the manifest."""
    for name, phase in manifest.phases.items():
        onnx.save(_graph(manifest, name, phase), str(place / phase.graph))
    manifest.save(place)


def _value(port: Port) -> onnx.ValueInfoProto:
    element = getattr(TensorProto, {"float32": "FLOAT"}.get(port.dtype, port.dtype.upper()))
    return helper.make_tensor_value_info(port.name, element, port.shape)


def _graph(manifest: Manifest, name: str, phase: Phase) -> onnx.ModelProto:
    V, T = manifest.model.vocabulary, manifest.chunk
    constants = {
        "zero": helper.make_tensor("zero", TensorProto.INT64, [1], [0]),
        "one": helper.make_tensor("one", TensorProto.INT64, [], [1]),
        "last": helper.make_tensor("last", TensorProto.INT64, [], [-1]),
        "axis": helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
        "depth": helper.make_tensor("depth", TensorProto.INT64, [1], [V]),
        "chunk": helper.make_tensor("chunk", TensorProto.INT32, [], [T]),
        "values": helper.make_tensor("values", TensorProto.FLOAT, [2], [0.0, 1.0]),
    }
    node = helper.make_node
    nodes = [
        node("Gather", ["input_ids", "last"], ["id"], axis=1),
        node("Add", ["id", "one"], ["more"]),
        node("Mod", ["more", "depth"], ["next"]),
        node("OneHot", ["next", "depth", "values"], ["logits"], axis=-1),
    ]
    if name == "decode":
        nodes += [node("Cast", ["active"], ["count"], to=TensorProto.INT32)]
    else:
        nodes += [node("Sub", ["chunk", "padding"], ["count"])]
    nodes.append(node("Unsqueeze", ["count", "axis"], ["counted"]))
    for port in phase.outputs:
        if port.state is not None and port.state.startswith("seen."):
            nodes.append(node("Add", [port.state, "counted"], [port.name]))
        elif port.state is not None:
            nodes.append(node("Identity", [port.state], [port.name]))
    graph = helper.make_graph(
        nodes,
        name,
        [_value(x) for x in phase.inputs],
        [_value(x) for x in phase.outputs],
        list(constants.values()),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
