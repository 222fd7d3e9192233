# SPDX-License-Identifier: Apache-2.0
"""Two processes on one directory, and disks that are full: one error each."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modelopt_dms.config.in_use import in_use
from modelopt_dms.config.output_dir import OutputError, atomic_dir, write_json, writing

HOLD = """
import sys, time
from pathlib import Path
from modelopt_dms.config.in_use import in_use
with in_use(Path(sys.argv[1])):
    print("in", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_told_which_one_uses_a_directory(tmp_path: Path) -> None:
    target = tmp_path / "out"
    command = [sys.executable, "-c", HOLD, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"in\n"
        with pytest.raises(OutputError, match=f"is in use by process {other.pid};"), in_use(target):
            pass
        with pytest.raises(OutputError, match="in use"), atomic_dir(target):
            pass
        other.kill()
    # A dead process holds nothing, and one process may enter twice.
    with in_use(target), in_use(target):
        pass
    with in_use(tmp_path / "another"), in_use(target):
        pass


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with (
            pytest.raises(OutputError, match=r"out cannot be written: .*"),
            atomic_dir(tmp_path / "out") as place,
        ):
            save_file({"x": torch.zeros(100_000)}, place / "model.safetensors")
        with pytest.raises(OutputError, match="cannot be written"), writing(tmp_path):
            torch.save(torch.zeros(100_000), tmp_path / "optimizer.pt")
        with pytest.raises(OutputError, match="No space left"), writing(tmp_path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rows = tmp_path / "rows.json"
        write_json(rows, [1])
        with pytest.raises(OutputError, match=r"rows\.json cannot be written: .*File too large"):
            write_json(rows, ["x" * 100_000])
        assert rows.read_text() == "[\n  1\n]\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["optimizer.pt", "rows.json"]
