# SPDX-License-Identifier: Apache-2.0
"""The command line, run in this process: importing ModelOpt takes ten seconds."""

import pytest

from modelopt_dms import cli


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit code of `modelopt-dms WORDS`."""
    monkeypatch.setattr("sys.argv", ["modelopt-dms", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)
