# SPDX-License-Identifier: Apache-2.0
"""Sums, products and quotients of an op's dims, as the manifest writes them."""

import ast
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from modelopt_dms.exporters import ExportError
from modelopt_dms.runtime.operators import Argument

_OPERATIONS: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
}


def ceil_div(a: int, b: int) -> int:
    """The least whole number that is not below a / b."""
    return -(-a // b)


def evaluate(
    text: str,
    dims: Mapping[str, Any],
    number: Callable[[int], Any] = int,
    divide_up: Callable[[Any, Any], Any] = ceil_div,
) -> Any:
    """The value of an expression such as "B * K", "P" or "ceil(T / 128)".

    Args:
        text: names, whole numbers, + - * // and ceil(a / b).
        dims: what the names stand for: numbers, or symbols with the same operators.
        number: makes a whole number what `dims` holds.
        divide_up: ceil(a / b) of two of those.

    Raises:
        ExportError: a name that is not known, or anything else than the above.
    """

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.Name):
            if node.id not in dims:
                raise ExportError(f"{text!r}: {node.id} is none of {', '.join(sorted(dims))}")
            return dims[node.id]
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return number(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
        quotient = _quotient(node)
        if quotient is None:
            raise ExportError(
                f"{text!r} may hold names, whole numbers, + - * // and ceil(a / b) only"
            )
        return divide_up(value(quotient.left), value(quotient.right))

    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        raise ExportError(f"{text!r} is no expression: {error}") from error
    return value(tree.body)


def _quotient(node: ast.AST) -> ast.BinOp | None:
    """The quotient in a node that is ceil(a / b)."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        return None
    if node.func.id != "ceil" or node.keywords or len(node.args) != 1:
        return None
    inner = node.args[0]
    return inner if isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Div) else None


def dims_of(arguments: Sequence[Argument], shapes: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """What the names of dims stand for where these arguments have these shapes; the first that bears a name counts.

    Raises:
        ExportError: a tensor has another number of dims.
    """
    found: dict[str, Any] = {}
    for argument, shape in zip(arguments, shapes, strict=True):
        if len(shape) != len(argument.shape):
            raise ExportError(
                f"{argument.name} has {len(shape)} dims; expected {' '.join(argument.shape)}"
            )
        for name, size in zip(argument.shape, shape, strict=True):
            found.setdefault(name, size)
    return {name: size for name, size in found.items() if not name.isdigit()}
