# SPDX-License-Identifier: Apache-2.0
"""Rows of a run that may be stopped: each is on disk as soon as it is there, and the same run goes on behind it."""

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from modelopt_dms.config.in_use import in_use
from modelopt_dms.config.output_dir import OutputError, is_of_model, write_json

Row = dict[str, Any]
# What a row is about; the rest of it was measured.
KEY = ("task", "category", "length", "number")


class RowStore:
    """Rows in FILE.partial until all are there, then in FILE."""

    def __init__(self, path: Path | None, settings: Row) -> None:
        """Read what an interrupted run has left.

        Args:
            path: the results file; None keeps rows in memory only.
            settings: all that the rows depend on beside KEY; JSON.

        Raises:
            OutputError: the partial file, or a finished one, is of other settings, or is none; or another process
                writes it.
        """
        self.path = path
        self._lock = ExitStack()
        if path is not None:
            # As long as there is a store: two runs would take the place of each other's rows.
            self._lock.enter_context(in_use(path))
        self.settings = json.loads(json.dumps(settings))
        self.rows: dict[tuple[Any, ...], Row] = {}
        if path is not None and path.exists():
            self._check_finished(path)
        if self.partial is not None and self.partial.exists():
            self._read(self.partial)

    @property
    def partial(self) -> Path | None:
        """Where rows are while the run lasts."""
        return None if self.path is None else self.path.with_name(f"{self.path.name}.partial")

    def _check_finished(self, path: Path) -> None:
        """Refuse to replace results that are not of these settings."""
        try:
            settings = [row["settings"] for row in json.loads(path.read_text(encoding="utf-8"))]
            differing = [x for before in settings[:1] for x in differences(before, self.settings)]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise OutputError(
                f"{path} exists and does not say which settings its results are of; choose another file, or move it"
            ) from None
        if differing:
            raise OutputError(
                f"{path} holds results of another {', '.join(differing)}; choose another file, or remove it"
            )

    def _read(self, partial: Path) -> None:
        if not partial.is_file():
            raise OutputError(f"{partial} exists and is no file; move it")
        try:
            content = json.loads(partial.read_text(encoding="utf-8"))
            before, rows = content["settings"], content["rows"]
        except (ValueError, KeyError, TypeError):
            raise OutputError(
                f"{partial} exists and is not of an interrupted run; move it"
            ) from None
        if differing := differences(before, self.settings):
            raise OutputError(
                f"{partial} is of a run with another {', '.join(differing)}; give the same command again, or remove it"
            )
        self.rows = {_key(row): row for row in rows}

    def how_to_go_on(self) -> str:
        """What an interrupted run leaves, in words."""
        if self.partial is None or not self.rows:
            return "nothing was written"
        be = "is" if len(self.rows) == 1 else "are"
        return f"{self.counted()} {be} in {self.partial}; the same command goes on"

    def counted(self) -> str:
        """What is there, in words."""
        whole = sum(row.get("number") is None for row in self.rows.values())
        parts = len(self.rows) - whole
        counted = [f"{whole} result{'s' * (whole > 1)}"] if whole else []
        if parts:
            counted.append(f"{parts} part{'s' * (parts > 1)} of the {'next' if whole else 'first'}")
        return " and ".join(counted)

    def has(self, key: Row) -> bool:
        """Whether the row about a key is there."""
        return _key(key) in self.rows

    def get(self, key: Row, measure: Callable[[], Row]) -> Row:
        """The row about a key, measured if it is not there yet."""
        place = _key(key)
        if place not in self.rows:
            self.rows[place] = {**key, **measure()}
            if self.partial is not None:
                write_json(self.partial, {"settings": self.settings, "rows": [*self.rows.values()]})
        return self.rows[place]

    def in_parts(
        self,
        key: Row,
        parts: Callable[[], Sequence[Callable[[], Row]]],
        join: Callable[[Sequence[Row]], Row],
        advance: Callable[[float], None],
    ) -> Row:
        """The row about a key, which its parts make together; each of them is on disk as soon as it is there.

        Args:
            key: what the row is about.
            parts: gives what measures each part; called only if the row is not there yet.
            join: makes the row of them.
            advance: is told the share of the row that each part was.
        """
        place = _key(key)
        if place not in self.rows:
            asked = parts()
            found = []
            for number, part in enumerate(asked):
                found.append(self.get({**key, "number": number}, part))
                advance(1.0 / len(asked))
            for number in range(len(asked)):
                del self.rows[_key({**key, "number": number})]
            self.get(key, lambda: join(found))
        return self.rows[place]

    def finish(self, rows: Sequence[Row]) -> list[Row]:
        """Write the results file; the partial one is not needed any more.

        Returns:
            The rows as they are written, each with the settings.
        """
        written = [{**row, "settings": self.settings} for row in rows]
        if self.path is not None and self.partial is not None:
            write_json(self.path, written)
            self.partial.unlink(missing_ok=True)
        self._lock.close()
        return written


def identity(place: str | Path) -> Row:
    """What tells one model or file from another without reading it: sizes and times of its files."""
    path = Path(place)
    files = sorted(path.glob("*")) if path.is_dir() else [path]
    # Results may lie beside the model.
    shown = [
        x
        for x in files
        if is_of_model(x.name) or x.suffix in (".safetensors", ".gguf") or not path.is_dir()
    ]
    stats = [x.stat() for x in shown if x.is_file()]
    return {"name": str(place), "files": [[x.st_size, x.st_mtime_ns] for x in stats]}


def differences(before: Row, now: Row) -> list[str]:
    """Settings that are not those of an earlier run, in words."""
    names = sorted(x for x in {*before, *now} if not _same(before.get(x), now.get(x)))
    return [_difference(x, before.get(x), now.get(x)) for x in names]


def _same(before: Any, now: Any) -> bool:
    """Whether a setting is what it was: one place may be named in two ways."""
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return all(map(_same, before, now))
    if isinstance(before, dict) and isinstance(now, dict) and before.get("files"):
        return bool(before["files"] == now.get("files"))
    return bool(before == now)


def _difference(name: str, before: Any, now: Any) -> str:
    """A setting that has changed, as a user knows it."""
    was, is_now = _shown(before), _shown(now)
    if was == is_now:
        return f"{name} (files of {is_now} have changed)"
    return f"{name} ({was}, now {is_now})"


def _shown(value: Any) -> str:
    """A setting without the sizes and times of files."""
    if isinstance(value, dict) and "name" in value:
        return str(value["name"])
    if isinstance(value, list):
        return ", ".join(map(_shown, value)) or "none"
    return "none" if value is None else str(value)


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEY)
