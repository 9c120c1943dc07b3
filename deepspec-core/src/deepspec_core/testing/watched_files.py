"""What is written outside a folder: into the working folder, into home, or wherever Python opens a file.

Knows files and Python's audit events. Does not know who writes them. Libraries that open files without Python are seen
in the working folder and in home alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR
_watching: list[Watched] = []
_hooked: list[bool] = []


class Watched:
    """While files are watched: the empty folders that are home and the working folder, and what was opened."""

    def __init__(self, place: Path) -> None:
        self.place, self.home, self.work = place, place / "home", place / "work"
        self.opened: set[Path] = set()

    def outside(self, folder: Path) -> list[str]:
        """The files that were written and are still there, but for those in `folder`. Caches are no part of them."""
        caches = self.home / ".cache"
        seen = self.opened | {path for path in self.place.rglob("*") if path.is_file()}
        left = sorted(str(path) for path in seen if path.is_file() and path.suffix != ".pyc")
        return [path for path in left if not any(Path(path).is_relative_to(one) for one in (folder, caches))]


@contextmanager
def watched_files() -> Iterator[Watched]:
    """Home and the working folder are empty folders, until the end, and files that are opened for writing are noted."""
    if not _hooked:
        # A hook stays as long as the process.
        sys.addaudithook(_note)
        _hooked.append(True)
    before, home = Path.cwd(), os.environ.get("HOME")
    with TemporaryDirectory() as folder:
        watched = Watched(Path(folder).resolve())
        watched.home.mkdir()
        watched.work.mkdir()
        os.chdir(watched.work)
        os.environ["HOME"] = str(watched.home)
        _watching.append(watched)
        try:
            yield watched
        finally:
            _watching.remove(watched)
            os.chdir(before)
            if home is None:
                del os.environ["HOME"]
            else:
                os.environ["HOME"] = home


def _note(event: str, given: tuple[Any, ...]) -> None:
    if _watching and event == "open" and given[2] & _WRITES and not isinstance(given[0], int):
        path = Path(os.path.abspath(os.fsdecode(given[0])))
        for watched in _watching:
            watched.opened.add(path)
