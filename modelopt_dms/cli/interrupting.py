# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C: what is said then, and exit code 130."""

from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperGroup

from modelopt_dms.cli.options import err

INTERRUPTED = 130
# Of the command that runs; there is one a process.
_hints: list[Callable[[], str]] = []


class Commands(TyperGroup):
    """Commands of which each says, when it is interrupted, what that means for it."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        """Run a command; typer itself would leave without a word."""
        _hints[:] = [lambda: "nothing was written"]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            line = f"\ninterrupted; {_hints[-1]()}"
            err.print(line, markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(INTERRUPTED) from None


def when_interrupted(hint: Callable[[], str]) -> None:
    """What a command says if it is interrupted from now on; asked for only then."""
    _hints.append(hint)
