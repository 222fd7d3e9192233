# SPDX-License-Identifier: Apache-2.0
"""Python source lines of the running interpreter's standard library, split into train and held out.

Needs no download: every machine that runs the project has this text, and hashing file names keeps
the two splits apart everywhere.
"""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from modelopt_dms.data.installed_text import EXCLUDED, share_of

Split = Literal["train", "held_out"]

_HELD_OUT_SHARE = 0.1
_MAX_COLUMNS = 120


def split_of(relative_path: str) -> Split:
    """The split of one file, decided by its path below the library alone."""
    return "held_out" if share_of(relative_path) < _HELD_OUT_SHARE else "train"


@cache
def source_files(split: Split) -> tuple[Path, ...]:
    """All files of one split, sorted by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return tuple(
        path
        for path in sorted(root.rglob("*.py"))
        if not (EXCLUDED - {"ensurepip"}).intersection(path.relative_to(root).parts)
        and split_of(path.relative_to(root).as_posix()) == split
    )


@cache
def _lines_of(path: Path) -> tuple[str, ...]:
    """The file's printable ASCII lines, each with its newline, runs of blank lines collapsed."""
    lines: list[str] = []
    for raw in path.read_text(encoding="utf-8", errors="ignore").split("\n"):
        line = raw.rstrip().expandtabs(4)
        if len(line) > _MAX_COLUMNS or not line.isascii() or not (line.isprintable() or not line):
            continue
        if line or (lines and lines[-1] != "\n"):
            lines.append(line + "\n")
    return tuple(lines)


def text_lines(split: Split, rng: random.Random, run: int = 200) -> Iterator[str]:
    """An endless stream: consecutive lines of one file, at most `run` of them, then another file.

    Files are drawn by size, so that every line is about equally likely.
    """
    files = source_files(split)
    sizes = [path.stat().st_size for path in files]
    while True:
        lines = _lines_of(rng.choices(files, weights=sizes)[0])
        start = rng.randrange(max(1, len(lines) - run // 2))
        yield from lines[start : start + run]
