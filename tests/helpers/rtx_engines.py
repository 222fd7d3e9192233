# SPDX-License-Identifier: Apache-2.0
"""Parses an exported directory with TensorRT-RTX and builds its engines for GPUs that are not here; prints JSON.

Run by test_tensorrt_rtx.py in an interpreter with tensorrt-rtx and without torch, in a process that registers no plugin
of ours: `python tests/helpers/rtx_engines.py DIRECTORY OUTPUT NAME ...`; names are compute capabilities (SM89).
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt

from modelopt_dms.runtime.checks import check_ports
from modelopt_dms.runtime.manifest import Manifest, Phase

BATCH, PAGES = 2, 40
TYPES = {
    trt.DataType.FLOAT: "float32",
    trt.DataType.HALF: "float16",
    trt.DataType.INT32: "int32",
    trt.DataType.INT64: "int64",
    trt.DataType.BOOL: "bool",
}


class Reader:
    """TensorRT-RTX's parser and builder, for one graph each time.

    Attributes:
        manifest: of the directory.
    """

    def __init__(self, directory: Path) -> None:
        self.manifest = Manifest.load(directory)
        self._directory = directory
        self._log = trt.Logger(trt.Logger.ERROR)
        self._quiet = trt.Logger(trt.Logger.INTERNAL_ERROR)
        self._builder = trt.Builder(self._log)

    def parse(self, graph: bytes, path: Path, wrong: bool = False) -> tuple[Any, list[str]]:
        """The network and what the parser finds wrong."""
        strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        network = self._builder.create_network(strong)
        parser = trt.OnnxParser(network, self._quiet if wrong else self._log)
        done = parser.parse(graph, str(path))
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        assert done == (not errors)
        return network, errors

    def build(self, phase: Phase, name: str) -> tuple[bytes, int]:
        """An engine for a compute capability, and how many layers of attention it has."""
        path = self._directory / phase.graph
        network, errors = self.parse(path.read_bytes(), path)
        assert not errors, errors
        compare(network, phase)
        attention = let_decompose(network)
        config = self._builder.create_builder_config()
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, name), 0)
        profile = self._builder.create_optimization_profile()
        sizes = {"batch": BATCH, "pages": PAGES}
        for port in phase.inputs:
            shape = tuple(sizes[x] if isinstance(x, str) else x for x in port.shape)
            profile.set_shape(port.name, shape, shape, shape)
        config.add_optimization_profile(profile)
        plan = self._builder.build_serialized_network(network, config)
        assert plan is not None, f"no engine of {phase.graph} for {name}"
        return bytes(plan), attention


def compare(network: Any, phase: Phase) -> None:
    """That a network takes and gives what the manifest says."""
    for side, ports, count, get in (
        ("inputs", phase.inputs, network.num_inputs, network.get_input),
        ("outputs", phase.outputs, network.num_outputs, network.get_output),
    ):
        tensors = [get(i) for i in range(count)]
        found = {x.name: (TYPES[x.dtype], tuple(x.shape)) for x in tensors}
        check_ports(f"{phase.graph}, {side}", ports, found)
        for port in phase.inputs if side == "inputs" else ():
            open_dims = tuple(-1 if isinstance(x, str) else x for x in port.shape)
            assert found[port.name][1] == open_dims, (port, found[port.name])


def let_decompose(network: Any) -> int:
    """As exporters/tensorrt/build.py does for graphs with attention of ONNX's own."""
    count = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.ATTENTION_OUTPUT:
            layer.__class__ = trt.IAttentionOutputLayer
            layer.attention.decomposable = True
            count += 1
    return count


def main(directory: Path, output: Path, names: list[str]) -> None:
    reader = Reader(directory)
    engines = []
    for key, phase in reader.manifest.phases.items():
        for name in names:
            began = time.perf_counter()
            plan, attention = reader.build(phase, name)
            path = output / f"{key}.{name.lower()}.engine"
            path.write_bytes(plan)
            engines.append(
                {
                    "phase": key,
                    "name": name,
                    "file": path.name,
                    "bytes": len(plan),
                    "attention": attention,
                    "seconds": round(time.perf_counter() - began, 1),
                }
            )
    phase = reader.manifest.phases["decode"]
    path = directory / phase.graph
    graph = path.read_bytes()
    elsewhere = output / phase.graph  # where no weights lie
    said = {
        "version": trt.__version__,
        "imported": [x for x in ("torch", "transformers", "triton") if x in sys.modules],
        "engines": engines,
        "truncated": reader.parse(graph[: len(graph) // 2], path, wrong=True)[1],
        "no weights": reader.parse(graph, elsewhere, wrong=True)[1],
    }
    print(json.dumps(said))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
