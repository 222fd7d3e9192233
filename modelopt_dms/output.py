# SPDX-License-Identifier: Apache-2.0
"""Output directories: refused if something would be lost, and filled so that they are complete or not a model yet."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STAGING_DIR = ".staging"
LAST = ("config.json", "dms_engine.json")


class OutputError(ValueError):
    """An output directory that cannot be written to without losing something."""


def check_output(output_dir: str | Path, ours: tuple[str, ...] = ()) -> Path:
    """The output directory, if a run can start or go on there without losing anything.

    Args:
        output_dir: need not exist.
        ours: names that an interrupted run may have left in it.

    Raises:
        OutputError: it is a file, holds something else or a finished model, or cannot be written.
    """
    target = Path(output_dir)
    if target.exists() and not target.is_dir():
        raise OutputError(f"output_dir={target} is a file; expected a directory")
    nearest = next(x for x in (target, *target.absolute().parents) if x.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"output_dir={target} cannot be written: {nearest} is read-only")
    present = {x.name for x in target.iterdir()} if target.exists() else set()
    if "config.json" in present:
        raise OutputError(
            f"output_dir={target} already holds a model; choose another directory or remove it"
        )
    foreign = sorted(present - set(ours))
    # A run that was stopped while it moved its files here has left the rest of them in staging.
    if foreign and STAGING_DIR not in present:
        raise OutputError(
            f"output_dir={target} holds files that are not ours ({', '.join(foreign[:3])}); choose an empty directory"
        )
    return target


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file under, which then takes its place; an error leaves what was there."""
    temporary = path.with_name(f".{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A directory to write a model into; when all is written, its files move to `target`. An error leaves no trace."""
    existed = target.exists()
    staging = target / STAGING_DIR
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
    except Exception:
        shutil.rmtree(staging if existed else target)
        raise
    # Without the last ones the directory is not a model, and the next run starts over.
    for path in sorted(staging.iterdir(), key=lambda x: x.name in LAST):
        place = target / path.name
        # Of an interrupted run; a directory is not replaced by another one unless it is empty.
        if place.is_dir() and not place.is_symlink():
            shutil.rmtree(place)
        os.replace(path, place)
    staging.rmdir()
