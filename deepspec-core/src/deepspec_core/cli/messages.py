"""How what the library logs reaches people: one line a message, on standard error. Knows no command."""

from __future__ import annotations

import logging

from deepspec_core.cli.output import say_error

# Libraries that tell at INFO what a user of ours did not ask.
_NOISY = ("httpx", "httpx2", "urllib3", "filelock", "fsspec", "matplotlib")


class _ToStandardError(logging.Handler):
    """Asks for the stream at every message: whoever replaced it may have closed the one of before."""

    def emit(self, record: logging.LogRecord) -> None:
        say_error(self.format(record))


def show_messages() -> None:
    """Show what is logged at INFO and above, of a run's first process; of the others errors only.

    Calling it again changes nothing.
    """
    from deepspec_core.pipeline.workers import rank

    level = logging.INFO if rank() == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[_ToStandardError()], force=True)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
