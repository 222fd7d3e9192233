# SPDX-License-Identifier: Apache-2.0
"""What the real `tensorrt` Python bindings offer: classes, enums, methods with their signatures, properties.

The bindings' wheel is small and has no dependencies, but its extension wants three libraries of gigabytes. It asks them
for nothing while it is imported, so three empty libraries with the names of their functions are enough to read what
pybind11 wrote into its docstrings. Run as a script, it prints JSON; nothing of TensorRT's works afterwards.
"""

import json
import os
import platform
import re
import struct
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
FUNCTIONS = (
    "getPluginRegistry",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "initLibNvInferPlugins",
)
# return 0, and the machine's number in ELF
MACHINES = {
    "x86_64": (62, bytes.fromhex("31c0c3")),
    "aarch64": (183, bytes.fromhex("000080d2c0035fd6")),
}


@cache
def surface(site: str | None = None) -> dict[str, Any]:
    """The surface of the bindings that are installed, or of those in a directory."""
    with tempfile.TemporaryDirectory() as place:
        for library in LIBRARIES:
            for major in (10, 11):
                name = f"{library}.so.{major}"
                Path(place, name).write_bytes(empty_library(name, FUNCTIONS))
        environment = {**os.environ, "LD_LIBRARY_PATH": place}
        if site is not None:
            environment["PYTHONPATH"] = site
        command = [sys.executable, __file__]
        said = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert said.returncode == 0, said.stderr
        return json.loads(said.stdout)


def empty_library(name: str, functions: tuple[str, ...]) -> bytes:
    """A shared library (ELF64) of functions that return 0: there may be no compiler."""
    machine, code = MACHINES[platform.machine()]
    strings = b"\0" + b"".join(x.encode() + b"\0" for x in (*functions, name))

    def at(text: str) -> int:
        return strings.index(b"\0" + text.encode() + b"\0") + 1

    page, header, program, segments = 0x1000, 64, 56, 4
    code_at = header + segments * program
    symbols_at = code_at + 16
    count = len(functions) + 1
    hashes_at = symbols_at + 24 * count
    strings_at = hashes_at + 4 * (3 + count)
    size = strings_at + len(strings)
    assert size <= page
    symbols = bytes(24) + b"".join(
        struct.pack("<IBBHQQ", at(x), 0x12, 0, 1, code_at, len(code)) for x in functions
    )
    chain = (0, *range(2, count), 0)  # one bucket, whose chain goes through all symbols
    hashes = struct.pack(f"<{3 + count}I", 1, count, 1, *chain)
    tags = [(14, at(name)), (4, hashes_at), (5, strings_at), (6, symbols_at)]
    tags += [(10, len(strings)), (11, 24), (0, 0)]
    dynamic = b"".join(struct.pack("<QQ", *x) for x in tags)

    def segment(kind: int, flags: int, offset: int, size: int, align: int) -> bytes:
        return struct.pack("<IIQQQQQQ", kind, flags, offset, offset, offset, size, size, align)

    table = segment(1, 5, 0, size, page) + segment(1, 6, page, len(dynamic), page)
    # The last one says that nobody executes the stack.
    table += segment(2, 6, page, len(dynamic), 8) + segment(0x6474E551, 6, 0, 0, 16)
    elf = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(b"\x7fELF\x02\x01\x01", 3, machine, 1, 0, header, 0),
        *(0, header, program, segments, 0, 0, 0),
    )
    text = elf + table + code.ljust(16, b"\0") + symbols + hashes + strings
    return text.ljust(page, b"\0") + dynamic


def _read() -> dict[str, Any]:
    """Import the bindings, and write down what they offer."""
    # Functions that the empty libraries lack are not missed until they are called.
    sys.setdlopenflags(os.RTLD_LAZY)
    import tensorrt_bindings as trt

    found: dict[str, Any] = {"version": trt.__version__, "classes": {}}
    _classes(trt, "", found["classes"])
    return found


def _classes(holder: Any, prefix: str, found: dict[str, Any]) -> None:
    for name, value in vars(holder).items():
        if not isinstance(value, type) or name.startswith("_") or prefix + name in found:
            continue
        described: dict[str, Any] = {"methods": {}, "properties": {}}
        if hasattr(value, "__members__"):
            described["members"] = {x: int(y) for x, y in value.__members__.items()}
        for base in reversed(value.__mro__):
            for member, content in vars(base).items():
                if isinstance(content, property):
                    described["properties"][member] = content.fset is not None
                elif member == "__init__" or not member.startswith("_"):
                    lines = signatures(member, getattr(content, "__doc__", None) or "")
                    if lines:
                        described["methods"][member] = lines
        found[prefix + name] = described
        _classes(value, f"{prefix}{name}.", found)


def signatures(name: str, text: str) -> list[list[list[Any]]]:
    """From a pybind11 docstring: for every overload, its parameters as [name, type, has a default]."""
    return [
        [_parameter(x) for x in _split(line[line.index("(") + 1 : _closing(line)])]
        for line in re.findall(rf"^(?:\d+\. )?{re.escape(name)}\(.*$", text, re.MULTILINE)
        if not line.startswith(f"{name}(*args")
    ]


def _closing(line: str) -> int:
    """Where the parenthesis that opens first closes."""
    depth = 0
    for i, x in enumerate(line):
        depth += (x == "(") - (x == ")")
        if x == ")" and not depth:
            return i
    raise ValueError(line)


def _split(text: str) -> list[str]:
    """At the commas between parameters."""
    parts, depth = [""], 0
    for x in text:
        depth += (x in "([<{") - (x in ")]>}")
        if x == "," and not depth:
            parts.append("")
        else:
            parts[-1] += x
    return [x.strip() for x in parts if x.strip()]


def _parameter(text: str) -> list[Any]:
    name, _, rest = text.partition(":")
    kind, equals, _ = rest.partition("=")
    return [name.strip(), kind.strip(), bool(equals)]


if __name__ == "__main__":
    print(json.dumps(_read()))
