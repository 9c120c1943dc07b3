"""Being asked to stop: by Ctrl-C (SIGINT), or by the signal that schedulers send before they end a job (SIGTERM).

Knows signals; not what is to be finished before a process stops. Only the main thread of a process can be asked.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Final

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
# What shells add to the number of the signal that ended a process.
_BY_SIGNAL: Final = 128
_SAME_REQUEST_SECONDS: Final = 2.0


class Stopped(KeyboardInterrupt):
    """A signal asked this process to stop; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


class StopRequest:
    """Inside the block a signal asks to stop, and whoever works there stops at a good moment.

    A second one stops at once, by Stopped. A SIGTERM that follows within two seconds is the same request.
    """

    number: int | None = None
    _since: float = 0.0

    @property
    def asked(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    def check(self) -> None:
        """Stopped, where a signal came."""
        if self.number is not None:
            raise Stopped(self.number)

    def __enter__(self) -> StopRequest:
        self._own = threading.current_thread() is threading.main_thread()
        if self._own:
            self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._own:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.asked:
            # A scheduler signals every process, and the process that started a worker passes its own signal on.
            if number == signal.SIGTERM and time.monotonic() - self._since < _SAME_REQUEST_SECONDS:
                return
            raise Stopped(number)
        self.number, self._since = number, time.monotonic()


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Inside the block SIGTERM raises Stopped, as Ctrl-C raises KeyboardInterrupt. A handler that is there stays.

    Whatever else the block raises after a SIGTERM follows from it: an import that was cut short may end in any error.
    """
    own = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    came: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        raise Stopped(number)

    if own:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except Exception as error:
        if came:
            raise Stopped(came[0]) from error
        raise
    finally:
        if own:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def exit_code(error: BaseException) -> int:
    """What a shell expects of a process that a signal ended: 130 after Ctrl-C, 143 after SIGTERM."""
    for reason in (error, error.__cause__):
        if isinstance(reason, Stopped):
            return _BY_SIGNAL + reason.number
    return _BY_SIGNAL + signal.SIGINT
