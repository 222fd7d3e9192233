# SPDX-License-Identifier: Apache-2.0
"""Launches a kernel's PTX as TensorRT would, through CUDA's driver: what it computes shows without TensorRT.

Tests and benchmarks on a GPU use it. Needs PyTorch for the tensors and the CUDA context, and no Triton.
"""

import ctypes
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from modelopt_dms.exporters import ExportError
from modelopt_dms.exporters.tensorrt.expressions import dims_of, evaluate
from modelopt_dms.runtime.manifest import Kernel
from modelopt_dms.runtime.operators import OPERATORS

_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_DEFAULT_SHARED = 48 << 10


@dataclass(frozen=True)
class Arguments:
    """What one launch is given.

    Attributes:
        grid: programs.
        values: pointers and int32 numbers, in TensorRT's order.
    """

    grid: tuple[int, int, int]
    values: tuple[Any, ...]

    def packed(self) -> Any:
        """As cuLaunchKernel takes them: addresses of the values."""
        return (ctypes.c_void_p * len(self.values))(*(ctypes.addressof(x) for x in self.values))


def arguments(kernel: Kernel, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Arguments:
    """Grid and arguments of an op's kernel for these tensors.

    Args:
        kernel: of the op.
        inputs: tensors by the op's names.
        outputs: likewise; an output that an input is changed into is that input, and left out.

    Raises:
        ExportError: a tensor is missing, not contiguous, or of other dims than the op's.
    """
    operator = OPERATORS[kernel.operator]
    every = dict(inputs)
    for output in operator.outputs:
        if output.aliases is not None:
            every[output.name] = inputs[output.aliases]
        elif output.name in outputs:
            every[output.name] = outputs[output.name]
    ordered = [*operator.inputs, *operator.outputs]
    if missing := [x.name for x in ordered if x.name not in every]:
        raise ExportError(f"{operator.name} lacks {', '.join(missing)}")
    for x in ordered:
        if not every[x.name].is_contiguous():
            raise ExportError(f"{operator.name}: {x.name} is not contiguous")
    dims = dims_of(operator.inputs, [every[x.name].shape for x in operator.inputs])
    pointers = {x.name: ctypes.c_void_p(every[x.name].data_ptr()) for x in ordered}
    values = [pointers[x.name] for x in operator.inputs]
    numbers = [ctypes.c_int32(evaluate(x, dims)) for x in kernel.integers]
    width, height, depth = (int(evaluate(x, dims)) for x in kernel.grid)
    written = [pointers[x.name] for x in operator.outputs]
    return Arguments((width, height, depth), (*values, *numbers, *written))


@dataclass(frozen=True)
class Loaded:
    """A kernel that CUDA's driver has compiled.

    Attributes:
        kernel: its entry in the manifest.
        ptx: its text.
    """

    kernel: Kernel
    ptx: str

    @cached_property
    def function(self) -> ctypes.c_void_p:
        """What the driver made of it, ready to be launched.

        Raises:
            ExportError: the driver refused.
        """
        torch.zeros(1, device="cuda")  # PyTorch makes the context
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _call("cuModuleLoadData", ctypes.byref(module), self.ptx.encode())
        _call("cuModuleGetFunction", ctypes.byref(function), module, self.kernel.entry.encode())
        if self.kernel.shared > _DEFAULT_SHARED:
            _call("cuFuncSetAttribute", function, _DYNAMIC_SHARED, self.kernel.shared)
        return function

    def launch(self, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """Run it on PyTorch's current stream; see `arguments`."""
        given = arguments(self.kernel, inputs, outputs)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        block = (self.kernel.threads, 1, 1)
        packed = given.packed()
        _call(
            "cuLaunchKernel",
            *(self.function, *given.grid, *block, self.kernel.shared, stream, packed, None),
        )


def _call(name: str, *values: Any) -> None:
    driver = ctypes.CDLL("libcuda.so.1")
    code = getattr(driver, name)(*values)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        raise ExportError(f"{name}: {(text.value or b'').decode()} ({code})")
