"""Writes status.json in a run's folder while the run works: signs of life, the stage, and its progress.

The first worker's process has a thread that writes the file every few seconds, atomically. It takes progress and
warnings from where stages report them anyway. run_status.py reads the file. Knows no stage.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from attrs import asdict, field, frozen

from deepspec_core import progress
from deepspec_core.errors import DeepSpecError
from deepspec_core.pipeline import workers

log = logging.getLogger("deepspec")

STATUS: Final = "status.json"
VERSION: Final = 1
BEAT_SECONDS: Final = 5.0
_MOST_WARNINGS: Final = 20
_MOST_LETTERS: Final = 500
_PROC: Final = Path("/proc")

_beating: Heartbeat | None = None


@frozen(kw_only=True)
class Process:
    """A process, identified so that a later process with its number, or one elsewhere, is not taken for it."""

    host: str = field(factory=socket.gethostname)
    boot: str
    numbers: str
    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process with this number here; None if there is none. What a system does not tell is empty."""
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            pass  # another user's
        # After the name, which may hold anything: state is the first, the start in clock ticks the 20th.
        status = _text(_PROC / str(pid) / "stat").rpartition(")")[2].split()
        if status[:1] in (["Z"], ["X"]):
            return None
        started = status[19] if len(status) > 19 else ""
        return cls(boot=_text(_PROC / "sys/kernel/random/boot_id"), numbers=_numbers(), pid=pid, started=started)

    @property
    def is_here(self) -> bool:
        """Whether it runs on this machine and in this PID namespace."""
        return (self.host, self.boot, self.numbers) == (
            socket.gethostname(),
            _text(_PROC / "sys/kernel/random/boot_id"),
            _numbers(),
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _numbers() -> str:
    try:
        return os.readlink(_PROC / "self/ns/pid")
    except OSError:
        return ""


class _Warnings(logging.Handler):
    """Keeps the newest warnings, and counts all of them."""

    def __init__(self) -> None:
        super().__init__(level=logging.WARNING)
        self.count = 0
        self.newest: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1
        text = record.getMessage()[:_MOST_LETTERS]
        self.newest = [*self.newest, {"time": record.created, "text": text}][-_MOST_WARNINGS:]


class Heartbeat:
    """The state of a run and the thread that writes it. `stages` are those that this process is going to do."""

    def __init__(self, folder: Path, stages: Sequence[str]) -> None:
        self._path = folder / STATUS
        self._warnings = _Warnings()
        self._over, self._lock = threading.Event(), threading.Lock()
        self._seen: tuple[str, int] | None = None
        self._unwritten = False
        process = Process.of(os.getpid())
        assert process is not None, "this process is there"
        began = time.time()
        self._state: dict[str, Any] = {
            "version": VERSION,
            "state": "running",
            "process": asdict(process),
            "workers": workers.count(),
            "stages": list(stages),
            "stage": None,
            "began": began,
            "stage_began": None,
            "moved": began,
            "error": None,
        }

    def __enter__(self) -> Heartbeat:
        log.addHandler(self._warnings)
        self._write()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        return self

    def enter(self, stage: str) -> None:
        """Report that a stage begins."""
        now = time.time()
        with self._lock:
            self._state |= {"stage": stage, "stage_began": now, "moved": now}
        self._write()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join(timeout=BEAT_SECONDS)  # a file system that hangs holds nobody up
        log.removeHandler(self._warnings)
        with self._lock:
            self._state["state"] = "finished" if error is None else "stopped" if _asked(error) else "failed"
            if error is not None:
                text = error.problem if isinstance(error, DeepSpecError) else f"{type(error).__name__}: {error}"
                self._state["error"] = text[:_MOST_LETTERS]
        self._write()

    def _run(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            self._write()

    def _write(self) -> None:
        with self._lock:
            self._state |= {
                "beat": time.time(),
                "progress": self._progress() if self._state["state"] == "running" else None,
                "warnings": {"count": self._warnings.count, "newest": self._warnings.newest},
            }
            partial = self._path.with_name(f"{STATUS}.partial")
            try:
                partial.write_text(json.dumps(self._state, indent=1) + "\n", encoding="utf-8")
                os.replace(partial, self._path)
            except OSError as error:
                unwritten, self._unwritten = self._unwritten, True
                if not unwritten:
                    log.warning(
                        "%s cannot be written (%s): `deepspec status` will show an old state", self._path, error
                    )

    def _progress(self) -> dict[str, Any] | None:
        shown = progress.now()
        if shown is None:
            return None
        if self._seen != (shown.what, shown.done):
            self._seen = (shown.what, shown.done)
            self._state["moved"] = time.time()
        crew = workers.crew()
        return {
            "what": shown.what,
            "done": shown.done,
            "total": shown.total,
            "unit": shown.unit,
            "rate": shown.rate,
            "seconds_left": shown.seconds_left,
            "figures": dict(shown.figures),
            "done_by_worker": crew.by_rank(shown.what) if crew.count > 1 and any(crew.by_rank(shown.what)) else [],
        }


def _asked(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt)


@contextmanager
def beating(folder: Path, stages: Sequence[str]) -> Iterator[None]:
    """Write signs of life within this context; none if there is nothing to do."""
    global _beating
    if not stages:
        yield
        return
    with Heartbeat(folder, stages) as _beating:
        try:
            yield
        finally:
            _beating = None


def enter(stage: str) -> None:
    """Report that this process's run begins a stage."""
    if _beating is not None:
        _beating.enter(stage)
