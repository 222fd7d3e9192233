# SPDX-License-Identifier: Apache-2.0
"""Answers to requests, each on disk with what its cache held as soon as it is there; a killed run goes on behind them.

One JSON object a line: the settings first, then an answer each. Knows no lm-eval.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelopt_dms.config.output_dir import OutputError
from modelopt_dms.evaluation.resume import differences

# Of one sequence: context and resident tokens, bytes, and so on; None where another request had the same input.
Figures = dict[str, float] | None
Key = tuple[str, str, int]


@dataclass(frozen=True)
class Entry:
    """One answer.

    Attributes:
        answer: text, or log-likelihood and whether it is the greedy continuation.
        figures: of the sequence that gave it.
    """

    answer: Any
    figures: Figures


class AnswerJournal:
    """A file of answers, by kind of request and by the request; equal requests are told apart by their order."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Read what an interrupted run has left, or begin.

        Args:
            path: the file.
            settings: all that answers depend on beside the request; JSON.

        Raises:
            OutputError: the file is of other settings, is none of ours, or its folder does not exist.
        """
        self.path = path
        self.entries: dict[Key, Entry] = {}
        self._written: Counter[tuple[str, str]] = Counter()
        head = json.dumps({"settings": settings})
        if not path.exists():
            if not path.absolute().parent.is_dir():
                raise OutputError(f"resume={path}: its folder does not exist")
            path.write_text(head + "\n", encoding="utf-8")
            return
        text = path.read_text(encoding="utf-8")
        # A kill may have cut the last line.
        whole = text[: text.rfind("\n") + 1]
        first, *lines = whole.splitlines() or [""]
        if not first.startswith('{"settings": '):
            raise OutputError(f"resume={path} exists and holds no answers of ours; move it")
        self._check(json.loads(first)["settings"], json.loads(head)["settings"])
        if whole != text:
            path.write_text(whole, encoding="utf-8")
        for line in lines:
            kind, request, answer, figures = json.loads(line)
            self._remember(kind, request, Entry(answer, figures))

    def _check(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        if differing := differences(before, now):
            raise OutputError(
                f"resume={self.path} is of a run with another {', '.join(differing)}; give the same arguments again, "
                "or name another file"
            )

    def _remember(self, kind: str, request: str, entry: Entry) -> None:
        place = (kind, request)
        self.entries[(*place, self._written[place])] = entry
        self._written[place] += 1

    def add(self, kind: str, request: Iterable[Any], entry: Entry) -> None:
        """Write an answer."""
        name = _name(request)
        self._remember(kind, name, entry)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([kind, name, entry.answer, entry.figures]) + "\n")

    def find(self, kind: str, requests: Sequence[Iterable[Any]]) -> list[Entry | None]:
        """The answers to requests, None where there is none yet."""
        seen: Counter[str] = Counter()
        found = []
        for name in map(_name, requests):
            found.append(self.entries.get((kind, name, seen[name])))
            seen[name] += 1
        return found


def answer_rest(
    known: Sequence[Entry | None], requests: Sequence[Any], run: Callable[[list[Any]], list[Any]]
) -> list[Any]:
    """Answers in the order of the requests: those that are known, and what `run` gives for all others at once."""
    rest = [x for x, entry in zip(requests, known, strict=True) if entry is None]
    new = iter(run(rest) if rest else [])
    return [next(new) if entry is None else entry.answer for entry in known]


def _name(request: Iterable[Any]) -> str:
    text = json.dumps([*request], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
