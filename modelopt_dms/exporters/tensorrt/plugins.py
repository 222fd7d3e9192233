# SPDX-License-Identifier: Apache-2.0
"""The ops as quickly deployable TensorRT plugins, generated from their table.

An engine embeds the kernels, so that it needs neither Python nor a plugin library where it runs.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelopt_dms.exporters import ExportError
from modelopt_dms.exporters.tensorrt.expressions import dims_of, evaluate
from modelopt_dms.exporters.tensorrt.ptx import read
from modelopt_dms.runtime.checks import OLDEST, version_of
from modelopt_dms.runtime.manifest import Kernel, Manifest
from modelopt_dms.runtime.operators import DOMAIN, OPERATORS, Argument, Operator

INSTALL = "pip install 'modelopt-dms[tensorrt]'"
# TensorRT's names of types where formats are listed.
_TYPES = {
    "float16": "FP16",
    "bfloat16": "BF16",
    "float32": "FP32",
    "int32": "INT32",
    "bool": "BOOL",
}


@dataclass(frozen=True)
class _Embedded:
    """A kernel of the directory that is being built.

    Attributes:
        kernel: its entry in the manifest.
        ptx: its text.
        types: TensorRT's name of the type of every input and output, in order.
    """

    kernel: Kernel
    ptx: str
    types: tuple[str, ...]


# TensorRT's registry of plugins belongs to the process, and definitions in it stay: they look here for their kernels.
_EMBEDDED: dict[str, _Embedded] = {}


def register(manifest: Manifest, directory: str | Path) -> None:
    """Make TensorRT's parser know the ops, with the kernels of this directory until the next call.

    Args:
        manifest: names the kernels.
        directory: where they lie.

    Raises:
        ExportError: TensorRT is missing or too old, or a kernel does not fit its op.
        ManifestError: a kernel's file is missing or was changed.
    """
    trtp = _plugin_module()
    kernels = {x.operator: x for x in manifest.kernels}
    if missing := [x for x in OPERATORS if x not in kernels]:
        raise ExportError(
            f"{directory} holds no kernels of {', '.join(missing)}; export with `--format tensorrt`, "
            "without plugin_free"
        )
    found = {}
    for name, operator in OPERATORS.items():
        ptx = read(operator, kernels[name], Path(directory))
        found[name] = _Embedded(kernels[name], ptx, _types(operator, manifest))
    known = set(_EMBEDDED)
    _EMBEDDED.update(found)
    for name, operator in OPERATORS.items():
        if name not in known:
            _define(trtp, operator)


def _plugin_module() -> Any:
    """`tensorrt.plugin`, of a version that embeds kernels."""
    try:
        import tensorrt
    except ImportError as error:
        raise ExportError(
            f"TensorRT is not installed ({error}); on a machine with the GPU the engine is for: {INSTALL}"
        ) from error
    if version_of(tensorrt.__version__) < OLDEST:
        raise ExportError(
            f"TensorRT {tensorrt.__version__} cannot embed kernels; expected {'.'.join(map(str, OLDEST))} or later: "
            f"{INSTALL} --upgrade"
        )
    import tensorrt.plugin

    return tensorrt.plugin


def _types(operator: Operator, manifest: Manifest) -> tuple[str, ...]:
    model = manifest.model
    kinds = {"model": _TYPES[model.dtype]}
    for kind, number in (("keys", model.key_number), ("values", model.value_number)):
        kinds[kind] = kinds["model"] if number == "plain" else "INT8"
    arguments = (*operator.inputs, *operator.outputs)
    return tuple(kinds.get(x.kind) or _TYPES[x.kind] for x in arguments)


def _define(trtp: Any, operator: Operator) -> None:
    """Register one op: what comes out, which types it takes, and its kernel."""
    plugin = f"{DOMAIN}::{operator.name}"
    trtp.register(plugin)(_descriptor(trtp, operator))
    trtp.autotune(plugin)(_formats(trtp, operator))
    trtp.aot_impl(plugin)(_implementation(trtp, operator))


def _descriptor(trtp: Any, operator: Operator) -> Callable[..., Any]:
    def describe(*tensors: Any, **attributes: Any) -> Any:
        inputs = {x.name: tensor for x, tensor in zip(operator.inputs, tensors, strict=True)}
        shapes = [tensor.shape_expr for tensor in tensors]
        sizes = {**attributes, **dims_of(operator.inputs, shapes)}
        model = next(inputs[x.name].dtype for x in operator.inputs if x.kind == "model")

        def output(argument: Argument) -> Any:
            if argument.aliases is not None:
                return inputs[argument.aliases].aliased()
            shape = tuple(int(x) if x.isdigit() else sizes[x] for x in argument.shape)
            return trtp.from_shape_expr(shape, dtype=_data_type(argument.kind, model))

        found = tuple(output(x) for x in operator.outputs)
        return found if len(found) > 1 else found[0]

    number = len(operator.outputs)
    returned = tuple[(trtp.TensorDesc,) * number] if number > 1 else trtp.TensorDesc  # type: ignore[misc]
    return _signed(describe, _inputs(trtp, operator), operator.attributes, returns=returned)


def _formats(trtp: Any, operator: Operator) -> Callable[..., Any]:
    def formats(*_: Any) -> Any:
        return [trtp.AutoTuneCombination(", ".join(_EMBEDDED[operator.name].types), "LINEAR")]

    return _signed(
        formats,
        _inputs(trtp, operator),
        {"outputs": tuple[trtp.TensorDesc]},
        returns=list[trtp.AutoTuneCombination],
    )


def _implementation(trtp: Any, operator: Operator) -> Callable[..., Any]:
    def implement(*arguments: Any) -> Any:
        embedded = _EMBEDDED[operator.name]
        count = len(operator.inputs)
        given = dict(zip(operator.attributes, arguments[count:-2], strict=True))
        _check_attributes(embedded.kernel, given)
        dims = dims_of(operator.inputs, [x.shape_expr for x in arguments[:count]])

        def symbol(text: str) -> Any:
            return trtp.SymInt32(evaluate(text, dims, trtp.ShapeExpr, trtp.cdiv))

        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = (symbol(x) for x in embedded.kernel.grid)
        launch.block_x = embedded.kernel.threads
        launch.shared_mem = embedded.kernel.shared
        extra = trtp.SymIntExprs.from_tuple(tuple(symbol(x) for x in embedded.kernel.integers))
        return embedded.kernel.entry, embedded.ptx, launch, extra

    return _signed(
        implement,
        _inputs(trtp, operator),
        {**operator.attributes, "outputs": tuple[trtp.TensorDesc], "tactic": int},
        returns=tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs],
    )


def _check_attributes(kernel: Kernel, given: dict[str, Any]) -> None:
    """A kernel has its op's attributes as constants: a node with others needs another kernel."""
    for name, value in given.items():
        compiled = kernel.attributes[name]
        if isinstance(compiled, float):
            same = math.isclose(value, compiled, rel_tol=1e-6)
        else:
            # Some parsers hand strings over with the zero that ends them.
            same = (value.rstrip("\0") if isinstance(value, str) else value) == compiled
        if not same:
            raise ExportError(
                f"{kernel.operator}: a node has {name}={value!r}, and its kernel was compiled for {compiled!r}; "
                "export again"
            )


def _inputs(trtp: Any, operator: Operator) -> dict[str, Any]:
    return {x.name: trtp.TensorDesc for x in operator.inputs}


def _data_type(kind: str, model: Any) -> Any:
    import tensorrt

    return model if kind == "model" else getattr(tensorrt, kind)


def _signed(function: Callable[..., Any], *annotated: dict[str, Any], returns: Any) -> Any:
    """The function with this signature, which is where TensorRT reads a plugin's inputs and attributes."""
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=kind)
        for group in annotated
        for name, kind in group.items()
    ]
    function.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
    return function
