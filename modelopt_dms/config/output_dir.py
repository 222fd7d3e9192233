# SPDX-License-Identifier: Apache-2.0
"""Output directories: nothing of the user's is lost, and what is written is complete or not a model yet.

A directory is ours if it holds our marker file, which `own` writes; only what lies in such a directory is ever removed,
and only by names that we give to what we write.
"""

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modelopt_dms.config.in_use import OutputError as OutputError
from modelopt_dms.config.in_use import in_use

MARKER = ".modelopt_dms"
# A disk is full, a quota is reached, a file is too large.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PARTIAL = f"{MARKER}.partial"
STAGING_DIR = ".staging"
# What an interrupted `compress` may leave in its output directory, and the next one goes on from.
CALIBRATION_DIR, RETROFIT_DIR = "calibration", "retrofit"
# The last files to be moved, without which there is no result yet, and what they make of a directory.
LAST = {"config.json": "a model", "dms_engine.json": "exported graphs"}
# JSON files that are parts of models, whoever wrote them: results never take their place.
_OF_MODELS = (
    *LAST,
    *("generation_config.json", "hf_quant_config.json", "adapter_config.json", "dms_summary.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"),
    *("added_tokens.json", "preprocessor_config.json", "processor_config.json"),
)


def check_output(output_dir: str | Path, ours: tuple[str, ...] = ()) -> Path:
    """The output directory, if a run can start or go on there without losing anything.

    Args:
        output_dir: need not exist.
        ours: names of directories that an interrupted run may have left in it.

    Raises:
        OutputError: it is a file, holds something else or a finished model, or cannot be written.
    """
    target = Path(output_dir)
    if target.exists() and not target.is_dir():
        raise OutputError(f"output_dir={target} is a file; expected a directory")
    if (why := unwritable(target)) is not None:
        raise OutputError(f"output_dir={target} cannot be written: {why}")
    present = {x.name for x in target.iterdir()} if target.exists() else set()
    for name in present & LAST.keys():
        raise OutputError(
            f"output_dir={target} already holds {LAST[name]}; choose another directory or remove it"
        )
    # A run that was stopped while it moved its files here has left their names in the staging directory.
    moved = {Path(x).parts[0] for x in _files_of(target / STAGING_DIR)}
    foreign = sorted(present - {*ours, *moved, STAGING_DIR})
    if foreign:
        raise OutputError(
            f"output_dir={target} holds files that are not ours ({', '.join(foreign[:3])}); choose an empty directory"
        )
    for name in sorted(present & {*ours, STAGING_DIR}):
        check_owned(target / name)
    return target


def unwritable(target: Path) -> str | None:
    """Why nothing can be made in a directory, or in the nearest one above that exists, found by trying; or None."""
    directory = next(x for x in (target, *target.absolute().parents) if x.exists())
    if not directory.is_dir():
        return f"{directory} is not a directory"
    if not os.access(directory, os.W_OK | os.X_OK):
        return f"{directory} is read-only"
    try:
        # Permissions do not tell: /proc says that root may write there. On Linux this file never has a name.
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        return f"nothing can be made in {directory} ({error.strerror})"
    return None


def check_owned(directory: Path) -> None:
    """Refuse a directory that holds something and not our marker.

    Raises:
        OutputError: see above, or it is a file.
    """
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise OutputError(f"{directory} is no directory of ours; choose another output or move it")
    if not directory.exists() or (directory / MARKER).is_file():
        return
    held = sorted(x.name for x in directory.iterdir() if x.name != _PARTIAL)
    if held:
        raise OutputError(
            f"{directory} holds files that are not ours ({', '.join(held[:3])}); choose another output or move them"
        )


def own(directory: Path) -> Path:
    """Make a directory, or take an empty one, and mark it as ours.

    Raises:
        OutputError: it holds something already and is not marked.
    """
    check_owned(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / MARKER).is_file():
        _mark(directory, [])
    return directory


