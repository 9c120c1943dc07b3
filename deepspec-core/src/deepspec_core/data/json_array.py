"""The elements of a file that holds one JSON array, one after the other, without the whole array in memory.

Elements are separated by brackets, commas and quotes only, so an element that is not JSON, not UTF-8 or too long does
not affect those after it. If brackets or quotes do not match, reading continues at the next object that begins with the
same key as other elements. Knows bytes; does not know what an element means.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from attrs import frozen

from deepspec_core.errors import DataError
from deepspec_core.json_lines import UNREADABLE, opened

_CHUNK_BYTES: Final = 1 << 20
_MARK: Final = re.compile(rb'["{}\[\],]')
# To the end of a text, or to a backslash at the end of a chunk.
_TEXT: Final = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_SPACE: Final = b" \t\r\n"
# Kinds of pieces.
_BRACKET, _TEXT_BEGINS, _TEXT_GOES_ON, _OTHER = range(4)
_OPENED_BY: Final = {b"]": b"[", b"}": b"{"}
# What stands before a bracket that opens, by the bracket around it; before a text; and after one.
_BEFORE_OPENING: Final = {b"[": b"[,", b"{": b":"}
_BEFORE_TEXT: Final = b"[{,:"
_AFTER_TEXT: Final = b",:]}"
_FIRST_KEY: Final = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*("[^"\\]{0,200}")[ \t\r\n]*:')
# Where objects within a row begin, and where they do in a text of which nobody knows how deep it lies: a row follows
# neither a bracket nor a colon there. The brace of the first may be what is missing.
_INNER: Final = re.compile(rb'[\[:,][ \t\r\n]*\{[ \t\r\n]*("[^"\\]{0,200}")[ \t\r\n]*:')
_SURELY_INNER: Final = re.compile(rb'[\[:][ \t\r\n]*\{?[ \t\r\n]*("[^"\\]{0,200}")[ \t\r\n]*:')
_PERHAPS_A_ROW: Final = re.compile(rb'[,}][ \t\r\n]*\{[ \t\r\n]*("[^"\\]{0,200}")[ \t\r\n]*:')
_MOST_KEYS: Final = 64
# Longer than the beginning of an element up to its first key.
_OVERLAP: Final = 4096
# A broken element that is so many times as long as any before it may hide others.
_TOO_MUCH: Final = 4


@frozen
class Element:
    """`content` is the beginning of it, of `size` bytes. `broken`: its brackets, commas or quotes do not match."""

    number: int
    content: bytes
    size: int
    broken: bool = False


def is_array(path: Path) -> bool:
    """Whether the file's content begins as a JSON array. Raises DataError if it cannot be read."""
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


def elements_of(path: Path, *, most_bytes: int | None = None) -> Iterator[Element]:
    """Every element of a file that `is_array`, numbered from 1; of one longer than `most_bytes` only the beginning.

    Raises DataError if the file cannot be read, is no array to its end, or has a broken element that may hide others.
    """
    number = 0
    try:
        with opened(path) as file:
            for element in _elements(_Pieces(file), path, most_bytes):
                number = element.number
                yield element
    except UNREADABLE as error:
        raise DataError("A file cannot be read", where=f"{path}: row {number + 1}", found=error) from error


def _elements(pieces: _Pieces, path: Path, most_bytes: int | None) -> Iterator[Element]:
    kept, size, number, longest = bytearray(), 0, 1, 0
    keys: set[bytes] = set()  # first keys of elements
    inner: set[bytes] = set()  # and of the objects within them
    around: list[bytes] = []  # the brackets that are open
    before = b""  # the last byte that is no space
    text_at = 0  # where the last text begins
    broken_row = 0
    ended = False

    def keep(piece: bytes) -> None:
        nonlocal size, kept
        size += len(piece)
        kept += piece if most_bytes is None else piece[: max(most_bytes - len(kept), 0)]

    for piece, kind in pieces:
        if kind == _TEXT_GOES_ON and around and not ended:
            keep(piece)
            before = b'"'
            continue
        if ended:
            if piece.strip(_SPACE):
                if broken_row:
                    raise _hidden(path, broken_row, "the brackets after it do not match either")
                raise DataError("There is text after a JSON array", where=path, found=repr(piece[:40]))
            continue
        if not around:
            if kind == _BRACKET:
                around, before = [b"["], b"["
            continue
        alone = len(around) == 1
        # Between two elements a comma may be missing: both are there.
        divided = alone and piece in (b"{", b"[") and kind == _BRACKET and before not in b"[,"
        if (alone and kind == _BRACKET and piece in b",]") or divided:
            ended = piece == b"]"
            if number > 1 or not ended or kept.strip(_SPACE):
                longest = max(longest, size)
                if len(keys) < _MOST_KEYS and (key := _FIRST_KEY.match(kept)):
                    keys.add(key[1])
                if len(inner) < _MOST_KEYS:
                    inner.update(_INNER.findall(kept))
                yield Element(number, bytes(kept), size)
            kept, size, number, before, text_at = bytearray(), 0, number + 1, b",", 0
            if not divided:
                continue
        if kind == _TEXT_BEGINS and _fits(piece, kind, around[-1], before):
            text_at = size
        keep(piece)
        if _fits(piece, kind, around[-1], before) and not (alone and piece == b"}" and kind == _BRACKET):
            if kind == _BRACKET and piece in b"[{":
                around.append(piece)
            elif kind == _BRACKET and piece in b"]}":
                around.pop()
            before = piece.rstrip(_SPACE)[-1:] or before
            continue
        if key := _FIRST_KEY.match(kept):
            keys.add(key[1])
        inner.update(_INNER.findall(kept), _SURELY_INNER.findall(kept))
        if not keys:
            raise _hidden(path, number, "no row before it says how rows begin")
        # A text whose end is missing has taken the beginning of the next row.
        again = bytes(kept[text_at:]) if len(kept) == size else b""
        size -= len(again)
        del kept[size:]
        for passed in pieces.passed_over(again, keys):
            keep(passed)
        if rows := pieces.perhaps_rows - pieces.inner - inner:
            found = f"objects after it that begin with {b', '.join(sorted(rows))[:120].decode(errors='replace')}"
            raise _hidden(path, number, found)
        if longest and size > _TOO_MUCH * longest:
            found = f"{size:,} bytes up to the next row that begins like others; no row before has over {longest:,}"
            raise _hidden(path, number, found)
        if not pieces.found:
            if not pieces.last.rstrip(_SPACE).endswith(b"]"):
                break
            ended = True
        yield Element(number, bytes(kept), size, broken=True)
        broken_row, around, before = number, [b"["], b","
        kept, size, number, text_at = bytearray(), 0, number + 1, 0
    if not ended:
        raise DataError("A JSON array does not end", where=f"{path}: row {number}", expected="a closing bracket")


