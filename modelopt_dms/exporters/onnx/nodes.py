# SPDX-License-Identifier: Apache-2.0
"""Nodes of our own ops in a graph that torch.onnx is tracing."""

from typing import Any

import torch
from torch import Tensor

from modelopt_dms.runtime.operators import DOMAIN, VERSION, Argument, Operator

_FIXED = {"float32": torch.float32, "int32": torch.int32, "bool": torch.bool}


def call(operator: Operator, inputs: dict[str, Tensor], **attributes: Any) -> dict[str, Tensor]:
    """The outputs of a node by name; their shapes follow from the table, their numbers mean nothing yet.

    Args:
        operator: of the table.
        inputs: tensors by name.
        **attributes: all that the table names.

    Raises:
        ValueError: a tensor's shape contradicts another's; a mistake of the caller.
    """
    if inputs.keys() != {x.name for x in operator.inputs} or (
        attributes.keys() != operator.attributes.keys()
    ):
        raise ValueError(f"{operator.name} wants other arguments than {[*inputs, *attributes]}")
    dims: dict[str, Any] = dict(attributes)
    kinds: dict[str, torch.dtype] = dict(_FIXED)
    for argument in operator.inputs:
        tensor = inputs[argument.name]
        kinds.setdefault(argument.kind, tensor.dtype)
        _bind(operator, argument, tensor, dims)
    found = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{operator.name}",
        [inputs[x.name].contiguous() for x in operator.inputs],
        {name: operator.attributes[name](value) for name, value in attributes.items()},
        dtypes=[kinds[x.kind] for x in operator.outputs],
        shapes=[[_size(x, dims) for x in argument.shape] for argument in operator.outputs],
        version=VERSION,
    )
    return {x.name: tensor for x, tensor in zip(operator.outputs, found, strict=True)}


def _bind(operator: Operator, argument: Argument, tensor: Tensor, dims: dict[str, Any]) -> None:
    """Learn the sizes of dims from a tensor, where they are not known yet."""
    if tensor.ndim != len(argument.shape):
        raise ValueError(
            f"{operator.name}.{argument.name} has {len(argument.shape)} dims, got {tensor.ndim}"
        )
    for name, size in zip(argument.shape, tensor.shape, strict=True):
        known = _size(name, dims) if name in dims or name.isdigit() else None
        if known is None:
            dims[name] = size
        elif isinstance(known, int) and isinstance(size, int) and known != size:
            raise ValueError(
                f"{operator.name}.{argument.name}: {name} is {known} elsewhere, got {size}"
            )


def _size(name: str, dims: dict[str, Any]) -> Any:
    return int(name) if name.isdigit() else dims[name]
