# SPDX-License-Identifier: Apache-2.0
"""Every kernel variant we ship compiles for Hopper without a GPU, and costs what docs/kernels.md says."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from paths import ROOT

from modelopt_dms.kernels.dispatch import rows_fit

PAGE = ROOT / "docs" / "kernels.md"
SHARED = 227 << 10  # bytes that a program may take on Hopper
# Head dim, query heads of a KV head, dtype: the most that is accepted, and what is refused next to it.
WIDEST = [(256, 32, "bfloat16"), (256, 32, "float16"), (128, 64, "float32")]
TOO_WIDE = [(256, 64, "bfloat16"), (256, 4, "float32")]
SHAPES = """
import json, sys, torch
from modelopt_dms.kernels import decode, prefill_chunk
from modelopt_dms.kernels.layout import LayerShape, RowLayout
from modelopt_dms.kernels.reference import Scoring
from modelopt_dms.kernels.variants import compile_variant

for dim, group, name in json.loads(sys.argv[1]):
    dtype = getattr(torch, name)
    rows = RowLayout("plain", dim, dtype)
    shape, scoring = LayerShape(rows, rows, 2, group, dtype), Scoring(dim**-0.5)
    made = decode.decode_variant("d", shape, scoring), prefill_chunk.chunk_variant("c", shape, scoring)
    print(max(compile_variant(x).shared for x in made))
"""
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


@pytest.mark.slow
def test_rows_are_refused_where_their_tiles_do_not_fit_in_shared_memory() -> None:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SHAPES, json.dumps(WIDEST + TOO_WIDE)]
    found = subprocess.run(command, env=clean, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    taken = [int(x) for x in found.stdout.split()]
    assert max(taken[: len(WIDEST)]) <= SHARED < min(taken[len(WIDEST) :])


def test_rows_that_fit_are_known_without_a_compiler() -> None:
    fits = [rows_fit(dim, group, getattr(torch, x)) for dim, group, x in WIDEST + TOO_WIDE]
    assert fits == [True] * len(WIDEST) + [False] * len(TOO_WIDE)
    assert rows_fit(64, 3, torch.bfloat16)
    assert not rows_fit(20, 1, torch.bfloat16)
    assert not rows_fit(264, 1, torch.bfloat16)
