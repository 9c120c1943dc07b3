"""What a disk can take: room, whether a folder can be written, and what a full disk is called.

Knows paths and the errors of writing; not what is written there.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from safetensors import SafetensorError

from deepspec_core.errors import StageError

# No room on the disk, none in the user's quota, a file larger than files may be.
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CUT_SHORT: Final = re.compile(r"\d+ requested and \d+ written")


def is_folder(path: Path) -> bool:
    """Whether there is such a folder. A name that no file system takes (too long, with a NUL in it) is none."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Whether there is such a file. A name that no file system takes is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def sync(path: Path) -> None:
    """Make a file's content last, or of a folder the names in it. OSError where the disk refuses."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def nearest_folder(path: Path) -> Path:
    """The path itself, or the nearest of its parents that exists."""
    path = path.absolute()
    while not os.path.lexists(path):
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that `path`, which need not exist yet, would be on."""
    return shutil.disk_usage(nearest_folder(path)).free


def why_not_writable(path: Path) -> str | None:
    """Why no folder can be made or filled at `path`, None where one can. A temporary file is made there and removed."""
    there = nearest_folder(path)
    if not there.is_dir():
        return f"{there} is no folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} cannot be written to"
    # Permissions do not say it of every folder: the superuser may write anywhere, and /proc still takes no file.
    try:
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return f"{there} cannot be written to ({error.strerror})"


def refuse_folder(path: Path) -> None:
    """StageError where a folder has the name of a file of the run."""
    if path.is_dir():
        raise StageError(
            "A folder has the name of a file of the run",
            where=path,
            found="a folder",
            expected="a file of this run, or nothing",
            fix="Move it away, or choose another run.output (or cache.path).",
        )


@contextmanager
def full_disk_is_an_error(folder: Path) -> Iterator[None]:
    """StageError where something inside the block found no room to write. `folder` is where it was writing."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = no_room(error)
        if reason is None:
            raise
        raise StageError(
            "There is no room to write",
            where=folder,
            found=f"{reason}; {in_words(free_bytes(folder))} free",
            fix="Make room, and start the same command again: what a run had finished is kept.",
        ) from error


def no_room(error: BaseException) -> str | None:
    """Why nothing could be written, where that is what the error says: a full disk, quota or file. Else None."""
    if isinstance(error, OSError) and error.errno is None and _CUT_SHORT.fullmatch(str(error)):
        return "a file could be written in part only"
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno in _FULL else None
    # safetensors gives the system's error as text only, and numpy none: 4096 requested and 1000 written.
    codes = [code for code in _FULL if f"os error {code}" in str(error)]
    return os.strerror(codes[0]) if codes else None


def in_words(size: float) -> str:
    """Bytes as people say them: 1.5 GB."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = 0
    while size >= 1000 and power < len(units) - 1:
        size, power = size / 1000, power + 1
    return f"{size:,.0f} {units[power]}" if power == 0 else f"{size:,.1f} {units[power]}"
