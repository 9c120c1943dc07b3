"""Locks on folders, so that two processes never write one folder, nor write where a third one reads.

A lock is a file in the folder, held by the operating system for as long as the process lives: a killed process leaves
none behind. Knows folders and lock files; not what is in the folders.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path
from types import TracebackType
from typing import Final

from deepspec_core.errors import StageError

log = logging.getLogger("deepspec")

LOCK: Final = ".lock"
# What flock answers on file systems of clusters that are mounted without locks.
WITHOUT_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Lock:
    """A held lock. It ends with `release`, with the `with` block, or with the process."""

    def __init__(self, handle: int | None) -> None:
        self._handle = handle

    def release(self) -> None:
        """Let others have it."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.release()

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def lock(folder: Path, *, problem: str, fix: str, shared: bool = False, name: str = LOCK) -> Lock:
    """Take the lock `name` of a folder, which is made where it is missing; StageError where others hold it.

    Any number of processes may hold a `shared` lock, as long as none holds an exclusive one. A folder that this process
    can only read, without a lock file in it, gives a shared lock that holds nobody off. So does a file system without
    locks, after a warning.
    """
    path = folder / name
    try:
        if not shared:
            folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        if not shared:
            raise
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return Lock(None)
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise StageError(problem, where=folder, fix=fix) from error
    except OSError as error:
        os.close(handle)
        if error.errno not in WITHOUT_LOCKS:
            raise
        log.warning(
            "the file system of %s has no locks (%s): see to it that no other process writes there",
            folder,
            error.strerror,
        )
        return Lock(None)
    return Lock(handle)
