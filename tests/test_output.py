# SPDX-License-Identifier: Apache-2.0
"""Output directories that a run was stopped in while it moved its files there."""

import os
from pathlib import Path

import pytest

from modelopt_dms import output
from modelopt_dms.output import OutputError, check_output, staged

FILES = ("a.txt", "kernels/one.ptx", "kernels/two.ptx", "dms_engine.json")


def write(target: Path, text: str) -> None:
    with staged(check_output(target)) as place:
        (place / "kernels").mkdir()
        for name in FILES:
            (place / name).write_text(text)


def content(target: Path) -> dict[str, str]:
    return {str(x.relative_to(target)): x.read_text() for x in target.rglob("*") if x.is_file()}


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_an_interrupted_run_can_be_done_again(
    moved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, replace, done = tmp_path / "out", os.replace, 0

    def stop(source: Path, place: Path) -> None:
        nonlocal done
        if done == moved:
            raise KeyboardInterrupt
        replace(source, place)
        done += 1

    with monkeypatch.context() as patch:
        patch.setattr(output.os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            write(target, "first")
    (target / "kernels").mkdir(exist_ok=True)
    (target / "kernels" / "of the first run.ptx").write_text("first")
    write(target, "second")
    assert content(target) == dict.fromkeys(FILES, "second")


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    write(tmp_path / "out", "first")
    with pytest.raises(OutputError, match="not ours"):
        write(tmp_path / "out", "second")
    assert content(tmp_path / "out") == dict.fromkeys(FILES, "first")
