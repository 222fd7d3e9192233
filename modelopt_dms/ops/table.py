# SPDX-License-Identifier: Apache-2.0
"""The table of every kernel variant we ship for Hopper: `python -m modelopt_dms.ops.table`. Needs no GPU."""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context

from modelopt_dms.ops.variants import Variant, compile_variant

KERNEL_FILES = ("append", "decode", "prefill", "prefill_backward", "prefill_chunk")
HEAD = "| kernel variant | registers | spilled bytes | shared bytes | HMMA | HGMMA | async copies |"


def all_variants() -> list[Variant]:
    """Every variant of every kernel file."""
    files = [import_module(f"modelopt_dms.ops.{name}") for name in KERNEL_FILES]
    found = [variant for file in files for variant in file.variants()]
    names = [variant.name for variant in found]
    assert len(set(names)) == len(names), f"two variants share a name: {sorted(names)}"
    return found


def row(name: str) -> str:
    """One line of the table."""
    variant = next(x for x in all_variants() if x.name == name)
    made = compile_variant(variant)
    counts = made.instructions
    cells = [
        f"`{name}`",
        made.registers,
        made.spills,
        made.shared,
        counts["HMMA"],
        counts["HGMMA"],
        counts["LDGSTS"],
    ]
    return f"| {' | '.join(str(x) for x in cells)} |"


def table() -> str:
    """The table in Markdown, after the line that says which compiler made it."""
    names = [variant.name for variant in all_variants()]
    # Spawned: a forked Triton keeps its parent's compiler state.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(row, names))
    rule = "|---" * (HEAD.count("|") - 1) + "|"
    return "\n".join([f"Triton {version('triton')}, sm_90a:", "", HEAD, rule, *rows])


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
