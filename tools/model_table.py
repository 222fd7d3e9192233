# SPDX-License-Identifier: Apache-2.0
"""Every architecture of transformers that generates text, tried on a tiny random model: docs/models.md.

python tools/model_table.py [MODEL_TYPE ...]
"""

import argparse
import json
import shutil
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

import transformers
from model_checks import LIMITS, ROOT, Row, check, reload
from tiny_configs import architectures

BATCH = 12  # models that one process loads


def main() -> None:
    """Try all, or those named; all are written to docs/models.md and benchmarks/results/models.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="model types; all, unless given")
    names = parser.parse_args().names
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = run(names or list(architectures()))
    if not names:
        rows = sorted(rows, key=lambda x: x.name)
        data = {"transformers": transformers.__version__, "rows": [asdict(x) for x in rows]}
        place = ROOT / "benchmarks" / "results" / "models.json"
        place.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        (ROOT / "docs" / "models.md").write_text(table(rows), encoding="utf-8")
    sys.exit(any(x.result == "deviates" for x in rows))


def run(names: list[str]) -> list[Row]:
    """Rows of these architectures, printed as they come."""
    rows: list[Row] = []
    for start in range(0, len(names), BATCH):
        place = Path(tempfile.mkdtemp())
        batch = [check(name, place) for name in names[start : start + BATCH]]
        reload(batch, place)
        shutil.rmtree(place)
        for row in batch:
            print(f"{row.result:10} {row.name:30} {row.why[:200]} {row.differences}", flush=True)
        rows += batch
    return rows


def table(rows: list[Row]) -> str:
    """The rows as a page of documentation."""
    counts = {x: sum(row.result == x for row in rows) for x in ("exact", "refused", "deviates")}
    lines = [
        "# Models",
        "",
        "Made by `make models` (`tools/model_table.py`); do not edit. Every architecture of transformers "
        f"{transformers.__version__} that generates text, as a tiny random model in float32 on a CPU: "
        f"{counts['exact']} are exact, {counts['refused']} are refused with one error before any work, "
        f"{counts['deviates']} deviate.",
        "",
        "**exact**: with eviction off the logits are those of transformers' eager attention (1e-5 of the largest; "
        "without a cache, with one, in chunks, and with an image where *image* says so); with gates that evict half of "
        "the tokens, a forward under the mask equals prefill and decoding through the physical cache (1e-4); a "
        "left-padded batch generates what its sequences generate alone (1e-4); what is saved loads bit-exactly in a "
        "fresh process. A model that amplifies rounding may differ by five times what SDPA in the place of eager "
        "attention changes, and one whose positions depend on padding by what they change.",
        "",
        "All figures stand in `benchmarks/results/models.json`.",
        "",
        "| architecture | class | result | gates | notes |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row.result != "not built":
            gates = str(row.converted) if row.converted else ""
            lines.append(f"| {_name(row)} | `{row.cls}` | {row.result} | {gates} | {_notes(row)} |")
    lines += [
        "",
        "Not tried, because the tiny model could not be made or needs more than text:",
        "",
    ]
    lines += [
        f"* {_name(row)} (`{row.cls}`): {_cell(row.why)}"
        for row in rows
        if row.result == "not built"
    ]
    return "\n".join(lines) + "\n"


def _name(row: Row) -> str:
    return row.name.removesuffix(":image")


def _notes(row: Row) -> str:
    notes = [row.why] if row.why else []
    if "image" in row.differences:
        notes.append("image")
    if row.left_alone:
        notes.append(f"left alone: {'; '.join(row.left_alone)}")
    if row.differences.get("padded", 0.0) > LIMITS["padded"]:
        notes.append("the plain model depends on padding, too")
    return _cell(". ".join(notes))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")[:300]


if __name__ == "__main__":
    main()
