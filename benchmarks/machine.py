# SPDX-License-Identifier: Apache-2.0
"""Where and when figures were measured, and the files that keep them. Imports little: nothing that is measured."""

import json
import os
import platform
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "nvidia-modelopt")
RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, str]:
    """Processor, GPU if there is one, date, commit, versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": str(len(names)),
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        **_gpu(),
    }


def title(where: dict[str, str]) -> str:
    """One line for the head of a picture."""
    chip = where.get("gpu", f"{where['cpu']}, {where['cores']} cores")
    packages = ", ".join(f"{name} {where[name]}" for name in ("torch", "transformers"))
    return f"{chip}, {where['date'][:10]}, {packages}, commit {where['commit']}"


def write(path: Path, content: dict[str, Any]) -> None:
    """Write the figures so far as JSON, completely or not at all: a time limit may strike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def save(path: Path, content: dict[str, Any], draw: Callable[[Any, dict[str, Any]], None]) -> None:
    """Write the figures as JSON, and a PNG beside it.

    Args:
        path: of the JSON file.
        content: "machine" and whatever was measured.
        draw: puts the content on a matplotlib Figure.
    """
    # Imported late: it takes long, and `machine()` alone does not need it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    write(path, content)
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title(content["machine"]), fontsize=9)
    draw(figure, content)
    figure.savefig(path.with_suffix(".png"), format="png", dpi=110)


def _commit() -> str:
    """The commit; where there is no repository, what the environment's COMMIT says."""
    commit = _git("rev-parse", "--short", "HEAD")
    if not commit:
        return os.environ.get("COMMIT", "unknown")
    return commit + (" with changes" if _git("status", "--porcelain") else "")


def _git(*arguments: str) -> str:
    here = str(Path(__file__).parent)
    try:
        done = subprocess.run(("git", "-C", here, *arguments), capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _gpu() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {}
    facts = torch.cuda.get_device_properties(0)
    return {
        "gpu": facts.name,
        "gpu_gib": f"{facts.total_memory / 2**30:.1f}",
        "multiprocessors": str(facts.multi_processor_count),
        "cuda": str(torch.version.cuda),
        "triton": _version("triton"),
    }
