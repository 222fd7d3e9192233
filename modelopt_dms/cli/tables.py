# SPDX-License-Identifier: Apache-2.0
"""Tables on terminals of any width: no figure is ever cut."""

import os
from collections.abc import Iterator
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

_ENDLESS = 10_000


def print_table(console: Console, table: Table) -> None:
    """Print a table; without its lines, or as one paragraph a row, where it would be too wide.

    A pipe has no width, unless COLUMNS says one.
    """
    _wrap_one(table)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        _print_at(console, table, max(console.width, _widest(console, table)))
        return
    if _needed(console, table) > console.width:
        table.box = None
    if _needed(console, table) <= console.width:
        console.print(table)
        return
    for paragraph in _paragraphs(table, console.width):
        console.print(paragraph, markup=False, highlight=False, soft_wrap=True)


def _wrap_one(table: Table) -> None:
    """Let no column be wrapped but the widest that may be: rich would fold words of all of them in turns."""
    wrapped = [x for x in table.columns if not x.no_wrap]
    widest = max(wrapped, key=_width, default=None)
    for column in table.columns:
        if column is widest:
            column.overflow = "fold"
        else:
            # Without it, rich takes the longest word for what is needed.
            column.no_wrap, column.min_width = True, _width(column)


def _width(column: Column) -> int:
    return max(map(cell_len, _lines_of(column)))


def _needed(console: Console, table: Table) -> int:
    """Columns without which words or figures would be cut."""
    return Measurement.get(console, console.options.update(width=_ENDLESS), table).minimum


def _widest(console: Console, table: Table) -> int:
    return Measurement.get(console, console.options.update(width=_ENDLESS), table).maximum


def _print_at(console: Console, table: Table, width: int) -> None:
    before = console.width
    console.width = width
    try:
        console.print(table)
    finally:
        console.width = before


def _lines_of(column: Column) -> Iterator[str]:
    for cell in (column.header, *column.cells):
        yield from str(Text.from_markup(cell) if isinstance(cell, str) else cell).split("\n")


def _paragraphs(table: Table, width: int) -> Iterator[str]:
    """Title, rows and caption; a row names each of its cells."""
    if table.title is not None:
        yield f"{_plain(table.title)}\n"
    names = [_plain(x.header) for x in table.columns]
    cells = [[_plain(x) for x in column.cells] for column in table.columns]
    above = [""] * len(names)
    for row in zip(*cells, strict=True):
        # A group is named in its first row only: here every row is read by itself.
        grouped = [
            x or (y if column.justify == "left" or index == 0 else "")
            for index, (column, x, y) in enumerate(zip(table.columns, row, above, strict=True))
        ]
        above = grouped
        fields = [f"{name} {x}".strip() for name, x in zip(names, grouped, strict=True) if x]
        yield "\n".join(_lines(fields, width)) + "\n"
    if table.caption is not None:
        yield _plain(table.caption)


def _lines(fields: list[str], width: int) -> Iterator[str]:
    """Fields with commas between them, on lines that are full; only a field alone may be longer than a line."""
    line = ""
    for index, part in enumerate(fields):
        part += "," if index + 1 < len(fields) else ""
        if line and len(line) + 1 + len(part) > width:
            yield line
            line = f"  {part}"
        else:
            line = f"{line} {part}" if line else part
    yield line


def _plain(text: Any) -> str:
    found = Text.from_markup(text) if isinstance(text, str) else text
    return " ".join(str(found).split("\n")) if found is not None else ""
