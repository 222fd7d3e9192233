# SPDX-License-Identifier: Apache-2.0
"""Bars for what takes longer than a blink: steps with the time that is left, or the time that has passed.

Nothing is shown unless somebody above asked for it: the command line, or a `progress=True`.
"""

import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")

_shown: ContextVar[bool] = ContextVar("shown", default=False)


@contextmanager
def showing(show: bool = True) -> Iterator[None]:
    """Inside, bars are shown or not, whatever is so outside."""
    before = _shown.set(show)
    try:
        yield
    finally:
        _shown.reset(before)


def steps(
    items: Iterable[T], name: str, unit: str = "step", total: int | None = None
) -> Iterable[T]:
    """The same items, under a bar with the time that is left."""
    from tqdm.auto import tqdm

    found: Iterable[T] = tqdm(items, desc=name, unit=unit, total=total, disable=not _shown.get())
    return found


class Watched(Sequence[T]):
    """A sequence that shows a bar whenever somebody goes through it."""

    def __init__(self, items: Sequence[T], name: str, unit: str) -> None:
        self.items, self.name, self.unit = items, name, unit

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __iter__(self) -> Iterator[T]:
        return iter(steps(self.items, self.name, self.unit))


@contextmanager
def phase(name: str) -> Iterator[None]:
    """A line with the seconds that something has taken so far, for what does not say how far it is.

    On terminals only: a log would get a line a second.
    """
    if not (_shown.get() and sys.stderr.isatty()):
        yield
        return
    from tqdm import tqdm

    bar = tqdm(desc=name, bar_format="{desc}: {elapsed}", file=sys.stderr)
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.5):
            bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        bar.close()
