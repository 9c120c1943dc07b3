"""JSON lines as other people write them: one JSON value a line, of a plain or a compressed file, read lazily.

A line ends at "\\n" and nowhere else: JSON texts may hold U+2028, U+0085 and other characters that Python takes for the
end of a line. Knows files and lines; not what a row means.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final, cast

from deepspec_core.errors import DataError

# What reading raises for a file that cannot be read, or not to its end.
UNREADABLE: Final = (OSError, EOFError, zlib.error)
_SKIPPED_BYTES: Final = 1 << 20


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(FILE:LINE, value) of every line that is not empty. DataError for what cannot be read, decoded or parsed."""
    for number, line, _ in lines_of(path):
        where = f"{path}:{number}"
        yield where, json_value(line, where)


def lines_of(path: Path, *, most_bytes: int | None = None) -> Iterator[tuple[int, bytes, int]]:
    """(number, content, bytes) of every line that is not empty. DataError where the file cannot be read.

    Of a line longer than `most_bytes` only the beginning is kept; the number of bytes is the whole line's.
    """
    number, asked = 0, -1 if most_bytes is None else most_bytes + 1
    try:
        with opened(path) as file:
            while line := file.readline(asked):
                number += 1
                size = len(line)
                if size == asked and not line.endswith(b"\n"):
                    size += _skip_line(file)
                # Files that were joined may each bring a mark.
                line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield number, line, size
    except UNREADABLE as error:
        raise DataError("A file cannot be read", where=f"{path}:{number + 1}", found=error) from error


def _skip_line(file: IO[bytes]) -> int:
    """Read to the end of the line; returns the bytes of it."""
    size = 0
    while part := file.readline(_SKIPPED_BYTES):
        size += len(part)
        if part.endswith(b"\n"):
            break
    return size


def opened(path: Path) -> IO[bytes]:
    """The file's content, decompressed as its name says."""
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import pyarrow

        # It tells a file that was cut short, which other readers of Zstandard take for whole.
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return path.open("rb")


def json_value(text: bytes, where: str, *, what: str = "A line") -> Any:
    """What JSON text says. DataError, naming `what`, for text that is not UTF-8 or not JSON."""
    try:
        # Half a surrogate pair may stand in JSON text as an escape, and then stands in what regeneration writes.
        return json.loads(text.decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError as error:
        raise DataError(f"{what} is not UTF-8 text", where=where, found=error) from error
    except ValueError as error:
        raise DataError(f"{what} is not JSON", where=where, found=error, expected="a JSON object") from error
    except RecursionError:
        raise DataError(
            f"{what} is JSON nested too deep",
            where=where,
            expected="a row of a few levels",
            fix="Remove it.",
        ) from None
