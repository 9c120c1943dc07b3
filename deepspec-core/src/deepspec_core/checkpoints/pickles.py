"""Whether a file holds a pickle, which may run any code when it is loaded. Nothing is unpickled to find out.

Knows pickles of every protocol, NumPy's arrays of objects, and archives and compressed files with one of them in it. Of
a file that is none it reads the beginning only, whatever the size. Does not know who wrote the file.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import pickle
import pickletools
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Final, cast

import numpy as np

_COMPRESSED: Final[dict[bytes, Callable[[Any], Any]]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
_NUMPY: Final = b"\x93NUMPY"
# A line of a pickle is a number or a name; text without an end of line is not read to its end.
_LINE: Final = 2**20
_FRAMED: Final = (4, 5)
_LARGEST_FRAME: Final = 2**40
# What readers of damaged or foreign content raise.
_NOT_SO: Final = (
    ValueError, IndexError, KeyError, EOFError, OSError, OverflowError, MemoryError, RuntimeError, NotImplementedError,
    zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip


def holds_pickle(path: Path) -> bool:
    """Whether the file is a pickle, or an archive or a compressed file of one."""
    with path.open("rb") as file:
        if _is_pickle(file):
            return True
    return zipfile.is_zipfile(path) and any(_members(path))


def _members(path: Path) -> Iterator[bool]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            yield member.filename.endswith((".pkl", ".pickle"))
            try:
                with archive.open(member) as content:
                    yield _is_pickle(content)
            except _NOT_SO:  # damaged or encrypted: nothing can be loaded from it
                continue


def _is_pickle(file: IO[bytes]) -> bool:
    head = file.read(16)
    file.seek(0)
    for magic, opened in _COMPRESSED.items():
        if head.startswith(magic):
            try:
                with opened(file) as content:
                    return _is_pickle(content)
            except _NOT_SO:
                return False
    if head.startswith(_NUMPY):
        return _has_objects(file)
    return _is_framed(head) or _parses(file)


def _has_objects(file: IO[bytes]) -> bool:
    """Whether a .npy file is an array of objects, which NumPy pickles."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return bool(read(file)[2].hasobject)
    except _NOT_SO:
        return False


def _is_framed(head: bytes) -> bool:
    """Whether it begins as Python's own pickles do. What follows need not parse: some libraries put arrays between."""
    framed = head[:1] == pickle.PROTO and head[1:2] in [bytes([one]) for one in _FRAMED] and head[2:3] == pickle.FRAME
    return framed and 0 < int.from_bytes(head[3:11], "little") < _LARGEST_FRAME


def _parses(file: IO[bytes]) -> bool:
    """Whether it is a pickle's program up to its STOP, with a stack that fits: text may begin with the same letters."""
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bytes that look like a text's escapes
            pickletools.dis(cast(IO[bytes], _Lines(file)), out=nowhere)
        return True
    except _NOT_SO:
        return False


class _Lines:
    """A file whose lines are read up to a length."""

    def __init__(self, file: IO[bytes]) -> None:
        self.read, self.tell, self._file = file.read, file.tell, file

    def readline(self) -> bytes:
        return self._file.readline(_LINE)
