# SPDX-License-Identifier: Apache-2.0
"""Kernels of engines, launched in TensorRT's argument order, are the references: as PTX on a GPU, interpreted on a CPU.

Needs neither TensorRT nor transformers.
"""

import ctypes
import re
from pathlib import Path

import engine_cases as cases
import engine_ops as ops
import pytest
import torch
from torch import Tensor

from benchmarks import engine_driver as driver
from modelopt_dms.exporters import ExportError
from modelopt_dms.exporters.tensorrt import kernels, ptx
from modelopt_dms.exporters.tensorrt.expressions import dims_of, evaluate
from modelopt_dms.kernels.layout import LayerShape, RowLayout
from modelopt_dms.kernels.reference import Scoring
from modelopt_dms.runtime.manifest import Kernel, Manifest
from modelopt_dms.runtime.operators import OPERATORS

CPU, TOKENS, PROGRAMS = torch.device("cpu"), 40, 5
VIEWS = {"*i32": torch.int32, "*u8": torch.uint8}


def small(number: str, shift: int = 0, group: int = 3) -> LayerShape:
    layout = RowLayout(number, 16, torch.float32 if number == "plain" else torch.uint8)  # type: ignore[arg-type]
    return LayerShape(layout, layout, 2, group, torch.float32, 20, shift)


def interpreted(shape: LayerShape) -> ops.Run:
    """Kernels as engines compile and launch them, in Triton's interpreter."""
    made = kernels.launches(shape, Scoring(shape.keys.dim**-0.5), TOKENS, 8)

    def run(name: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        launch, operator = made[name], OPERATORS[name]
        dims = dims_of(operator.inputs, [inputs[x.name].shape for x in operator.inputs])
        dims["programs"] = PROGRAMS
        given = {}
        for parameter, kind in launch.variant.signature.items():
            if kind.startswith("*"):
                name = launch.tensor(parameter)
                x = inputs[name] if name in inputs else outputs[name]
                given[parameter] = x.view(VIEWS.get(kind, x.dtype))
            else:
                given[parameter] = evaluate(launch.integers[parameter], dims)
        grid = tuple(evaluate(x, dims) for x in launch.grid)
        launch.variant.kernel[grid](**given, **launch.variant.constexprs)

    return run


@pytest.mark.parametrize(("number", "shift"), [("plain", 1), ("fp8", 0), ("int8", 1)])
def test_interpreted_updates_are_the_references(number: str, shift: int) -> None:
    shape = small(number, shift)
    ops.check_update(interpreted(shape), shape, CPU, steps=12)


@pytest.mark.parametrize("number", ["plain", "fp8", "int8"])
def test_interpreted_decoding_is_the_references(number: str) -> None:
    shape = small(number)
    ops.check_decode(interpreted(shape), shape, CPU, PROGRAMS, 2e-5)


@pytest.mark.parametrize("number", ["plain", "fp8"])
def test_interpreted_chunks_are_the_references(number: str) -> None:
    shape = small(number, group=1)
    ops.check_attention(interpreted(shape), shape, CPU, TOKENS, 2e-5)


@pytest.mark.parametrize("number", ["plain", "int8"])
def test_interpreted_writes_are_the_references(number: str) -> None:
    shape = small(number)
    ops.check_write(interpreted(shape), shape, CPU, 100)


# What a launch is given


def update_kernel() -> Kernel:
    return Kernel(
        "DmsCacheUpdate",
        "x.ptx",
        "x",
        "",
        "sm_90a",
        32,
        0,
        ("B * K", "1", "ceil(P / 2)"),
        ("P", "7"),
    )


def test_arguments_are_inputs_then_numbers_then_outputs() -> None:
    shape = small("fp8")
    layer = ops.Layer(shape, [[3, 4], [5, 6], [0, 0]], CPU)
    k, v = torch.randn(3, 2, 16), torch.randn(3, 2, 16)
    flags = {
        "evict": torch.zeros(3, 2, dtype=torch.bool),
        "active": torch.ones(3, dtype=torch.bool),
    }
    given = {"k": k, "v": v, **flags, **layer.tensors()}
    found = driver.arguments(update_kernel(), given, {})
    assert found.grid == (6, 1, 2)
    operator = OPERATORS["DmsCacheUpdate"]
    expected = [given[x.name].data_ptr() for x in operator.inputs]
    expected += [3, 7] + [given[x.aliases].data_ptr() for x in operator.outputs if x.aliases]
    assert [x.value for x in found.values] == expected
    assert [type(x) for x in found.values[12:14]] == [ctypes.c_int32] * 2
    # What the driver reads through the addresses is what stands there.
    packed = found.packed()
    assert ctypes.c_int32.from_address(packed[12]).value == 3
    assert ctypes.c_void_p.from_address(packed[0]).value == k.data_ptr()


def test_tensors_that_do_not_fit_are_refused() -> None:
    layer = ops.Layer(small("plain"), [[3, 4]], CPU)
    given = {"k": torch.randn(1, 2, 16), "v": torch.randn(1, 2, 16), **layer.tensors()}
    with pytest.raises(ExportError, match="DmsCacheUpdate lacks evict, active"):
        driver.arguments(update_kernel(), given, {})
    flags = {
        "evict": torch.zeros(1, 2, dtype=torch.bool),
        "active": torch.ones(1, dtype=torch.bool),
    }
    with pytest.raises(ExportError, match="k has 2 dims; expected B K D"):
        driver.arguments(update_kernel(), {**given, **flags, "k": torch.randn(1, 16)}, {})
    swapped = torch.randn(1, 16, 2).transpose(1, 2)
    with pytest.raises(ExportError, match="k is not contiguous"):
        driver.arguments(update_kernel(), {**given, **flags, "k": swapped}, {})


# On a GPU: the PTX itself


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return cases.compile_elsewhere(tmp_path_factory.mktemp("engines"), *cases.MODELS)


def launched(directory: Path) -> ops.Run:
    """The files of an exported directory, through the driver."""
    loaded = {
        x.operator: driver.Loaded(x, ptx.read(OPERATORS[x.operator], x, directory))
        for x in Manifest.load(directory).kernels
    }
    return lambda name, inputs, outputs: loaded[name].launch(inputs, outputs)


@pytest.mark.gpu
@pytest.mark.parametrize("name", cases.MODELS)
def test_launched_ptx_is_the_references(name: str, exported: dict[str, Path]) -> None:
    run, device = launched(exported[name]), torch.device("cuda")
    shape = kernels.layer_shape(cases.MODELS[name])
    torch.backends.cuda.matmul.allow_tf32 = False
    ops.check_update(run, shape, device)
    ops.check_write(run, shape, device, 100)
    ops.check_decode(run, shape, device, cases.PROGRAMS, 2e-2)
    ops.check_attention(run, shape, device, cases.CHUNK, 3e-2)
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_a_module_that_cuda_refuses_is_an_error(exported: dict[str, Path]) -> None:
    kernel = Manifest.load(exported["bf16"]).kernels[0]
    with pytest.raises(ExportError, match=re.escape("cuModuleLoadData")):
        _ = driver.Loaded(kernel, ".version 8.7\nnonsense").function
