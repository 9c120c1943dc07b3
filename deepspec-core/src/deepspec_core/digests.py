"""Digests of whole files, weights and data, remembered from one start to the next.

A merged adapter may change any matrix, an edit a single row, so every byte is read: nothing less is certain. XXH3 with
128 bits reads 1 GB in 0.13 s on one core, where SHA-256 takes 0.6 s and BLAKE2b 1.2 s; with it the disk sets the pace.
It tells accidents apart, not forgeries: whoever can write the files needs none.

A digest is remembered by the file's path, and holds while size, inode, time of last modification and time of last
change are the same to the nanosecond. The time of change (ctime) is the one that nobody can set back, so an edit that
keeps the size and restores the modification time is seen too. Clocks of file systems tick: a file that changed within
two seconds before it was read may change again under the same time, and is read anew the next time.

The memory is `deepspec/digests.json` in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache), never beside the
files, whose folder may be read-only. It saves time and is never needed: a damaged one counts as empty, one that
cannot be written is done without, and of two processes that write at once the later wins.

Knows files; not what is in them.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from deepspec_core.progress import Progress

_SETTLED_SECONDS = 2.0
_BLOCK_BYTES = 1 << 22
_SHOWN_BYTES = 1 << 30
_REMEMBERED = 16384


def digests_of(
    paths: Sequence[Path], *, what: str = "read files once to tell them apart", remembered: bool = True
) -> list[str]:
    """The digest of each file's content, in hexadecimal, remembered or read. OSError where a file cannot be read.

    `what` names the work where it is long enough to be shown. Without `remembered` every file is read.
    """
    memory = _read_memory() if remembered else {}
    known = {path: _remembered(memory, path) for path in paths}
    unread = [path for path in paths if known[path] is None]
    total = sum(path.stat().st_size for path in unread)
    learnt: dict[str, list[Any]] = {}
    with Progress(total >> 20, what, "MiB", enabled=total >= _SHOWN_BYTES) as progress:
        for path in unread:
            began, before = time.time(), _state(path)
            known[path] = _digest(path, progress)
            if before == _state(path) and path.stat().st_ctime < began - _SETTLED_SECONDS:
                learnt[str(path.resolve())] = [*before, known[path]]
    if learnt:
        _remember(learnt)
    return [str(known[path]) for path in paths]


def digest_of(path: Path) -> str:
    """The digest of one file's content, read now."""
    with Progress(None, "read a file", "MiB", enabled=False) as progress:
        return _digest(path, progress)


def memory_file() -> Path:
    """Where digests are remembered."""
    # A relative path in the variable counts as none.
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (chosen if chosen.is_absolute() else Path.home() / ".cache") / "deepspec" / "digests.json"


def _digest(path: Path, progress: Progress) -> str:
    digest, buffer, size = xxhash.xxh3_128(), memoryview(bytearray(_BLOCK_BYTES)), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            progress.advance(((size + count) >> 20) - (size >> 20))
            size += count
    return digest.hexdigest()


def _state(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _remembered(memory: dict[str, Any], path: Path) -> str | None:
    match memory.get(str(path.resolve())):
        case [*state, str(digest)] if state == _state(path):
            return digest
    return None


def _read_memory() -> dict[str, Any]:
    try:
        memory = json.loads(memory_file().read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return memory if isinstance(memory, dict) else {}


def _remember(learnt: dict[str, list[Any]]) -> None:
    # Read again: another process may have written meanwhile. The newest stand last, and the oldest fall out.
    memory = {path: entry for path, entry in _read_memory().items() if path not in learnt} | learnt
    newest = dict(list(memory.items())[-_REMEMBERED:])
    path = memory_file()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(newest, file)
            os.replace(unfinished, path)
        except BaseException:
            os.unlink(unfinished)
            raise
