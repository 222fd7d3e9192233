# SPDX-License-Identifier: Apache-2.0
"""Which weights differ between two exports of one graph, and whether nothing else does. Knows ONNX and no TensorRT."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from modelopt_dms.engine.errors import EngineError
from modelopt_dms.engine.manifest import ManifestError

BLOCK = 1 << 20


def changed_weights(old: Path, new: Path) -> set[str]:
    """Names of the initializers whose numbers differ; every other part of the graphs is the same.

    Args:
        old: graph, with its weights beside it.
        new: likewise.

    Raises:
        EngineError: the graphs are not the same ones; names the first difference.
        ManifestError: a file of weights is missing or too short.
    """
    models = [onnx.load(str(x), load_external_data=False) for x in (old, new)]
    # A weight that became a constant of a node is a part that must be the same: a refit would not reach it.
    for ours, theirs in zip(*(_parts(x) for x in models), strict=False):
        if ours != theirs:
            raise EngineError(
                f"the graphs {old.name} differ at {ours[0]}, not only in their weights; new weights go into engines of "
                "the same graph only: export with the same versions and options, or build engines of the new export"
            )
    sizes = [len(list(_parts(x))) for x in models]
    if sizes[0] != sizes[1]:
        raise EngineError(f"the graphs {old.name} differ: {sizes[0]} parts before, {sizes[1]} now")
    pairs = zip(*(x.graph.initializer for x in models), strict=True)
    return {x.name for x, y in pairs if _digest(x, old.parent, old) != _digest(y, new.parent, new)}


def _parts(model: onnx.ModelProto) -> Iterator[tuple[str, Any]]:
    """All that is fixed in an engine, as (what it is, its content)."""
    yield "its versions of operators", sorted((x.domain, x.version) for x in model.opset_import)
    for side, ports in (("input", model.graph.input), ("output", model.graph.output)):
        for port in ports:
            yield f"{side} {port.name}", port.type.SerializeToString(deterministic=True)
    for x in model.graph.initializer:
        yield f"weight {x.name}", (x.data_type, tuple(x.dims))
    for node in model.graph.node:
        yield _node(node)
    for function in model.functions:
        for node in function.node:
            yield _node(node)


def _node(node: onnx.NodeProto) -> tuple[str, Any]:
    # Without documentation and metadata: they name lines of source code.
    attributes = sorted(x.SerializeToString(deterministic=True) for x in node.attribute)
    said = f"node {node.name or '?'} ({node.op_type})"
    return said, (node.op_type, node.domain, tuple(node.input), tuple(node.output), attributes)


def _digest(tensor: onnx.TensorProto, directory: Path, graph: Path) -> bytes:
    """Of a weight's numbers, wherever they lie."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return hashlib.sha256(onnx.numpy_helper.to_array(tensor).tobytes()).digest()
    found = {x.key: x.value for x in tensor.external_data}
    path, left = directory / found["location"], int(found["length"])
    digest = hashlib.sha256()
    if not path.is_file():
        raise ManifestError(f"{path} is missing, the weights of {graph.name}; export again")
    with path.open("rb") as file:
        file.seek(int(found.get("offset", 0)))
        while left:
            block = file.read(min(BLOCK, left))
            if not block:
                raise ManifestError(
                    f"{path} is truncated: {left} bytes of {tensor.name} are missing; export again"
                )
            digest.update(block)
            left -= len(block)
    return digest.digest()
