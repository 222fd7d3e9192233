# SPDX-License-Identifier: Apache-2.0
"""What this machine has of what an engine needs, and which command installs the rest. Needs none of it."""

import importlib
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from modelopt_dms.engine.checks import NEWEST, OLDEST, version_of

HOPPER = (9, 0)
PIP = "python -m pip install"


@dataclass(frozen=True)
class Finding:
    """One thing that an engine needs.

    Attributes:
        what: it is.
        state: of it here.
        good: it is as it should be.
        fix: what to do if it is not; empty if there is nothing to do.
        needed_for: "build and run", "build", "run our plugins", "run on the CPU" or "export".
    """

    what: str
    state: str
    good: bool
    fix: str
    needed_for: str


def examine() -> list[Finding]:
    """All of it, in the order in which to mend it."""
    return [
        _python(),
        _driver(),
        _torch(),
        _gpu(),
        _tensorrt(),
        _package("onnx", "build", "'modelopt-dms[onnx]'"),
        _package("triton", "export", "triton"),
        _package("onnxruntime", "run on the CPU", "'modelopt-dms[onnx]'"),
    ]


def _python() -> Finding:
    good = sys.version_info >= (3, 10)
    fix = "" if good else "install Python 3.10 or newer"
    return Finding("Python", platform.python_version(), good, fix, "build and run")


def _driver() -> Finding:
    """NVIDIA's driver, as nvidia-smi sees it."""
    fix = "install NVIDIA's driver, version 580 or newer for CUDA 13"
    command = shutil.which("nvidia-smi")
    if command is None:
        return Finding("NVIDIA driver", "no nvidia-smi", False, fix, "build and run")
    asked = [command, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return Finding("NVIDIA driver", f"nvidia-smi fails: {error}", False, fix, "build and run")
    lines = answer.stdout.strip().splitlines() or ["no GPU"]
    good = lines != ["no GPU"]
    return Finding("NVIDIA driver", "; ".join(lines), good, "" if good else fix, "build and run")


def _torch() -> Finding:
    torch, why = _import("torch")
    fix = f"{PIP} torch"
    if torch is None:
        return Finding("torch", why, False, fix, "build and run")
    cuda = torch.version.cuda
    state = f"{torch.__version__}, CUDA {cuda}" if cuda else f"{torch.__version__}, without CUDA"
    fix = "" if cuda else f"{PIP} torch  (a CUDA build: see pytorch.org for the index of yours)"
    return Finding("torch", state, cuda is not None, fix, "build and run")


def _gpu() -> Finding:
    what = "GPU of compute capability 9.0"
    torch, _ = _import("torch")
    if torch is None or not torch.cuda.is_available():
        fix = "run on a machine with an H100 or H200"
        return Finding(what, "no GPU visible to torch", False, fix, "build and run")
    capability = torch.cuda.get_device_capability(0)
    state = f"{torch.cuda.get_device_name(0)}, {capability[0]}.{capability[1]}"
    good = tuple(capability) == HOPPER
    if not good:
        state += ": runs plugin-free engines only"
        fix = "use an H100 or H200, or here the engines of `modelopt-dms export --format tensorrt --plugin-free`"
        return Finding(what, state, False, fix, "run our plugins")
    return Finding(what, state, True, "", "build and run")


def _tensorrt() -> Finding:
    what = f"TensorRT {OLDEST[0]}.{OLDEST[1]} .. {NEWEST[0]}.x"
    fix = f"{PIP} 'tensorrt-cu13>=10.10,<12'"
    module, why = _import("tensorrt")
    if module is None:
        return Finding(what, why, False, fix, "build and run")
    good = OLDEST <= version_of(module.__version__) <= NEWEST
    return Finding(what, module.__version__, good, "" if good else fix, "build and run")


def _package(name: str, needed_for: str, install: str) -> Finding:
    """A package that only has to be there."""
    try:
        return Finding(name, version(name), True, "", needed_for)
    except PackageNotFoundError:
        return Finding(name, "not installed", False, f"{PIP} {install}", needed_for)


def _import(name: str, load: Callable[[str], Any] = importlib.import_module) -> tuple[Any, str]:
    """A module, or None and why: libraries that lack a library of the system fail in many ways."""
    try:
        return load(name), ""
    except ModuleNotFoundError as error:
        missing = "not installed" if error.name == name else f"broken: {error}"
        return None, missing
    except Exception as error:
        return None, f"broken: {error}"
