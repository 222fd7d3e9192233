# SPDX-License-Identifier: Apache-2.0
"""Drives our plugins through NVIDIA's own `tensorrt.plugin` code and prints what it makes of them, as JSON.

Run by test_tensorrt_plugins.py in an interpreter with tensorrt-cu13-bindings and tensorrt-lean-cu13-libs, which has
neither torch nor a GPU (`python tests/helpers/tensorrt_plugins.py DIRECTORY`). The lean library replaces the full one,
C stubs for what it lacks, and numbers for TensorRT's symbolic dims.
"""

import ctypes
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# What the bindings link to and the lean library lacks.
STUBS = (
    "createInferBuilder_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "initLibNvInferPlugins",
)
LIBRARIES = ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11")


def load_bindings() -> Any:
    """NVIDIA's bindings under the name `tensorrt`."""
    lean = importlib.import_module("tensorrt_lean_libs")
    library = next(Path(lean.__path__[0]).glob("libnvinfer_lean.so.*"))
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "stubs.c"
        source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in STUBS))
        for name in LIBRARIES:
            made = Path(directory) / name
            options = ["-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(made)]
            subprocess.run(["cc", str(source), *options], check=True)
            ctypes.CDLL(str(made), mode=ctypes.RTLD_GLOBAL)
        bindings = importlib.import_module("tensorrt_bindings")
    sys.modules["tensorrt"] = bindings
    # Classes of the plugin module derive from it.
    bindings.ISymExpr = Symbol
    sys.modules["tensorrt.plugin"] = importlib.import_module("tensorrt_bindings.plugin")
    return bindings


class Number:
    """A dim with a value, in the place of TensorRT's symbolic ones."""

    def __init__(self, value: int) -> None:
        self.value = value

    def is_constant(self) -> bool:
        return True

    def get_constant_value(self) -> int:
        return self.value

    def is_size_tensor(self) -> bool:
        return False


class Numbers:
    """What makes new dims of dims, in the place of TensorRT's expression builder."""

    def __init__(self, trt: Any) -> None:
        kinds = trt.DimensionOperation
        self.operations = {
            kinds.SUM: lambda a, b: a + b,
            kinds.SUB: lambda a, b: a - b,
            kinds.PROD: lambda a, b: a * b,
            kinds.FLOOR_DIV: lambda a, b: a // b,
            kinds.CEIL_DIV: lambda a, b: -(-a // b),
        }

    def constant(self, value: int) -> Number:
        return Number(value)

    def operation(self, kind: Any, first: Number, second: Number) -> Number:
        return Number(self.operations[kind](first.value, second.value))


class Symbol:
    """In the place of trt.ISymExpr, which takes no number."""

    def __init__(self) -> None:
        self.expr: Number


class Extra(dict):
    """Receives the int32 arguments."""

    nbSymExprs = 0  # noqa: N815


class Launch:
    """Receives the launch parameters."""


def described(trt: Any, kind: Any, shape: tuple[int, ...]) -> Any:
    """A tensor as TensorRT describes it when it asks for formats and launches."""
    found = trt.DynamicPluginTensorDesc()
    inner = trt.PluginTensorDesc()
    inner.type, inner.format, inner.dims = kind, trt.TensorFormat.LINEAR, trt.Dims(shape)
    found.desc, found.min, found.opt, found.max = inner, *(trt.Dims(shape),) * 3
    return found


def driven(
    trt: Any, name: str, shapes: list[tuple[int, ...]], kinds: list[Any], fields: dict[str, Any]
) -> dict:
    """What TensorRT learns about one node: output types and shapes, aliases, formats, tactics, launch and kernel."""
    import numpy

    given = []
    for key, value in fields.items():
        if isinstance(value, str):
            given.append(trt.PluginField(key, value.encode(), trt.PluginFieldType.CHAR))
        else:
            # As a parser of ONNX hands them over.
            array, kind = (
                (numpy.array([value], numpy.float32), trt.PluginFieldType.FLOAT32)
                if isinstance(value, float)
                else (numpy.array([value], numpy.int64), trt.PluginFieldType.INT64)
            )
            given.append(trt.PluginField(key, array, kind))
    creator = trt.get_plugin_registry().get_creator(name, "1", "modelopt_dms")
    request = trt.QuickPluginCreationRequest.STRICT_AOT
    collection = trt.PluginFieldCollection(given)
    plugin = creator.create_plugin(
        name, "modelopt_dms", collection, trt.TensorRTPhase.BUILD, request
    )
    builder = Numbers(trt)
    types = list(plugin.get_output_data_types(kinds, [len(x) for x in shapes]))
    symbols = [[Number(x) for x in shape] for shape in shapes]
    outputs = [
        tuple(x.value for x in shape) for shape in plugin.get_output_shapes(symbols, [], builder)
    ]
    every = [
        described(trt, kind, shape)
        for kind, shape in zip([*kinds, *types], [*shapes, *outputs], strict=True)
    ]
    formats = plugin.get_supported_format_combinations(every, len(shapes))
    plugin.configure_plugin(every[: len(shapes)], every[len(shapes) :])
    tactics = plugin.get_valid_tactics()
    plugin.set_tactic(0)
    launch, extra = Launch(), Extra()
    plugin.get_launch_params(symbols, every, len(shapes), launch, extra, builder)
    plain = [x.desc for x in every]
    entry, ptx = plugin.get_kernel(plain[: len(shapes)], plain[len(shapes) :])
    return {
        "types": [str(x).removeprefix("DataType.") for x in types],
        "shapes": outputs,
        "aliases": [plugin.get_aliased_input(index) for index in range(len(outputs))],
        "formats": [
            [str(x.type).removeprefix("DataType."), str(x.format).removeprefix("TensorFormat.")]
            for x in formats
        ],
        "tactics": list(tactics),
        "launch": {key: value.expr.value for key, value in vars(launch).items()},
        "integers": [extra[index].expr.value for index in range(extra.nbSymExprs)],
        "entry": entry,
        "ptx": ptx.decode(),
        "aot": isinstance(plugin, trt.IPluginV3QuickAOTBuild),
    }


def main(directory: Path) -> dict[str, Any]:
    trt = load_bindings()
    from modelopt_dms.exporters.tensorrt import plugins
    from modelopt_dms.runtime.manifest import Manifest
    from modelopt_dms.runtime.operators import OPERATORS

    plugins.register(Manifest.load(directory), directory)
    # A second directory in the same process: definitions stay, kernels change.
    plugins.register(Manifest.load(directory), directory)
    trt.IDimensionExpr, trt.DimsExprs = Number, lambda n: [None] * n
    cases = json.loads((directory / "cases.json").read_text())
    found: dict[str, Any] = {}
    for name, case in cases.items():
        kinds = [getattr(trt.DataType, x) for x in case["kinds"]]
        shapes = [tuple(x) for x in case["shapes"]]
        found[name] = driven(trt, name, shapes, kinds, case["attributes"])
    wrong = dict(cases["DmsCacheUpdate"]["attributes"], window=1)
    kinds = [getattr(trt.DataType, x) for x in cases["DmsCacheUpdate"]["kinds"]]
    try:
        driven(trt, "DmsCacheUpdate", cases["DmsCacheUpdate"]["shapes"], kinds, wrong)
    except Exception as error:
        found["wrong attribute"] = f"{type(error).__name__}: {error}"
    found["registered"] = sorted(set(OPERATORS) & set(vars(trt_ops())))
    found["imported"] = [x for x in ("torch", "triton") if x in sys.modules]
    return found


def trt_ops() -> Any:
    return sys.modules["tensorrt.plugin"].op.modelopt_dms


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))))
