# SPDX-License-Identifier: Apache-2.0
"""The variant of an exported graph that TensorRT parses: our ops are plugins, no longer functions with a body.

An exported graph runs as it is where functions are inlined; TensorRT's parser would
inline them too, and never ask for a plugin.
"""

from collections.abc import Iterable, Iterator

import onnx

from modelopt_dms.runtime.manifest import EngineError
from modelopt_dms.runtime.operators import DOMAIN, OPERATORS, VERSION


def plugin_variant(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without our functions; every node of our domain says which plugin it is, and that its kernel is embedded.

    Raises:
        EngineError: a node of our domain is none of our ops, or there is none.
    """
    variant = onnx.ModelProto()
    variant.CopyFrom(model)
    others = [x for x in variant.functions if x.domain != DOMAIN]
    del variant.functions[:]
    variant.functions.extend(others)
    nodes = [variant.graph.node, *(x.node for x in variant.functions)]
    ours = [x for group in nodes for x in _walk(group) if x.domain == DOMAIN]
    if not ours:
        raise EngineError(f"the graph holds no op of the domain {DOMAIN}; export again")
    for node in ours:
        if node.op_type not in OPERATORS:
            raise EngineError(
                f"{node.name or 'a node'} is a {DOMAIN}.{node.op_type}; expected one of {sorted(OPERATORS)}"
            )
        for name, value in (
            ("aot", 1),
            ("plugin_namespace", DOMAIN),
            ("plugin_version", str(VERSION)),
        ):
            _set(node, name, value)
    return variant


def _set(node: onnx.NodeProto, name: str, value: int | str) -> None:
    """Give a node an attribute, in place of one of that name."""
    others = [x for x in node.attribute if x.name != name]
    del node.attribute[:]
    node.attribute.extend([*others, onnx.helper.make_attribute(name, value)])


def _walk(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """All nodes, those of the branches of If and Loop too."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _walk(graph.node)
