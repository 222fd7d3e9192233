# SPDX-License-Identifier: Apache-2.0
"""PTX as TensorRT launches it: input pointers, int32 numbers, output pointers.

TensorRT passes arguments by place and checks nothing: a kernel that expects another order computes garbage. So the
parameters of an entry bear the names of the op's tensors, and are compared with the op wherever PTX is read.
"""

import re
from pathlib import Path

from modelopt_dms.exporters import ExportError
from modelopt_dms.runtime.checks import check_kernel
from modelopt_dms.runtime.manifest import Kernel
from modelopt_dms.runtime.operators import Operator

POINTER, INTEGER = "u64", "u32"
_ENTRY = re.compile(r"\.visible\s+\.entry\s+([\w$]+)\s*\(([^)]*)\)")
# ".param .u64 .ptr .global .align 1 name" or ".param .u32 name"
_PARAMETER = re.compile(r"\.param\s+\.(\w+)[^,]*?([\w$]+)\s*(?:,|$)")

Parameter = tuple[str, str]


def schema(operator: Operator, integers: int) -> list[Parameter]:
    """Name and type of the parameters of an op's kernel with so many int32 numbers, in TensorRT's order."""
    found = [(f"in_{x.name}", POINTER) for x in operator.inputs]
    found += [(f"int_{index}", INTEGER) for index in range(integers)]
    return found + [(f"out_{x.name}", POINTER) for x in operator.outputs]


def signature(ptx: str) -> list[Parameter]:
    """Name and type of the parameters of the only entry, in order.

    Raises:
        ExportError: there is none, or more than one.
    """
    return [(name, kind) for kind, name in _PARAMETER.findall(_entry(ptx)[2])]


def rewrite(ptx: str, operator: Operator, names: list[Parameter], integers: int) -> str:
    """What a compiler made, with TensorRT's parameters, and without lines and paths of its source.

    Args:
        ptx: one entry.
        operator: what its kernel computes; the entry gets its name.
        names: what the entry's first parameters are, in its order: a name of `schema`, and the type. Those that follow
            (a compiler's own) must not be used.
        integers: int32 numbers among them.

    Raises:
        ExportError: parameters are not what `names` says, or unknown ones are used.
    """
    entry, _, listed = _entry(ptx)
    present = [(name, kind) for kind, name in _PARAMETER.findall(listed)]
    kinds = [kind for _, kind in present]
    expected = [kind for _, kind in names]
    if kinds[: len(names)] != expected:
        raise ExportError(
            f"{operator.name}: the kernel's parameters are {kinds}, expected {expected}"
        )
    wanted = schema(operator, integers)
    if unknown := [x for x in names if x not in wanted]:
        raise ExportError(f"{operator.name} has no parameter {unknown[0][0]} ({unknown[0][1]})")
    text = _without_source(ptx)
    declared = ",\n".join(f"\t.param .{kind} {name}" for name, kind in wanted)
    text = _ENTRY.sub(lambda _: f".visible .entry {operator.name}(\n{declared}\n)", text, count=1)
    for (old, _), (new, _) in zip(present, names, strict=False):
        text = re.sub(rf"(?<![\w$]){re.escape(old)}(?![\w$])", new, text)
    if used := re.findall(rf"(?<![\w$]){re.escape(entry)}_param_\d+(?![\w$])", text):
        raise ExportError(
            f"{operator.name}: the kernel uses {used[0]}, which is none of its tensors and numbers"
        )
    return text


def check_signature(operator: Operator, kernel: Kernel, ptx: str) -> None:
    """Whether PTX is a kernel of this op as the manifest describes it.

    Raises:
        ExportError: entry, parameters, threads or architecture differ.
    """
    place = f"{kernel.file} ({operator.name})"
    entry, _, _ = _entry(ptx)
    if entry != kernel.entry:
        raise ExportError(f"{place}: the entry is {entry}, expected {kernel.entry}")
    found, expected = signature(ptx), schema(operator, len(kernel.integers))
    for index in range(max(len(found), len(expected))):
        pair = [list_[index : index + 1] for list_ in (found, expected)]
        if pair[0] != pair[1]:
            has, wants = (f"{x[0][0]} ({x[0][1]})" if x else "nothing" for x in pair)
            raise ExportError(
                f"{place}: parameter {index} is {has}, expected {wants}; export again"
            )
    if f".target {kernel.arch}" not in ptx:
        raise ExportError(f"{place}: not compiled for {kernel.arch}; export again")
    threads = re.search(r"\.reqntid\s+(\d+)", ptx)
    if threads is None or int(threads[1]) != kernel.threads:
        raise ExportError(f"{place}: not a kernel of {kernel.threads} threads; export again")


def read(operator: Operator, kernel: Kernel, directory: Path) -> str:
    """PTX of a kernel of an exported directory, after a look at its hash and its parameters.

    Raises:
        ManifestError: the file is missing or not the one that was exported.
        ExportError: it is no kernel of this op.
    """
    check_kernel(kernel, directory)
    text = (directory / kernel.file).read_text(encoding="utf-8")
    check_signature(operator, kernel, text)
    return text


def _entry(ptx: str) -> tuple[str, re.Match[str], str]:
    """Name of the only entry, where it stands, and its parameters as they are written."""
    found = list(_ENTRY.finditer(ptx))
    if len(found) != 1:
        raise ExportError(f"PTX with {len(found)} entries; expected one")
    return found[0][1], found[0], found[0][2]


def _without_source(ptx: str) -> str:
    """Without comments, line numbers and the sections of debuggers, which hold paths of the machine that compiled."""
    text = re.sub(r"^\s*\.section\s+\.debug\w*\s*\{[^}]*\}\n?", "", ptx, flags=re.M)
    lines = [line.split("//")[0].rstrip() for line in text.splitlines()]
    kept = [line for line in lines if line and not re.match(r"\s*\.(loc|file)\b", line)]
    return "\n".join(kept) + "\n"
