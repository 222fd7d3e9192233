# SPDX-License-Identifier: Apache-2.0
"""Standard output whose errors say that it is standard output: Python's own name no file."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from modelopt_dms.config.output_dir import OutputError


class NamedOutput:
    """A stream that raises OutputError where it cannot be written; whoever closes a pipe has enough of it."""

    def __init__(self, stream: TextIO) -> None:
        """Write to this stream."""
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As the stream's own."""
        with _naming():
            return self._stream.write(text)

    def flush(self) -> None:
        """As the stream's own."""
        with _naming():
            self._stream.flush()


@contextmanager
def named_output() -> Iterator[None]:
    """Within it, standard output is a NamedOutput; at the end all of it is written.

    Raises:
        OutputError: it cannot be written.
    """
    stream = sys.stdout
    sys.stdout = NamedOutput(stream)
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except (OutputError, BrokenPipeError) as error:
        _drop(stream)
        if isinstance(error, BrokenPipeError):
            sys.exit(1)
        raise
    finally:
        sys.stdout = stream


def _drop(stream: TextIO) -> None:
    """Have Python, which writes what is left at its end, do that to nowhere, if it could not be written."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


@contextmanager
def _naming() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"standard output cannot be written: {error.strerror}") from error
