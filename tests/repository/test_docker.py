# SPDX-License-Identifier: Apache-2.0
"""What the Dockerfiles copy and run exists. That they build is not tested."""

import json
import re
from pathlib import Path

import pytest
import typer.main
from paths import ROOT

from modelopt_dms.cli import app

FILES = sorted((ROOT / "docker").glob("*.Dockerfile"))


@pytest.mark.parametrize("file", FILES, ids=lambda x: x.stem)
def test_what_an_image_copies_is_there_and_enough_for_the_wheel(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    copied = {
        x for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for x in line.split()
    }
    assert all((ROOT / x).exists() for x in copied)
    wanted = re.findall(r'^"(.+)" = "modelopt_dms/', (ROOT / "pyproject.toml").read_text(), re.M)
    assert wanted and {*wanted, "modelopt_dms", "README.md", "LICENSE"} <= copied


def test_the_image_of_serve_calls_it_with_options_that_it_has() -> None:
    text = (ROOT / "docker/serve.Dockerfile").read_text(encoding="utf-8")
    entry, words = (
        json.loads(re.search(rf"^{x} (\[.+\])$", text, re.M)[1]) for x in ("ENTRYPOINT", "CMD")
    )
    assert entry == ["modelopt-dms", "serve"]
    command = typer.main.get_command(app).commands["serve"]
    # Unknown options raise; nothing runs.
    command.make_context("serve", list(words))
