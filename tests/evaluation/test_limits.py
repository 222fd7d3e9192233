# SPDX-License-Identifier: Apache-2.0
"""Limits fail what they say, and an interrupted evaluation repeats nothing."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from modelopt_dms.config.output_dir import OutputError
from modelopt_dms.evaluation.limits import broken, parse_limits
from modelopt_dms.evaluation.resume import RowStore, identity

PROSE = {"task": "fidelity", "category": "prose", "length": 512, "metric": "kl", "value": 0.02,
         "kl_p99": 0.4, "top1": 0.96, "compression_ratio": 4.0}  # fmt: skip
CODE = {**PROSE, "category": "code", "value": 0.08}
NEEDLE = {"task": "needle", "length": 512, "metric": "accuracy", "value": 0.75}
ROWS: list[dict[str, Any]] = [PROSE, CODE, NEEDLE]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("kl>0.05", ["kl>0.05: code at 512 tokens has kl 0.08"]),
        ("prose.kl > 0.05", []),
        ("kl>=0.02", ["kl>=0.02: prose at 512 tokens has kl 0.02", "kl>=0.02: code at 512 tokens has kl 0.08"]),
        ("code.top1<0.97", ["code.top1<0.97: code at 512 tokens has top1 0.96"]),
        ("needle.accuracy<=0.75", ["needle.accuracy<=0.75: needle at 512 tokens has accuracy 0.75"]),
        ("needle.accuracy<0.75", []),
        ("kl_p99>4e-1", []),
        ("vt.accuracy<0.1", ["vt.accuracy<0.1: no result has this figure"]),
        ("kv_bytes>5", ["kv_bytes>5: no result has this figure"]),
    ],
)  # fmt: skip
def test_a_limit_is_broken_by_the_rows_for_which_it_holds(text: str, expected: list[str]) -> None:
    assert broken(parse_limits([text], fidelity=True), ROWS) == expected


def test_what_is_not_a_number_breaks_every_limit() -> None:
    rows = [{**PROSE, "value": float("nan")}]
    assert broken(parse_limits(["kl>9"], fidelity=True), rows) == [
        "kl>9: prose at 512 tokens has kl nan"
    ]


@pytest.mark.parametrize("text", ["kl", "kl>", "kl=0.5", "lk>0.5", "kl>0.5.1", "a.b.kl>>1", ""])
def test_limits_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be .*such as kl>0.05; figures are kl, kl_p95"):
        parse_limits([text], fidelity=True)


def test_a_limit_on_what_will_not_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="only --fidelity measures"):
        parse_limits(["top1<0.9"], fidelity=False)


def test_a_limit_on_a_task_that_will_not_be_measured_is_refused() -> None:
    measured = ("needle", "fidelity", "prose")
    assert parse_limits(["prose.kl>1", "needle.accuracy<1", "kl>2"], True, measured)
    with pytest.raises(
        ValueError, match="nedle will not be measured, only needle, fidelity, prose"
    ):
        parse_limits(["nedle.accuracy<1"], True, measured)


def test_rows_of_an_interrupted_run_are_not_measured_again(tmp_path: Path) -> None:
    path, ran = tmp_path / "rows.json", []

    def measure(number: int) -> dict[str, int]:
        ran.append(number)
        return {"value": number}

    keys = [{"task": x, "length": 64} for x in ("a", "b", "c")]
    first = RowStore(path, {"seed": 0})
    for number, key in enumerate(keys[:2]):
        first.get(key, lambda number=number: measure(number))  # type: ignore[misc]
    assert not path.exists()  # a file with some of the rows would look like one with all
    second = RowStore(path, {"seed": 0})
    assert [second.has(key) for key in keys] == [True, True, False]
    rows = [second.get(key, lambda: measure(7)) for key in keys]
    second.finish(rows)
    assert ran == [0, 1, 7]
    assert [x["value"] for x in json.loads(path.read_text())] == [0, 1, 7]
    assert [x.name for x in tmp_path.iterdir()] == ["rows.json"]


def test_parts_of_a_row_are_not_measured_again(tmp_path: Path) -> None:
    path, ran, shares = tmp_path / "rows.json", list[int](), list[float]()
    key, stops = {"task": "a", "length": 64}, [2]

    def part(number: int) -> dict[str, int]:
        if number in stops:
            stops.clear()
            raise RuntimeError("stopped")
        ran.append(number)
        return {"value": number}

    def parts() -> list[Any]:
        return [lambda x=x: part(x) for x in range(4)]

    def join(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {"value": sum(x["value"] for x in rows)}

    first = RowStore(path, {})
    with pytest.raises(RuntimeError):
        first.in_parts(key, parts, join, shares.append)
    assert "2 parts of the first are in" in first.how_to_go_on()
    second = RowStore(path, {})
    assert not second.has(key)
    row = second.in_parts(key, parts, join, shares.append)
    assert row == {**key, "value": 6} and ran == [0, 1, 2, 3] and shares == [0.25] * 6
    kept = json.loads((tmp_path / "rows.json.partial").read_text())["rows"]
    assert kept == [row]  # its parts are not needed any more
    assert "1 result is in" in second.how_to_go_on()
    assert second.in_parts(key, lambda: pytest.fail("made again"), join, shares.append) == row


def test_rows_of_other_settings_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    RowStore(path, {"seed": 0, "cr": None}).get({"task": "a", "length": 64}, lambda: {"value": 1})
    with pytest.raises(OutputError, match=r"rows.json.partial is of a run with another seed"):
        RowStore(path, {"seed": 1, "cr": None})
    (tmp_path / "rows.json.partial").write_text("mine")
    with pytest.raises(OutputError, match="is not of an interrupted run"):
        RowStore(path, {"seed": 1, "cr": None})
    assert RowStore(None, {}).get({"task": "a", "length": 64}, lambda: {"value": 1})["value"] == 1


def test_finished_rows_say_what_they_are_of_and_are_not_replaced_by_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    model = {"name": "a", "files": [[1, 2]]}
    store = RowStore(path, {"seed": 0, "model": model})
    store.finish([{"task": "a", "length": 64, "value": 1}])
    (row,) = before = json.loads(path.read_text())
    assert row["value"] == 1 and row["settings"] == {"seed": 0, "model": model}
    RowStore(path, {"seed": 0, "model": model}).finish(before)
    changed = model | {"files": [[1, 3]]}
    for settings, words in (
        ({"seed": 1, "model": model}, r"another seed \(0, now 1\); choose another file"),
        ({"seed": 0, "model": changed | {"name": "b"}}, r"another model \(a, now b\)"),
        ({"seed": 0, "model": changed}, r"another model \(files of a have changed\)"),
        ({"seed": 0, "model": model, "cr": 4.0}, r"another cr \(none, now 4.0\)"),
    ):
        with pytest.raises(OutputError, match=f"rows.json holds results of {words}"):
            RowStore(path, settings)
    RowStore(path, {"seed": 0, "model": model | {"name": "./a"}}).finish(before)  # the same files
    for text in ('[{"value": 1}]', '{"a": 1}', "[1]"):
        path.write_text(text)
        with pytest.raises(OutputError, match="does not say which settings"):
            RowStore(path, {"seed": 0})
        assert path.read_text() == text


def test_what_lies_where_rows_go_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "rows.json.partial").mkdir()
    with pytest.raises(OutputError, match=r"rows.json.partial exists and is no file; move it"):
        RowStore(tmp_path / "rows.json", {})


def test_results_beside_a_model_do_not_change_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = identity(tmp_path)
    (tmp_path / "rows.json").write_text("[]")
    assert identity(tmp_path) == before
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert identity(tmp_path) != before


def test_rows_that_another_run_writes_are_left_to_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    code = (
        "import sys; from pathlib import Path; from modelopt_dms.config.in_use import in_use\n"
        "with in_use(Path(sys.argv[1])): print('in', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"in\n"
        with pytest.raises(OutputError, match=f"rows.json is in use by process {other.pid}"):
            RowStore(path, {})
        other.kill()
    store = RowStore(path, {})
    store.finish([])
    assert json.loads(path.read_text()) == []
