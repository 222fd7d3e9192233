# SPDX-License-Identifier: Apache-2.0
"""The notebook: small, in order, and (slow) run from its first cell to its last on the real model."""

import json
from typing import Any

import nbclient
import nbformat
import pytest
from paths import ROOT

from modelopt_dms.checkpoints.fetch import is_here

TOUR = ROOT / "examples" / "tour.ipynb"


def _code() -> list[dict[str, Any]]:
    cells = json.loads(TOUR.read_text(encoding="utf-8"))["cells"]
    return [x for x in cells if x["cell_type"] == "code"]


def test_the_notebook_is_small_and_was_run_in_order() -> None:
    assert TOUR.stat().st_size < 200_000
    cells = _code()
    assert [x["execution_count"] for x in cells] == list(range(1, len(cells) + 1))
    assert not [x for cell in cells for x in cell["outputs"] if x["output_type"] == "error"]
    for cell in cells:
        compile("".join(cell["source"]), TOUR.name, "exec")
    text = TOUR.read_text(encoding="utf-8")
    assert "/root/" not in text and "/home/" not in text and "/tmp/" not in text


@pytest.mark.slow
def test_every_cell_of_the_notebook_runs() -> None:
    if not is_here("smollm2"):
        pytest.skip("modelopt-dms fetch smollm2")
    notebook = nbformat.read(TOUR, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute()
    said = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    assert "chosen: CR" in said
    # Of logits of about 17, in float32: rounding.
    assert float(said.split("largest difference of a logit: ")[1].split()[0]) <= 1e-4
