"""Shows the library's log messages to users: one line per message, on standard error. Knows no command."""

from __future__ import annotations

import logging

from deepspec_core.cli.output import say_error

# Libraries whose INFO messages do not concern our users.
_NOISY = ("httpx", "httpx2", "urllib3", "filelock", "fsspec", "matplotlib")


class _ToStandardError(logging.Handler):
    """Looks up the stream for every message, because the stream may have been replaced and the old one closed."""

    def emit(self, record: logging.LogRecord) -> None:
        say_error(self.format(record))


def show_messages() -> None:
    """Show messages at INFO and above from a run's first process, and errors only from the others.

    Calling it again changes nothing.
    """
    from deepspec_core.pipeline.workers import rank

    level = logging.INFO if rank() == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[_ToStandardError()], force=True)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
