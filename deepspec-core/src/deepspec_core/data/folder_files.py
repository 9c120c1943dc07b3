"""Compares the files of rows in a dataset folder with those that are read from it.

Knows names of files. Does not know how `datasets` chooses among them, or what they hold.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from deepspec_core.config.schema import ROW_FILES
from deepspec_core.errors import DataError

log = logging.getLogger("deepspec")

# Files that describe a dataset and hold none of its rows.
_ABOUT: Final = (
    "config.json",
    "dataset_dict.json",
    "dataset_info.json",
    "dataset_infos.json",
    "manifest.json",
    "state.json",
)
_SHOWN: Final = 5
_told: set[tuple[str, ...]] = set()


def require_all_read(folder: Path, files: Mapping[str, Iterable[str]], split: str) -> None:
    """Raise DataError if a file of rows belongs to no split: it would be left out without a word.

    `files` are those of each split. Those of other splits are a warning, once in a process. So are those of no split
    where the folder's README.md lists its files.
    """
    of = {str(name): {os.path.abspath(path) for path in paths} for name, paths in files.items()}
    found = sorted(_row_files(folder))
    known = set().union(*of.values())
    unread = [path for path in found if path not in known]
    if unread and not _lists_its_files(folder):
        raise DataError(
            "Some files of a dataset folder would not be read",
            where=folder,
            found=_named(unread, folder),
            expected="files of one kind, whose names belong to splits: train.jsonl, or train-1.jsonl and train-2.jsonl",
            fix="Name the files one by one in data.sources, or move the files that should not be "
            "read out of the folder.",
        )
    left_out = [path for path in found if path not in of.get(split, ())]
    if left_out and (told := (str(folder), split, *left_out)) not in _told:
        _told.add(told)
        log.warning("%s: split %r is read, which does not include %s", folder, split, _named(left_out, folder))


def _row_files(folder: Path) -> Iterator[str]:
    for place, folders, names in os.walk(folder, followlinks=True):
        # As `datasets` does, hidden ones are passed over.
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in names:
            if name.endswith(ROW_FILES) and name not in _ABOUT and not name.startswith((".", "__")):
                yield os.path.abspath(os.path.join(place, name))


def _lists_its_files(folder: Path) -> bool:
    """Whether the front matter of README.md says which files belong to which split."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    front = text.split("---", 2)
    return len(front) == 3 and not front[0].strip() and "\nconfigs:" in front[1]


def _named(paths: list[str], folder: Path) -> str:
    names = [os.path.relpath(path, folder) for path in paths[:_SHOWN]]
    more = len(paths) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")
