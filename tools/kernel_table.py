# SPDX-License-Identifier: Apache-2.0
"""What every kernel variant costs when compiled for Hopper, as the table of docs/kernels.md. Needs no GPU.

python tools/kernel_table.py
"""

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any

from kernel_variants import all_variants

from modelopt_dms.kernels.variants import Variant, compile_variant, nvidia_tools

COUNTED = ("HMMA", "HGMMA", "LDGSTS")
HEAD = "| kernel variant | registers | spilled bytes | shared bytes | HMMA | HGMMA | async copies |"


def main() -> None:
    """Print the table in Markdown, after the line that says which compiler made it."""
    names = [variant.name for variant in all_variants()]
    # Spawned: a forked Triton keeps its parent's compiler state.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(row, names))
    rule = "|---" * (HEAD.count("|") - 1) + "|"
    lines = [f"Triton {version('triton')}, sm_90a:", "", HEAD, rule, *rows]
    sys.stdout.write("\n".join(lines) + "\n")


def row(name: str) -> str:
    """One line of the table."""
    variant = next(x for x in all_variants() if x.name == name)
    return f"| {' | '.join(str(x) for x in (f'`{name}`', *cells(variant)))} |"


def cells(variant: Variant) -> list[int]:
    """Registers of a thread, spilled bytes, shared bytes of a program, and counted instructions."""
    made = compile_variant(variant)
    registers, spills, counts = assembled_cost(made.cubin)
    return [registers, spills, made.shared, *(counts[name] for name in COUNTED)]


def assembled_cost(cubin: bytes) -> tuple[int, int, dict[str, int]]:
    """Registers, spilled bytes and counted instructions of machine code."""
    tools = nvidia_tools()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        sass = _output(tools / "cuobjdump", "--dump-sass", file.name)
    registers = int(_found(r"REG:(\d+)", usage))
    stack = int(_found(r"STACK:(\d+)", usage)) + int(_found(r"LOCAL:(\d+)", usage))
    # Lines read "/*0a50*/  @P0 HMMA.16816.F32.BF16 R4, ..."
    mnemonics = Counter(re.findall(r"\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", sass))
    return registers, stack, {name: mnemonics[name] for name in COUNTED}


def _output(*command: Any) -> str:
    return subprocess.run(
        [str(x) for x in command], check=True, capture_output=True, text=True
    ).stdout


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in {text}"
    return match[1]


if __name__ == "__main__":
    main()