def remove(directory: Path, names: Iterable[str]) -> None:
    """Remove from a directory of ours what we wrote there; the directory too if nothing else is in it.

    Args:
        directory: if it is not there or not marked, nothing happens.
        names: patterns of file and directory names that we write there.
    """
    if directory.is_symlink() or not (directory / MARKER).is_file():
        return
    found = {x for name in names for x in directory.glob(name)}
    # The marker last: whenever this is stopped, what is left is known as ours.
    for path in sorted(found, key=lambda x: x.name == MARKER):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if {x.name for x in directory.iterdir()} <= {MARKER}:
        (directory / MARKER).unlink(missing_ok=True)
        directory.rmdir()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file under, which then takes its place; an error leaves what was there.

    Directories that are not there are made. A process that is killed while it writes leaves the other file, `.NAME.`
    and eight letters, which nothing reads.

    Raises:
        OutputError: the disk is full.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A name that nobody has: a file of the user's may bear any that we would choose.
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            share(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def is_of_model(name: str) -> bool:
    """Whether a file of this name is a part of a model and not results, going by JSON files."""
    return name in _OF_MODELS or name.endswith(".index.json")


def check_writable(path: Path) -> None:
    """Refuse a file that nobody can put there: what is made of missing directories counts as there.

    Raises:
        OutputError: the nearest directory above it cannot be written.
    """
    if (why := unwritable(path.absolute().parent)) is not None:
        raise OutputError(f"{path} cannot be written: {why}")


def share(path: Path) -> None:
    """Let those read and write a file whom the umask lets.

    mkstemp makes files that only their owner reads; so does safetensors (0.8), which writes another file first.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode | (0o666 & ~mask) != mode:
        path.chmod(mode | (0o666 & ~mask))


def check_results_file(path: Path) -> None:
    """Refuse to write results over something else, or where nothing can be written.

    Raises:
        OutputError: the file exists and holds no JSON or a part of a model, or its directory cannot be written.
    """
    check_writable(path)
    if not path.exists():
        return
    if is_of_model(path.name):
        raise OutputError(f"{path} is a part of a model; choose another file")
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise OutputError(f"{path} exists and holds no results; choose another file") from None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file completely or not at all."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn what safetensors and torch raise where a disk is full, which is no OSError, into one error.

    Raises:
        OutputError: the place cannot be written.
    """
    try:
        yield
    except Exception as error:
        kind, text = type(error).__name__, " ".join(str(error).split())
        full = isinstance(error, OSError) and error.errno in _FULL
        # torch.save's writer of archives, whose own errors say where in its source they come from.
        archive = any(x in text for x in ("PytorchStreamWriter", "inline_container.cc"))
        if full or archive or kind == "SafetensorError":
            raise OutputError(f"{place} cannot be written: {text}") from error
        raise


@contextmanager
def atomic_dir(target: Path) -> Iterator[Path]:
    """A directory to write a model into; when all is written, its files move to `target`. An error leaves no trace.

    Raises:
        OutputError: the staging directory there is not ours.
    """
    existed = target.exists()
    staging = target / STAGING_DIR
    check_owned(staging)
    _remove_interrupted(target)
    try:
        with writing(target):
            own(staging)
            with in_use(target):
                yield staging
            files = sorted(
                str(x.relative_to(staging))
                for x in staging.rglob("*")
                if x.is_file() and x.name not in (MARKER, _PARTIAL)
            )
            for name in files:
                share(staging / name)
            _mark(staging, files)
    except BaseException:  # Ctrl-C too
        _discard(staging)
        if not existed and target.exists() and not any(target.iterdir()):
            target.rmdir()
        raise
    # Without the last ones the directory is not a model, and the next run starts over.
    for name in sorted(files, key=lambda x: x in LAST):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, target / name)
    _discard(staging)


def _remove_interrupted(target: Path) -> None:
    """Remove what a run that was stopped in the middle of its moves has written, by the names in its marker."""
    staging = target / STAGING_DIR
    for name in _files_of(staging):
        path = target / name
        path.unlink(missing_ok=True)
        for parent in path.parents:
            if parent == target or not parent.is_dir() or any(parent.iterdir()):
                break
            parent.rmdir()
    _discard(staging)


def _discard(directory: Path) -> None:
    """Remove a directory of ours as far as that can be done, its marker last: until then it is known as ours."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != MARKER:
            path.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


def _mark(directory: Path, files: list[str]) -> None:
    content = {"written_by": "modelopt_dms", "files": files}
    partial = directory / _PARTIAL
    partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
    os.replace(partial, directory / MARKER)


def _files_of(directory: Path) -> list[str]:
    """Names of files that the marker of a directory lists; none if it is not ours."""
    try:
        files = json.loads((directory / MARKER).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    # Never out of the directory, whatever the file says.
    return [x for x in files if isinstance(x, str) and not {"..", "/"} & {*Path(x).parts}]
