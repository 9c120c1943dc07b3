"""Standard output that may be gone: a closed pipe ends a command quietly, a full disk with one message.

Knows streams; no command.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from deepspec_core.errors import DeepSpecError

# What a shell expects of a process that a closed pipe ended: 128 and the number of SIGPIPE.
CLOSED = 141
_LAST_STANDARD = 2


class OutputLost(DeepSpecError):
    """Standard output takes no more. `closed`: whoever read it has gone, and needs no message."""

    def __init__(self, error: OSError) -> None:
        super().__init__("The output cannot be written", where="standard output", found=error.strerror or str(error))
        self.closed = isinstance(error, BrokenPipeError)


def open_missing_streams() -> None:
    """Lead standard streams that the caller closed (`>&-`) nowhere, so that no file opened later takes their place."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= _LAST_STANDARD:
        pass
    os.close(handle)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+", encoding="utf-8"))  # noqa: SIM115 - open as long as the process


@contextmanager
def output_is_checked() -> Iterator[None]:
    """Inside the block, what cannot be written to standard output raises OutputLost."""
    before = sys.stdout
    sys.stdout = _Checked(before)
    try:
        yield
        with suppress(ValueError):  # closed meanwhile
            sys.stdout.flush()
    finally:
        sys.stdout = before


def let_go_of_output() -> None:
    """After OutputLost: what is still held back goes nowhere, so that the interpreter can end without a message."""
    with suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def say_error(text: str) -> None:
    """A line on standard error; nowhere, where that is gone too."""
    with suppress(OSError):
        click.echo(text, err=True)


class _Checked:
    """A text stream whose errors of writing are OutputLost."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> Any:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise OutputLost(error) from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise OutputLost(error) from error
