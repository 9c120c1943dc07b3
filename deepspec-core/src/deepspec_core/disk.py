"""What a disk can take: room, and whether a folder can be written. Knows paths; not what is written there."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path


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


def in_words(size: float) -> str:
    """Bytes as people say them: 1.5 GB."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = 0
    while size >= 1000 and power < len(units) - 1:
        size, power = size / 1000, power + 1
    return f"{size:,.0f} {units[power]}" if power == 0 else f"{size:,.1f} {units[power]}"
