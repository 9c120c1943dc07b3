"""How what the library logs reaches people: one line a message, on standard error. Knows no command."""

from __future__ import annotations

import logging

import click

# Libraries that tell at INFO what a user of ours did not ask.
_NOISY = ("httpx", "urllib3", "filelock", "fsspec")


class _ToStandardError(logging.Handler):
    """Asks for the stream at every message: whoever replaced it may have closed the one of before."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(self.format(record), err=True)


def show_messages() -> None:
    """Show what is logged at INFO and above; calling it again changes nothing."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[_ToStandardError()], force=True)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
