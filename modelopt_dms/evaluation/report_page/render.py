# SPDX-License-Identifier: Apache-2.0
"""A report's figures as one HTML file that needs nothing else: no network, no other file."""

import base64
import gzip
import json
from collections.abc import Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from modelopt_dms.config.output_dir import OutputError, atomic_file, check_writable

# The first line of every page; what does not begin with it is not overwritten.
FIRST_LINE = "<!DOCTYPE html><!-- modelopt-dms report -->"
# Shares of the heads that hold a token: below each, the next class of shade and underline. 0 is a class of its own.
STEPS = (0.1, 0.25, 0.5, 0.75)


class ReportError(ValueError):
    """A report that cannot be drawn or written; the message says what to do."""


def check_drawable() -> None:
    """Refuse where plotly is not installed.

    Raises:
        ReportError: with the command that installs it.
    """
    if find_spec("plotly") is None:
        raise ReportError("a report needs plotly, which is not installed: pip install 'plotly>=6'")


def check_page(path: Path) -> None:
    """Refuse to write a page over something else, or where nothing can be written.

    Raises:
        OutputError: see above.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a directory; expected the name of an .html file")
    if not path.absolute().parent.is_dir():
        raise OutputError(f"{path.parent} does not exist; make it, or choose another place")
    check_writable(path)
    if path.exists():
        with path.open("rb") as file:
            if file.read(len(FIRST_LINE)) != FIRST_LINE.encode():
                raise OutputError(f"{path} exists and is no report of ours; choose another file")


def write_page(path: Path, figures: dict[str, Any]) -> None:
    """Write the page completely or not at all.

    Raises:
        ReportError: plotly is not installed.
        OutputError: the file is something else.
    """
    check_drawable()
    check_page(path)
    with atomic_file(path) as temporary:
        temporary.write_text(page(figures), encoding="utf-8")


def page(figures: dict[str, Any]) -> str:
    """The HTML of a report, from what `build.build` returned."""
    # Imported late: a page is rarely drawn.
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.lstrip_blocks = True
    environment.filters["grouped"] = lambda x: f"{x:,.0f}"
    template = environment.from_string(_part("page.html"))
    kept = figures["retention"]
    return FIRST_LINE + "\n" + template.render(
        figures,
        css=_part("page.css"),
        js=_part("page.js"),
        plotly=_packed(_plotly()),
        data=_embedded(figures),
        tokens=_tokens(kept),
        layers=_layers(kept["rows"], kept["resident"]),
        total_heads=len(kept["rows"]),
        scores=_scores(figures["accuracy"]),
    )  # fmt: skip


def _part(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    """plotly.js, which its Python package carries."""
    return files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")


def _packed(text: str) -> str:
    """A text that the page unpacks: a third of its size."""
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def _embedded(figures: dict[str, Any]) -> str:
    """JSON that may stand in a script element, whatever its strings are."""
    text = json.dumps(figures, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for sign, code in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026")):
        text = text.replace(sign, code)
    return text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def shade(count: int, heads: int) -> int:
    """Class of a token that so many of the heads hold: 0 is none, then by STEPS."""
    return 0 if count == 0 else 1 + sum(count / heads >= x for x in STEPS)


def _tokens(kept: dict[str, Any]) -> list[dict[str, Any]]:
    """What the page shows of every token, in the order of the text."""
    asked = {i for start, stop in kept["spans"] for i in range(start, stop)}
    heads = len(kept["rows"])
    return [
        {
            "text": text.replace("\n", ""),
            "lines": text.count("\n"),
            "count": count,
            "shade": shade(count, heads),
            "begins": i in asked and i - 1 not in asked,
            "ends": i in asked and i + 1 not in asked,
        }
        for i, (text, count) in enumerate(zip(kept["tokens"], kept["counts"], strict=True))
    ]


def _layers(rows: Sequence[Sequence[int]], resident: Sequence[int]) -> list[dict[str, Any]]:
    """Tokens held by every head, layer by layer."""
    found: dict[int, list[int]] = {}
    for (layer, _), tokens in zip(rows, resident, strict=True):
        found.setdefault(layer, []).append(tokens)
    return [{"layer": x, "tokens": tokens} for x, tokens in found.items()]


def _scores(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Right answers by method and asked ratio, a column a task."""
    tasks = list(dict.fromkeys(x["task"] for x in points))
    rows: dict[tuple[str, Any], dict[str, Any]] = {}
    for x in points:
        rows.setdefault((x["method"], x["asked"]), {})[x["task"]] = x
    return {"tasks": tasks, "rows": [list(x.values()) for x in rows.values()]}
