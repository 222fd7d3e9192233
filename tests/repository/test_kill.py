# SPDX-License-Identifier: Apache-2.0
"""A few kills of the commands that write: `tools/kill.py` has the rest, and docs/reliability.md how many were run."""

import os
import subprocess
import sys

import pytest
from paths import ROOT


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="commands run in forks")
def test_what_a_killed_command_leaves_goes_on_or_is_whole() -> None:
    """In a process of its own: forks of one that has computed with threads may hang."""
    command = [sys.executable, "tools/kill.py", "--kills", "12", "--seed", "1", "--commands"]
    command += ["calibrate", "retrofit", "export hf", "eval", "report", "traces", "fetch"]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "'kills'" in done.stdout
