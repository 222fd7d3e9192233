# SPDX-License-Identifier: Apache-2.0
"""Short tables of results files that kernels.py and end_to_end.py wrote, complete or not.

python benchmarks/summary.py benchmarks/results/kernels.json benchmarks/results/end_to_end.json
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Content = dict[str, Any]


def kernel_lines(content: Content) -> Iterator[str]:
    """Targets, and what went wrong."""
    yield f"copy {content['copy_bytes_per_s'] / 1e12:.2f} TB/s"
    for row in content.get("targets", []):
        worst = "not measured" if row["worst"] is None else f"{row['worst']:.3f}"
        yield f"  {row['target']:28s} {row['limit']:8s} worst {worst:14s} reached: {row['reached']}"


def model_lines(content: Content) -> Iterator[str]:
    """Milliseconds a step of every point, and the ratios."""
    for row in content["rows"]:
        if "ms_per_step" in row:
            kind = f"{row['impl']:9s} {row['format']:5s} CR {row['cr']:<4.3g}"
            place = f"{row['context']:6d} x {row['batch']:<4d}"
            speed = f"{row['ms_per_step']:8.2f} ms {row['tokens_per_s']:8.0f} tokens/s"
            yield f"  {kind} {place} {speed}, at least {row.get('limit_ms', 0):.2f} ms"
    for entry in content.get("comparison", []):
        cells = (f"{k} {x:.2f}" if isinstance(x, float) else f"{k} {x}" for k, x in entry.items())
        yield "  " + ", ".join(cells)


def lines(path: Path) -> Iterator[str]:
    """What one file says."""
    if not path.exists():
        yield f"{path.name}: nothing was written"
        return
    content = json.loads(path.read_text())
    where = content["machine"]
    yield f"{path.name}: {where.get('gpu', where['cpu'])}, {where['date']}, commit {where['commit']}"
    yield from model_lines(content) if "shape" in content["settings"] else kernel_lines(content)
    for row in content["rows"]:
        if "error" in row:
            yield f"  ERROR {row}"


def main() -> None:
    """The command line."""
    for path in sys.argv[1:]:
        for line in lines(Path(path)):
            sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
