"""Checks the path of an answer's file, and waits until the engine has written the file.

The engine chooses the file's path, so the path is not trusted: it must be in the exchange folder, be named after the
request, and be no link. The engine holds a lock on FILE.lock while it writes. Knows paths and locks; does not know a
file's contents.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import stat
import time
from pathlib import Path
from typing import BinaryIO, Final

from deepspec_core.config.paths import no_path
from deepspec_core.errors import DataError
from deepspec_core.locks import WITHOUT_LOCKS
from deepspec_core.servers.connection import Fault, Kind, shown

LOCK_SUFFIX: Final = ".lock"
_FIRST_PAUSE: Final = 0.001
_LONGEST_PAUSE: Final = 0.05
_BOTH_SIDES: Final = "Give server and run the same folder under the same path: features.exchange, `deepspec serve`."
_NOT_THERE: Final = f"{_BOTH_SIDES} Also look at the room on the folder's disk, and at the server's log."


class BadAnswer(Fault):
    """An answer that cannot be used. `error` tells it in parts."""

    def __init__(self, problem: str, *, kind: Kind = Kind.BAD, **parts: object) -> None:
        self.error = DataError(problem, **parts)  # type: ignore[arg-type]
        super().__init__(kind, f"{problem}: {parts.get('found')} ({parts.get('where')})")


def told(value: object) -> str:
    """What a server said, for a message: anything that JSON can hold, on one line, its beginning."""
    try:
        return shown(str(value))
    except RecursionError:
        return "something nested too deeply to be shown"


def place_of(said: object, *, name: str, folder: Path) -> Path:
    """The file that a server names for the request `name`. BadAnswer where it is none of this request's.

    `folder` is the exchange folder, without links.
    """
    if not isinstance(said, str):
        raise BadAnswer(
            "A server gives no hidden states with its answer",
            kind=Kind.WRONG,
            where="kv_transfer_params.hidden_states_path",
            found=told(said),
            expected="the path of a safetensors file",
            fix="Start the server with `deepspec serve`, which turns that on.",
        )
    # With the lock's suffix: both files need a name that the file system takes. Messages need one that can be printed.
    if no_path("", said + LOCK_SUFFIX) is not None or not os.path.basename(said).isprintable():
        raise BadAnswer(
            "A server names a path that no file can have",
            kind=Kind.WRONG,
            where="kv_transfer_params.hidden_states_path",
            found=shown(said),
            expected=f"a file in {folder}",
            fix=_BOTH_SIDES,
        )
    path = Path(said)
    parent = Path(os.path.realpath(path.parent))
    if not path.is_absolute() or parent != folder:
        raise BadAnswer(
            "A server names a file outside the exchange folder",
            kind=Kind.WRONG,
            where="kv_transfer_params.hidden_states_path",
            found=shown(said),
            expected=f"a file in {folder}",
            fix=_BOTH_SIDES,
        )
    if name not in path.name:
        # Otherwise it could be another run's, and would be removed after reading.
        raise BadAnswer(
            "A server names a file that is not named after the request",
            kind=Kind.WRONG,
            where="kv_transfer_params.hidden_states_path",
            found=shown(said),
            expected=f"{name} in the file's name",
            fix="Start the server with `deepspec serve`.",
        )
    return parent / path.name


async def opened(place: Path, *, seconds: float) -> BinaryIO:
    """The file, once its engine has written it. BadAnswer where that is not so within `seconds`, or it is a link."""
    end, pause = time.monotonic() + seconds, _FIRST_PAUSE
    while True:
        file, problem = _try(place)
        if file is not None:
            return file
        if time.monotonic() >= end:
            locked = problem == "locked"
            raise BadAnswer(
                "A server has not finished its file" if locked else "A server's file is not there",
                where=place,
                found=f"{place.name}{LOCK_SUFFIX} is still locked" if locked else "no such file",
                expected=f"the file within {seconds:g} s of the answer (features.file_timeout)",
                fix="Raise features.file_timeout, or look at the server's log." if locked else _NOT_THERE,
            )
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def remove(place: Path) -> None:
    """Remove an answer's file and its lock. BadAnswer where this user may not."""
    for path in (place, place.with_name(place.name + LOCK_SUFFIX)):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _not_allowed("removed", path, error) from error


def _try(place: Path) -> tuple[BinaryIO | None, str]:
    """The file; or None and the reason."""
    lock = _open(place.with_name(place.name + LOCK_SUFFIX))
    try:
        if lock is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return None, "locked"
            except OSError as error:
                # Without locks a file that is there counts as written. A half-written one fails its checks.
                if error.errno not in WITHOUT_LOCKS:
                    raise
        handle = _open(place)
        if handle is None:
            return None, "missing"
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise _no_file(place)
        return os.fdopen(handle, "rb", buffering=0), ""
    finally:
        if lock is not None:
            os.close(lock)


def _open(path: Path) -> int | None:
    try:
        # A pipe without a writer would wait for ever.
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENXIO):
            raise _no_file(path) from error
        raise _not_allowed("read", path, error) from error


def _not_allowed(done: str, path: Path, error: OSError) -> BadAnswer:
    return BadAnswer(
        f"A server's file cannot be {done}",
        kind=Kind.WRONG,
        where=path,
        found=error.strerror,
        expected="a file that this user may read and remove",
        fix="Let server and run have the same user, or a folder and a umask that let both read and remove.",
    )


def _no_file(path: Path) -> BadAnswer:
    return BadAnswer(
        "A server names something that is no plain file",
        kind=Kind.WRONG,
        where=path,
        found="a link, a folder or a device",
        expected="a safetensors file",
        fix="Look at who else writes to the exchange folder.",
    )
