# SPDX-License-Identifier: Apache-2.0
"""Commands on a disk that is full: one clear line, nothing half-written, what was there is there. Mounts a tmpfs."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import run

SETTINGS = (
    "dms={window: 16, target_cr: 2}",
    "calibrate={samples: 2, sample_length: 128, held_out: 2, batch_size: 1, save_steps: 1, curve: [2]}",
)
SET = [word for change in SETTINGS for word in ("--set", change)]
COMPRESS = ["compress", "embedded", "-r", "tiny_cpu", *SET, "--no-report"]
FITTED = [*COMPRESS, "--set", "retrofit=null"]
# A page with plotly.js in it is larger than this; so are the weights of the embedded model.
SIZE = 24 << 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("full") / "model"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *FITTED, "-o", target) == 0
    return target


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, small."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path, room: int) -> None:
    """Leave so many bytes of a disk."""
    with (disk / "filler").open("wb") as file:
        file.write(b"\0" * (shutil.disk_usage(disk).free - room))


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command has said before it gave up."""
    said = " ".join(capsys.readouterr().err.split())
    # Once: what safetensors says of its own has an "I/O error:", too.
    assert "Traceback" not in said and said.replace("I/O error:", "").count("error:") == 1
    assert "cannot be written" in said or "No space left" in said
    return said


def left(disk: Path) -> list[str]:
    return sorted(str(x.relative_to(disk)) for x in disk.rglob("*") if x.name != "filler")


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 100_000, 2_000_000])
def test_directories_are_written_whole_or_not_at_all(
    room: int, disk: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    fill(disk, room)
    # The sums of the calibration stay: with more room the same command goes on from them.
    kept = ("out/calibration", "out/retrofit")
    for words in (
        [*FITTED, "-o", disk / "out"],
        ["export", model, "-o", disk / "export"],
        ["export", model, "--format", "onnx", "--chunk", 16, "-o", disk / "onnx"],
        ["tune", model, "--length", 128, "--count", 2, "-o", disk / "tuned"],
    ):
        assert run(monkeypatch, *words) == 1
        assert str(disk) in refused(capsys)
        assert [x for x in left(disk) if x != "out" and not x.startswith(kept)] == []
    (disk / "filler").unlink()
    assert run(monkeypatch, *FITTED, "-o", disk / "out") == 0
    for name in ("model.safetensors", "config.json"):
        assert (disk / "out" / name).read_bytes() == (model / name).read_bytes()


@pytest.mark.slow
def test_a_retrofit_goes_on_when_there_is_room_again(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    retrofit = "retrofit={steps: 3, sequence_length: 128, batch_size: 1, save_steps: 1, kl_chunk_tokens: 128}"
    words = [*COMPRESS, "--set", retrofit]
    assert run(monkeypatch, *words, "-o", tmp_path / "whole") == 0
    capsys.readouterr()
    fill(disk, 600_000)
    assert run(monkeypatch, *words, "-o", disk / "out") == 1
    refused(capsys)
    assert not (disk / "out" / "config.json").exists()
    (disk / "filler").unlink()
    assert run(monkeypatch, *words, "-o", disk / "out") == 0
    weights = [(x / "model.safetensors").read_bytes() for x in (disk / "out", tmp_path / "whole")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_files_are_replaced_whole_or_not_at_all(
    disk: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, rows, traces = disk / "page.html", disk / "rows.json", disk / "traces.jsonl"
    report = ["report", model, "-o", page, "--length", 256, "--count", 0, "--new-tokens", 0]
    report += ["--ratios", "2"]
    score = ["eval", model, "--tasks", "recall", "--lengths", 128, "--count", 1, "--json", rows]
    prompts = disk / "prompts.jsonl"
    prompts.write_text('{"text": "one is"}\n')
    write = ["traces", "embedded", "--prompts", prompts, "--max-new-tokens", 4, "-o", traces]
    assert run(monkeypatch, *report) == 0
    assert run(monkeypatch, *score) == 0
    before = {x: x.read_bytes() for x in (page, rows)}
    fill(disk, 0)
    capsys.readouterr()
    for words in (report, score, write):
        assert run(monkeypatch, *words) == 1
        refused(capsys)
    assert {x: x.read_bytes() for x in before} == before
    assert not traces.exists()
    (disk / "filler").unlink()
    for words in (report, score, write):
        assert run(monkeypatch, *words) == 0
    assert not [x for x in left(disk) if x.startswith(".") or x.endswith(".partial")]
