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
from typing import IO, Any, cast

from deepspec_core.errors import DataError


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(FILE:LINE, value) of every line that is not empty. DataError for what cannot be read, decoded or parsed."""
    number = 0
    try:
        with _opened(path) as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    where = f"{path}:{number}"
                    yield where, _value(line, where)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError("A file cannot be read", where=f"{path}:{number + 1}", found=error) from error


def _opened(path: Path) -> IO[bytes]:
    """The file's content, decompressed as its name says."""
    if path.suffix == ".gz":
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import pyarrow

        # It tells a file that was cut short, which other readers of Zstandard take for whole.
        return io.BufferedReader(pyarrow.input_stream(path, compression="zstd"))
    return path.open("rb")


def _value(line: bytes, where: str) -> Any:
    try:
        # Half a surrogate pair may stand in JSON text as an escape, and then stands in what regeneration writes.
        return json.loads(line.decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError as error:
        raise DataError("A line is not UTF-8 text", where=where, found=error) from error
    except ValueError as error:
        raise DataError("A line is not JSON", where=where, found=error, expected="one JSON object a line") from error
    except RecursionError:
        raise DataError(
            "A line is JSON nested too deep", where=where, expected="a row of a few levels", fix="Remove that line."
        ) from None
