"""The elements of a file that holds one JSON array, one after the other: the array never stands in memory.

Elements are told apart by brackets, commas and quotes alone. So an element that is no JSON, not UTF-8 or too long does
not hide those after it. Knows bytes; not what an element means.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from deepspec_core.errors import DataError
from deepspec_core.json_lines import UNREADABLE, opened

_CHUNK_BYTES: Final = 1 << 20
_MARK: Final = re.compile(rb'["{}\[\],]')
# To the end of a text, or to a backslash at the end of a chunk.
_TEXT: Final = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_SPACE: Final = b" \t\r\n"


def is_array(path: Path) -> bool:
    """Whether the file's content begins as a JSON array. DataError where it cannot be read."""
    try:
        with opened(path) as file:
            first = True
            while chunk := file.read(_CHUNK_BYTES):
                begun = (chunk.removeprefix(codecs.BOM_UTF8) if first else chunk).lstrip(_SPACE)
                if begun:
                    return begun.startswith(b"[")
                first = False
    except UNREADABLE as error:
        raise DataError("A file cannot be read", where=path, found=error) from error
    return False


def elements_of(path: Path, *, most_bytes: int | None = None) -> Iterator[tuple[int, bytes, int]]:
    """(number from 1, content, bytes) of every element of a file that `is_array`.

    Of an element longer than `most_bytes` only the beginning is kept; the number of bytes is the whole element's.
    DataError where the file cannot be read, or is no array to its end.
    """
    number = 0
    try:
        with opened(path) as file:
            for number, (content, size) in enumerate(_elements(file, path, most_bytes), start=1):
                yield number, content, size
    except UNREADABLE as error:
        raise DataError("A file cannot be read", where=f"{path}: row {number + 1}", found=error) from error


def _elements(file: IO[bytes], path: Path, most_bytes: int | None) -> Iterator[tuple[bytes, int]]:
    kept, size, number, depth, ended = bytearray(), 0, 1, 0, False
    for piece, is_mark in _pieces(file):
        if ended:
            if piece.strip(_SPACE):
                raise DataError("There is text after a JSON array", where=path, found=repr(piece[:40]))
        elif depth == 0:
            depth = int(is_mark)
        elif is_mark and depth == 1 and piece in b",]":
            ended = piece == b"]"
            if number > 1 or not ended or kept.strip(_SPACE):
                yield bytes(kept), size
            kept, size, number = bytearray(), 0, number + 1
        else:
            if is_mark and piece in b"[{":
                depth += 1
            elif is_mark and piece in b"]}" and depth > 1:
                depth -= 1
            size += len(piece)
            kept += piece if most_bytes is None else piece[: most_bytes - len(kept)]
    if not ended:
        raise DataError("A JSON array does not end", where=f"{path}: row {number}", expected="a closing bracket")


def _pieces(file: IO[bytes]) -> Iterator[tuple[bytes, bool]]:
    """The content in pieces, each with whether it is a bracket, a brace or a comma outside of texts."""
    in_text = escaped = False
    while chunk := file.read(_CHUNK_BYTES):
        position = 0
        while position < len(chunk):
            begin = position
            if in_text:
                # The character after a backslash ends no text, whatever it is.
                found = _TEXT.match(chunk, position + escaped)
                assert found is not None, "the pattern matches an empty text"
                escaped = chunk[found.end() : found.end() + 1] == b"\\"
                in_text = escaped or found.end() == len(chunk)
                position = min(found.end() + 1, len(chunk))
                yield chunk[begin:position], False
                continue
            mark = _MARK.search(chunk, position)
            end = len(chunk) if mark is None else mark.start()
            if end > begin:
                yield chunk[begin:end], False
            if mark is not None:
                in_text = mark[0] == b'"'
                yield mark[0], not in_text
            position = end + 1