def _fits(piece: bytes, kind: int, around: bytes, before: bytes) -> bool:
    """Whether the piece may stand after the byte `before` within this bracket. Words and numbers are not looked at."""
    if before == b'"' and (first := piece.lstrip(_SPACE)[:1]) and first not in _AFTER_TEXT:
        return False
    if kind == _TEXT_BEGINS:
        return before in _BEFORE_TEXT
    if kind != _BRACKET or piece == b",":
        return True
    return before in _BEFORE_OPENING[around] if piece in b"[{" else _OPENED_BY[piece] == around


def _hidden(path: Path, number: int, found: str) -> DataError:
    return DataError(
        "A row's brackets or quotes do not match, so that it may contain other rows",
        where=f"{path}: row {number}",
        found=found,
        expected="rows whose brackets, commas and quotes match",
        fix="Repair the row, or write the file as JSON lines, in which a broken row affects no other row.",
    )


class _Pieces:
    """The content in pieces, each with its kind. Between two pieces the reader may have text passed over.

    `found`: whether what was looked for last was found; `last`: the last bytes of the file, where not. `perhaps_rows`,
    `inner`: the first keys of objects in the text that was passed over, which may be rows, or cannot be.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._chunk, self._position = b"", 0
        self._in_text = self._escaped = False
        self.found, self.last = False, b""
        self.perhaps_rows: set[bytes] = set()
        self.inner: set[bytes] = set()

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        while True:
            if self._position >= len(self._chunk):
                self._chunk, self._position = self._file.read(_CHUNK_BYTES), 0
                if not self._chunk:
                    return
            chunk, begin = self._chunk, self._position
            if self._in_text:
                # The character after a backslash ends no text, whatever it is.
                found = _TEXT.match(chunk, begin + self._escaped)
                assert found is not None, "the pattern matches an empty text"
                self._escaped = chunk[found.end() : found.end() + 1] == b"\\"
                self._in_text = self._escaped or found.end() == len(chunk)
                self._position = min(found.end() + 1, len(chunk))
                yield chunk[begin : self._position], _TEXT_GOES_ON
                continue
            mark = _MARK.search(chunk, begin)
            end = len(chunk) if mark is None else mark.start()
            if end > begin:
                self._position = end
                yield chunk[begin:end], _OTHER
            elif mark is not None:
                self._position, self._in_text = end + 1, mark[0] == b'"'
                yield mark[0], _TEXT_BEGINS if self._in_text else _BRACKET

    def passed_over(self, again: bytes, keys: set[bytes]) -> Iterator[bytes]:
        """The text, from what is read `again`, up to the next comma before an object that begins with one of the keys.

        `found` tells whether there is one. A text of JSON holds no bare quote, so this is no part of one,
        whatever was broken before.
        """
        begins = re.compile(rb",[ \t\r\n]*\{[ \t\r\n]*(?:" + b"|".join(map(re.escape, sorted(keys))) + rb")[ \t\r\n]*:")
        rest = again + self._chunk[self._position :]
        self._in_text = self._escaped = self.found = False
        self.perhaps_rows, self.inner = set(), set()
        while (match := begins.search(rest)) is None:
            self._look_at(rest)
            more = self._file.read(max(_CHUNK_BYTES, _OVERLAP))
            if not more:
                self._chunk, self._position, self.last = b"", 0, rest
                yield rest
                return
            yield rest[:-_OVERLAP]
            rest = rest[-_OVERLAP:] + more
        self._chunk, self._position, self.found = rest, match.start() + 1, True
        self._look_at(rest[: match.start()])
        yield rest[: match.start()]

    def _look_at(self, passed: bytes) -> None:
        self.perhaps_rows.update(_PERHAPS_A_ROW.findall(passed))
        self.inner.update(_SURELY_INNER.findall(passed))
