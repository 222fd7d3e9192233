# SPDX-License-Identifier: Apache-2.0
"""One of our ops as a graph of one node with its body, run by onnxruntime; and lists for it to work on."""

from functools import cache
from typing import Any

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper
from torch import Tensor

from modelopt_dms.exporters.onnx.bodies import OPSET, functions
from modelopt_dms.kernels.layout import PagePool, PageTables, RowLayout
from modelopt_dms.kernels.number_formats import RowFormat
from modelopt_dms.runtime.operators import DOMAIN, OPERATORS, VERSION

Formats = tuple[RowFormat | None, RowFormat | None]


def numbers(formats: Formats) -> dict[str, str]:
    names = ["plain" if x is None else x.name for x in formats]
    return {"key_number": names[0], "value_number": names[1]}


def run(name: str, inputs: dict[str, Tensor], **attributes: Any) -> dict[str, Tensor]:
    """Outputs of an op by name."""
    session = _session(name, tuple(sorted(attributes.items())))
    feeds = {x.name: inputs[x.name].contiguous().numpy() for x in OPERATORS[name].inputs}
    found = session.run(None, feeds)
    return {
        x.name: torch.from_numpy(y) for x, y in zip(OPERATORS[name].outputs, found, strict=True)
    }


@cache
def _session(name: str, attributes: tuple[tuple[str, Any], ...]) -> onnxruntime.InferenceSession:
    operator, given = OPERATORS[name], dict(attributes)
    assert given.keys() == operator.attributes.keys()
    formats = (given.get("key_number", "plain"), given.get("value_number", "plain"))
    kinds = {"model": TensorProto.FLOAT, "float32": TensorProto.FLOAT, "int32": TensorProto.INT32}
    kinds |= {"bool": TensorProto.BOOL}
    for kind, number in zip(("keys", "values"), formats, strict=True):
        kinds[kind] = TensorProto.FLOAT if number == "plain" else TensorProto.INT8
    # A dim is a name only where no attribute and no other op gives it another meaning.
    values = [
        [helper.make_tensor_value_info(x.name, kinds[x.kind], [None] * len(x.shape)) for x in side]
        for side in (operator.inputs, operator.outputs)
    ]
    names = [[x.name for x in side] for side in (operator.inputs, operator.outputs)]
    node = helper.make_node(name, *names, domain=DOMAIN, **given)
    graph = helper.make_graph([node], name, *values)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(
        graph, functions=functions(*formats), opset_imports=opsets, ir_version=10
    )
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString())


class Layer:
    """Lists that own all the pages that they can, in a shuffled order."""

    def __init__(
        self,
        batch: int,
        heads: int,
        pages: int,
        dim: int,
        window: int,
        shift: int = 0,
        formats: Formats = (None, None),
    ) -> None:
        layouts = [RowLayout.of(x, dim, torch.float32) for x in formats]
        count = batch * heads * pages
        self.pool = PagePool.make(count, *layouts, torch.device("cpu"))
        active = torch.ones(batch, dtype=torch.bool)
        self.lists = PageTables.make(batch, heads, pages, window, shift, active, formats)
        self.lists.table.copy_(torch.randperm(count).int().view(batch, heads, pages) + 1)
        self.formats = formats

    def tensors(self) -> dict[str, Tensor]:
        """As an op takes them; bytes are signed."""
        lists, pool = self.lists, self.pool
        stored = {"keys": pool.keys, "values": pool.values}
        stored = {x: y.view(torch.int8) if y.dtype == torch.uint8 else y for x, y in stored.items()}
        held = ("table", "live", "seen", "ring_slot", "ring_evict", "active", "scales")
        return stored | {name: getattr(lists, name) for name in held}
