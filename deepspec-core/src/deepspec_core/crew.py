"""What the workers of one run tell each other while they share a stage: values, progress, and that one has failed.

Everything goes through one key-value store that all workers reach. Results go to files, which are the stages' own.
Nobody waits in a collective operation, because a stage may take days. A thread of every worker gives signs of life and
watches for failures, so that no worker waits for one that is gone. Knows no stage, and no launcher.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol

from deepspec_core.errors import DeepSpecError, StageError
from deepspec_core.progress import Progress

# The sum of these is how long a worker may go on after another one was killed: less than a minute.
SILENCE_SECONDS: Final = 20.0
SECONDS_TO_NOTICE: Final = 10.0
SECONDS_TO_END: Final = 10.0
_BEAT_SECONDS: Final = 1.0
_POLL_SECONDS: Final = 0.1
# Shared file systems may show a new file this late on other machines.
_VISIBLE_SECONDS: Final = 60.0
_FAILURE: Final = "failure"
# What PyTorch's backends say where a process at the other end is gone.
_COLLECTIVE: Final = re.compile(r"gloo|NCCL|Connection (closed|reset)|remote process exited", re.IGNORECASE)


class Store(Protocol):
    """What a crew needs of a key-value store. torch.distributed.TCPStore is one."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


class Crew:
    """The workers of a run, seen from one of them. The first has rank 0.

    Names of values are told once in a run. Every method raises StageError where another worker has failed.
    """

    def __init__(self, *, rank: int = 0, count: int = 1, store: Store | None = None) -> None:
        assert count == 1 or store is not None, "several workers need a store"
        self.rank, self.count, self._store = rank, count, store
        self._figures: dict[str, float] = {}
        self._of_others: dict[int, dict[str, float]] = {}
        self._trouble: StageError | None = None

    @property
    def first(self) -> bool:
        """Whether this worker is the first one, which merges and reports."""
        return self.rank == 0

    def share(self, items: list[Any]) -> list[Any]:
        """This worker's share of what is to be done: every count-th."""
        return items[self.rank :: self.count]

    def check(self) -> None:
        """StageError where another worker has failed, or gives no sign of life."""
        if self._trouble is not None:
            raise self._trouble

    def told_by_first(self, name: str, value: Any = None) -> Any:
        """What the first worker gives, in JSON types. The others give nothing, and wait for it."""
        if self.first:
            self._tell(name, value)
            return value
        return self._told(name, 0)

    def gather(self, name: str, value: Any, *, meanwhile: Callable[[], None] = lambda: None) -> list[Any]:
        """What each worker gives, by rank, in JSON types. Returns when all have given theirs.

        `meanwhile` is called now and then while others are waited for.
        """
        self._tell(name, value)
        return [value if rank == self.rank else self._told(name, rank, meanwhile) for rank in range(self.count)]

    def post(self, name: str, value: float) -> None:
        """Let the others see a figure of this worker's, a second later or so."""
        self._figures[name] = value

    def total(self, name: str) -> float:
        """The sum of a figure over all workers, as far as this one knows. Only the first one sees the others'."""
        others = sum(figures.get(name, 0) for figures in list(self._of_others.values()))
        return self._figures.get(name, 0) + others

    def by_rank(self, name: str) -> list[float]:
        """The figure of each worker, as far as this one knows. Only the first one sees the others'."""
        return [
            (self._figures if rank == self.rank else self._of_others.get(rank, {})).get(name, 0.0)
            for rank in range(self.count)
        ]

    @contextmanager
    def progress(
        self,
        total: int | None,
        what: str,
        unit: str,
        *,
        done: int = 0,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Iterator[SharedProgress]:
        """Progress of all workers together, shown by the first. `done` is what an earlier run finished.

        A worker leaves the block when all have done their work in it; `meanwhile` is called now and then.
        """

        def waiting() -> None:
            meanwhile()
            progress.refresh()

        with Progress(total, what, unit, done=done, enabled=self.first) as shown:
            self.post(what, 0)
            progress = SharedProgress(self, shown, done)
            yield progress
            progress.end(self.gather(f"done: {what}", progress.own, meanwhile=waiting))

    def require_shared(self, folder: Path) -> None:
        """StageError where `folder` of this worker is another one than that of the first."""
        if self.count == 1:
            return
        token = folder / f".seen-by-workers-{os.urandom(8).hex()}"
        if self.first:
            folder.mkdir(parents=True, exist_ok=True)
            token.touch()
        name = self.told_by_first(f"token {folder.name}", token.name)
        try:
            if not appears(folder / name):
                raise StageError(
                    f"Worker {self.rank} does not see the files of the first worker",
                    where=folder,
                    expected="one folder for all workers, on a file system that all their machines share",
                    fix="Put run.output (and cache.path) on a shared file system, or use the workers of one machine.",
                )
            self.gather(f"seen {folder.name}", True)
        finally:
            if self.first:
                token.unlink(missing_ok=True)

    def require_seen(self, path: Path, size: int = 0) -> None:
        """StageError where this worker does not see what another one wrote: a file of at least so many bytes."""
        if not appears(path, size=size):
            raise StageError(
                f"Worker {self.rank} does not see what another worker wrote",
                where=path,
                found=f"{path.stat().st_size:,} bytes" if path.exists() else "nothing",
                expected="a folder on a file system that all machines share",
            )

    def _tell(self, name: str, value: Any) -> None:
        if self._store is not None:
            with self._reaching():
                self._store.set(f"{self.rank}/{name}", json.dumps(value))

    def _told(self, name: str, rank: int, meanwhile: Callable[[], None] = lambda: None) -> Any:
        assert self._store is not None, "there are others"
        key = f"{rank}/{name}"
        while True:
            self.check()
            with self._reaching():
                if self._store.check([key]):
                    return json.loads(self._store.get(key))
            meanwhile()
            time.sleep(_POLL_SECONDS)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch.distributed.DistError, which is not imported here
            self.check()
            raise _unreachable(self, error) from error

    def fail(self, error: BaseException) -> None:
        """Tell the others that this worker ends by `error`, unless one of them was earlier."""
        if self._store is None or error is self._trouble:
            return
        # Who was asked to stop ends well; the others were asked too, and may still be saving what they have.
        asked = isinstance(error, KeyboardInterrupt)
        text = error.problem if isinstance(error, DeepSpecError) else f"{type(error).__name__}: {error}"
        found = "it was asked to stop" if asked else text
        try:
            self._store.compare_set(_FAILURE, "", json.dumps({"rank": self.rank, "found": found, "asked": asked}))
        except RuntimeError:
            return  # nobody can be told

    def cause_of(self, error: BaseException) -> BaseException:
        """What ended this worker: `error`, or the failure of another one, which broke an operation of all of them.

        Such an operation ends at once where a process is gone, and it takes a while until it is known which.
        """
        if self._store is None or not isinstance(error, RuntimeError) or _COLLECTIVE.search(str(error)) is None:
            return error
        until = time.monotonic() + SILENCE_SECONDS + SECONDS_TO_NOTICE
        while self._trouble is None and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
        return self._trouble or error

    def watch(self, store: Store) -> Watch:
        """Begin to give signs of life, over a connection of the thread's own."""
        return Watch(self, store)

    def notice(self, trouble: StageError) -> None:
        """From now on, `check` raises this."""
        self._trouble = trouble

    def figures(self) -> dict[str, float]:
        """What this worker has posted."""
        return dict(self._figures)

    def keep(self, rank: int, figures: dict[str, float]) -> None:
        """Remember what another worker has posted."""
        self._of_others[rank] = figures


ALONE: Final = Crew()


class SharedProgress:
    """What `Crew.progress` gives. `own` is what this worker has done."""

    def __init__(self, crew: Crew, shown: Progress, before: int) -> None:
        self._crew, self._shown, self._before, self.own = crew, shown, before, 0

    def advance(self, n: int = 1, **figures: float) -> None:
        """This worker has done n more units. `figures` are shown until replaced."""
        self.own += n
        self._crew.post(self._shown.what, self.own)
        self.refresh(**figures)

    def refresh(self, **figures: float) -> None:
        """Show what the others have done meanwhile."""
        total = self._before + int(self._crew.total(self._shown.what))
        self._shown.advance(total - self._shown.done, **figures)

    def end(self, done: list[int]) -> None:
        """Show what each worker has done in the end."""
        self._shown.advance(self._before + sum(done) - self._shown.done)


class Watch:
    """The thread that gives signs of life and looks for those of others: the first looks at all, the others at it."""

    def __init__(self, crew: Crew, store: Store) -> None:
        self._crew, self._store = crew, store
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._noticed: float | None = None
        self._asked, self._trouble = False, ""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop watching; others may leave from now on."""
        self._over.set()
        # A store that does not answer holds nobody up.
        self._thread.join(timeout=_BEAT_SECONDS * 3)

    def _run(self) -> None:
        beat = 0
        while not self._over.wait(_BEAT_SECONDS):
            beat += 1
            try:
                trouble, asked = self._look(beat)
            except RuntimeError as error:
                trouble, asked = _unreachable(self._crew, error), False
            if trouble is not None and self._noticed is None and not self._over.is_set():
                self._crew.notice(trouble)
                self._trouble = str(trouble)
                self._noticed = float("inf") if asked else time.monotonic()
            if self._noticed is not None:
                self._insist(time.monotonic() - self._noticed)

    def _look(self, beat: int) -> tuple[StageError | None, bool]:
        crew, store = self._crew, self._store
        store.set(f"alive/{crew.rank}", json.dumps([beat, crew.figures()]))
        if store.check([_FAILURE]):
            failure = json.loads(store.get(_FAILURE))
            return _failed(failure["rank"], crew, failure["found"]), failure["asked"]
        for rank in range(1, crew.count) if crew.first else (0,):
            sign = store.get(f"alive/{rank}") if store.check([f"alive/{rank}"]) else b""
            before, since = self._seen.get(rank, (None, 0.0))
            if sign != before:
                self._seen[rank] = (sign, time.monotonic())
                if sign:
                    crew.keep(rank, json.loads(sign)[1])
            elif time.monotonic() - since > SILENCE_SECONDS:
                found = f"no sign of life for {SILENCE_SECONDS:.0f} seconds: it was killed, or its machine is gone"
                failure = {"rank": rank, "found": found, "asked": False}
                store.compare_set(_FAILURE, "", json.dumps(failure))
                return _failed(rank, crew, found), False
        return None, False

    def _insist(self, seconds: float) -> None:
        """The main thread may be in an operation that never returns: it is asked to stop, then ended."""
        if seconds > SECONDS_TO_NOTICE + SECONDS_TO_END:
            sys.stderr.write(f"{self._trouble}\n")
            sys.stderr.flush()
            os._exit(1)
        if seconds > SECONDS_TO_NOTICE and not self._asked:
            self._asked = True
            os.kill(os.getpid(), signal.SIGTERM)


def appears(path: Path, *, size: int = 0) -> bool:
    """Whether a file that another worker has written, of `size` bytes at least, is seen here within some time."""
    until = time.monotonic() + _VISIBLE_SECONDS
    while True:
        try:
            if path.stat().st_size >= size:
                return True
        except OSError:
            pass
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_SECONDS)


def _failed(rank: int, crew: Crew, found: str) -> StageError:
    return StageError(
        f"Worker {rank} of {crew.count} ended, so worker {crew.rank} ends too",
        where=f"worker {rank} (the first is worker 0)",
        found=found,
        fix="See to that, then run again: what is finished is kept.",
    )


def _unreachable(crew: Crew, error: Exception) -> StageError:
    return StageError(
        "The workers of this run cannot reach each other any more",
        where=f"worker {crew.rank} of {crew.count}",
        found=str(error).splitlines()[0] if str(error) else type(error).__name__,
        fix="The launcher or the first worker is gone. Run again: what is finished is kept.",
    )
