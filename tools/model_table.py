# SPDX-License-Identifier: Apache-2.0
"""Every architecture of transformers that generates text, tried on a tiny random model: docs/models.md.

python tools/model_table.py [MODEL_TYPE ...]
"""

import argparse
import json
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

import transformers
from model_checks import LIMITS, ROOT, Row, check, reload
from tiny_configs import architectures

BATCH = 32  # models that one process loads
DATA = ROOT / "benchmarks" / "results" / "models.json"
PAGE = ROOT / "docs" / "models.md"


def main() -> None:
    """Try all, or those named, whose rows then take the place of their old ones; exit 1 if any deviates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="architectures; all, unless given")
    parser.add_argument("--again", metavar="RESULT", help="those with this result, e.g. deviates")
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = {} if not (given.names or given.again) else read_rows()
    names = given.names or list(architectures())
    if given.again:
        names = [name for name, row in rows.items() if row.result == given.again]
    for start in range(0, len(names), BATCH):
        rows |= {row.name: row for row in run(names[start : start + BATCH])}
        ordered = [rows[x] for x in sorted(rows)]
        data = {"transformers": transformers.__version__, "rows": [asdict(x) for x in ordered]}
        DATA.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(table(ordered), encoding="utf-8")
    sys.exit(any(x.result == "deviates" for x in rows.values()))


def read_rows() -> dict[str, Row]:
    """Rows of an earlier run with the same transformers, by name."""
    data = json.loads(DATA.read_text(encoding="utf-8")) if DATA.is_file() else {}
    same = data.get("transformers") == transformers.__version__
    return {x["name"]: Row(**x) for x in data["rows"]} if same else {}


def run(names: list[str]) -> list[Row]:
    """Rows of these architectures, printed."""
    with tempfile.TemporaryDirectory() as place:
        rows = [check(name, Path(place)) for name in names]
        reload(rows, Path(place))
    for row in rows:
        print(f"{row.result:10} {row.name:30} {row.why[:200]} {row.differences}", flush=True)
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
