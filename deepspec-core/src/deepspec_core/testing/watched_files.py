"""Finds files written outside a folder: in the working folder, in home, or wherever Python opens a file.

This file knows files and Python's audit events. It does not know who writes the files. Files of libraries that do not
open them through Python are seen only in the working folder and in home.
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
    """A watch over files: the empty folders that stand in for home and the working folder, and the opened files."""

    def __init__(self, place: Path) -> None:
        self.place, self.home, self.work = place, place / "home", place / "work"
        self.opened: set[Path] = set()

    def outside(self, folder: Path) -> list[str]:
        """The files that were written and still exist, except those in `folder` and caches."""
        caches = self.home / ".cache"
        seen = self.opened | {path for path in self.place.rglob("*") if path.is_file()}
        left = sorted(str(path) for path in seen if path.is_file() and path.suffix != ".pyc")
        return [path for path in left if not any(Path(path).is_relative_to(one) for one in (folder, caches))]


@contextmanager
def watched_files() -> Iterator[Watched]:
    """Within this context, home and the working folder are empty folders, and files opened for writing are recorded."""
    if not _hooked:
        # Python cannot remove an audit hook, so it is added once and stays.
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
