# SPDX-License-Identifier: Apache-2.0
"""Every kernel variant we ship compiles for Hopper without a GPU, and costs what docs/kernels.md says."""

import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
from paths import ROOT

PAGE = ROOT / "docs" / "kernels.md"
# Backward kernels hold two accumulators; what they may spill is stated here.
MAY_SPILL = {"prefill_dkv_d128_128": 72, "prefill_dkv_d192_128": 64}


def rows(text: str) -> dict[str, list[str]]:
    """Cells of each line of the table by the variant's name."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    cells = [[x.strip() for x in line.strip("|").split("|")] for line in lines]
    return {line[0].strip("`"): line[1:] for line in cells}


@pytest.fixture(scope="module")
def made() -> dict[str, list[str]]:
    # Kernels are interpreted in this process; another one compiles them.
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, ROOT / "tools" / "kernel_table.py"],
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return rows(found.stdout)


def test_no_variant_spills_more_than_stated(made: dict[str, list[str]]) -> None:
    spilled = {name: int(cells[1]) for name, cells in made.items()}
    assert len(spilled) > 20
    assert {x: n for x, n in spilled.items() if n > MAY_SPILL.get(x, 0)} == {}


def test_attention_runs_on_tensor_cores_and_copies_asynchronously(
    made: dict[str, list[str]],
) -> None:
    attention = {
        x: cells for x, cells in made.items() if not x.startswith(("append", "pack", "move"))
    }
    without = [x for x, cells in attention.items() if not int(cells[3]) + int(cells[4])]
    assert [x for x in without if "combine" not in x and "delta" not in x] == []


def test_the_table_in_the_docs_is_what_this_compiler_makes(made: dict[str, list[str]]) -> None:
    text = PAGE.read_text()
    # "Triton 3.7.1, sm_90a:" stands above the table; the word alone, and another table, stand further up.
    _, pinned, table = re.split(r"^Triton ([\d.]+), sm_90a:$", text, flags=re.M)
    if version("triton") != pinned:
        pytest.skip(f"the table is Triton {pinned}'s")
    assert rows(table) == made
