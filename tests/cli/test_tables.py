# SPDX-License-Identifier: Apache-2.0
"""Tables on narrow terminals and in pipes: nothing of them is cut, whatever the width."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from rich.console import Console
from rich.table import Column, Table

from modelopt_dms.cli.engines import _ports
from modelopt_dms.cli.planning import _table as plan_table
from modelopt_dms.cli.tables import print_table
from modelopt_dms.config.bundled import list_recipes
from modelopt_dms.data.dry_run import Preview, SourcePreview
from modelopt_dms.evaluation.report import (
    data_table,
    fidelity_table,
    results_table,
    trials_table,
)
from modelopt_dms.evaluation.tuning import Trial, TuneResult
from modelopt_dms.runtime.manifest import Manifest, Model, Phase, Port
from modelopt_dms.serving.planner.capacity import plan

ESCAPE = "\x1b"


def results() -> Table:
    row = {
        "metric": "accuracy",
        "value": 0.5625,
        "resident_tokens": 1234.0,
        "context_tokens": 8191.0,
    }
    row |= {
        "kv_bytes": 1_234_567_890,
        "dense_bytes": 8_234_567_890,
        "compression_ratio": 6.64,
        "length": 8192,
    }
    return results_table(
        [{"task": "multivalue", "method": x, **row} for x in ("full cache", "StreamingLLM")]
    )


def fidelity() -> Table:
    row = dict.fromkeys(("value", "kl_p95", "kl_p99", "kl_max", "top1"), 0.1234)
    row |= {"perplexity_full": 12345.67, "perplexity": 12456.78, "compression_ratio": 7.75}
    return fidelity_table([{"category": "a_long_name_of_a_file.jsonl", "length": 32768, **row}])


def data() -> Table:
    source = SourcePreview(
        name="a_long_name_of_a_file.jsonl", records=1_234_567, documents=1_234_560, tokens=9_876_543_210,
        longest=1_234_561, wanted=0.7, share=0.691, epochs=12.25, excerpt="x",
    )  # fmt: skip
    return data_table(
        Preview(
            sources=(source,), samples=123_456, held_out=32, steps=10_000, samples_per_step=64,
            length=4096, padding=0.012, in_effect=0.93,
        )
    )  # fmt: skip


def trials() -> Table:
    found = [Trial(0.5, x, 1234.5 + x, x / 3) for x in (1.5, 6.25)]
    return trials_table(
        TuneResult(
            found[0],
            full_perplexity=1234.125,
            max_loss=0.5,
            trials=tuple(found),
            length=8192,
            samples=16,
        )
    )


def ports() -> Table:
    port = Port("kv_metadata.0", "float32", ("pages", 2, 64, 32), "new_kv_metadata.0")
    model = Model(
        "LlamaForCausalLM", 4, 2, 4, 32, 32, 9, "float32", 16, 0, "plain", "plain", (1,)
    )  # fmt: skip
    phase = Phase("decode.onnx", (port,), (port,))
    return _ports(Manifest(model, 64, 2, 32, 1, {"decode": phase}), "decode")


TABLES = {
    "plan": lambda: plan_table(plan("Qwen3-8B", "h200", 1024, tp=[1, 8])),
    "results": results,
    "fidelity": fidelity,
    "data": data,
    "trials": trials,
    "ports": ports,
}


def shown(table: Table, width: int, terminal: bool = True) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, no_color=True)
    print_table(console, table)
    return console.file.getvalue()


def figures(table: Table) -> set[str]:
    """Every word of the cells with a digit in it."""
    cells = [str(x) for column in table.columns for x in column.cells]
    return {word for cell in cells for word in cell.split() if re.search(r"\d", word)}


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("name", TABLES)
def test_no_figure_is_cut_at_any_width(name: str, width: int) -> None:
    table = TABLES[name]()
    wanted = figures(TABLES[name]())
    text = shown(table, width)
    assert "…" not in text
    assert len(wanted) > 3
    assert not {x for x in wanted if x not in text}


def test_a_row_of_a_narrow_table_names_its_cells_and_its_group() -> None:
    table = Table(Column("GPUs", no_wrap=True), "variant", title="A model", caption="the end")
    table.add_column("KV\nMB", justify="right", no_wrap=True)
    table.add_column("tokens/s", justify="right", no_wrap=True)
    table.add_row("8", "dense", "4,831.8", "")
    table.add_row("", "DMS", "396.4", "123")
    lines = shown(table, 24).splitlines()
    assert lines == [
        "A model",
        "",
        "GPUs 8, variant dense,",
        "  KV MB 4,831.8",
        "",
        "GPUs 8, variant DMS,",
        "  KV MB 396.4,",
        "  tokens/s 123",
        "",
        "the end",
    ]


def test_a_pipe_gets_tables_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    text = shown(fidelity(), 80, terminal=False)
    row = next(x for x in text.splitlines() if "12456.78" in x)
    assert "a_long_name_of_a_file.jsonl" in row and "7.75x" in row and len(row) > 80
    monkeypatch.setenv("COLUMNS", "40")
    assert max(map(len, shown(fidelity(), 40, terminal=False).splitlines())) <= 60


@pytest.mark.parametrize("words", [("plan", "Qwen3-8B"), ("recipes",), ("fetch",)])
@pytest.mark.parametrize("columns", ["40", "80", None])
def test_commands_print_plain_tables_into_pipes(
    words: tuple[str, ...], columns: str | None, tmp_path: Path
) -> None:
    variables = {"HOME": str(tmp_path), "PATH": "", "NO_COLOR": "1", "PYTHONUTF8": "1"}
    variables |= {"PYTHONPATH": ":".join(sys.path), "FORCE_COLOR": ""}
    variables |= {"COLUMNS": columns} if columns else {}
    command = [sys.executable, "-m", "modelopt_dms", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=variables, check=True
    )
    assert "…" not in done.stdout and ESCAPE not in done.stdout
    if words == ("recipes",):
        assert all(name in re.sub(r"[\s│]", "", done.stdout) for name in list_recipes())
    assert os.linesep in done.stdout
