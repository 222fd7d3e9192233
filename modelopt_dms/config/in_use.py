# SPDX-License-Identifier: Apache-2.0
"""One process at a time writes into a directory: the second is told which one does."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out
    fcntl = None  # type: ignore[assignment]


class OutputError(ValueError):
    """An output directory that cannot be written to without losing something."""


# What this process has locked already: what it calls may lock it again.
_held: set[Path] = set()


@contextmanager
def in_use(directory: Path) -> Iterator[None]:
    """Inside, no other process of this machine can enter for the same directory; a dead process holds nothing.

    The lock is a file among the temporary ones, so that the directory itself holds nothing but results.

    Raises:
        OutputError: another process is inside; names it.
    """
    target = directory.absolute().resolve()
    if fcntl is None or target in _held:
        yield
        return
    with _opened(_file_of(target)) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(20).strip() or "of another user"
            raise OutputError(
                f"{directory} is in use by process {holder}; wait for it, or choose another output"
            ) from None
        file.truncate(0)
        # Who it is can be said on a disk with room only; that nobody else enters holds on a full one, too.
        with suppress(OSError):
            os.write(file.fileno(), f"{os.getpid()}\n".encode())
        _held.add(target)
        try:
            yield
        finally:
            _held.discard(target)


def _opened(path: Path) -> IO[str]:
    try:
        return path.open("a+")
    except OSError as error:
        raise OutputError(
            f"{path}, which keeps other processes out of a directory, cannot be written: {error}"
        ) from error


def _file_of(target: Path) -> Path:
    name = hashlib.sha256(os.fsencode(target)).hexdigest()[:20]
    user = os.getuid() if hasattr(os, "getuid") else 0
    place = Path(tempfile.gettempdir()) / f"modelopt_dms-{user}"
    place.mkdir(mode=0o700, exist_ok=True)
    return place / f"{name}.lock"
