"""The rows of one file, by the ending of its name: JSON lines, a JSON array, or Parquet.

Knows the endings of names. Does not know datasets of several files, or what a row must hold.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from deepspec_core.data.json_array import elements_of, is_array
from deepspec_core.data.parquet_rows import read_parquet
from deepspec_core.data.source_row import MOST_BYTES, SourceRow, of_json
from deepspec_core.errors import DataError
from deepspec_core.json_lines import lines_of

PARQUET = ".parquet"
# The endings of JSON files that may hold an array. Many such files hold JSON lines instead.
_JSON = (".json", ".json.gz", ".json.zst")


def read_rows(
    path: Path, *, most_bytes: int | None = MOST_BYTES, columns: Collection[str] | None = None
) -> Iterator[SourceRow]:
    """Every row, lazily. Raises DataError if the file cannot be read. A row that cannot be read has an error of its
    own.

    Rows longer than `most_bytes` are not read. Of a table only `columns` are, if they are given.
    """
    if path.name.endswith(PARQUET):
        yield from read_parquet(path, most_bytes=most_bytes, columns=columns)
    elif not path.name.endswith(_JSON):
        yield from _lines(path, most_bytes)
    elif is_array(path):
        for each in elements_of(path, most_bytes=most_bytes):
            where = f"{path}: row {each.number}"
            row = of_json(each.content, where, size=each.size, most_bytes=most_bytes, what="A row")
            yield _broken(row, each.size) if each.broken else row
    else:
        for index, row in enumerate(_lines(path, most_bytes)):
            if index == 0 and row.error is not None:
                raise DataError(
                    "A file is neither a JSON array nor JSON lines",
                    where=path,
                    found=row.error.found,
                    expected="[{...}, {...}], or one JSON object a line",
                ) from row.error
            yield row


def _broken(row: SourceRow, size: int) -> SourceRow:
    error = DataError(
        "A row's brackets or quotes do not match",
        where=row.where,
        found=f"{size:,} bytes before the next row that begins like the others",
        expected="JSON",
    )
    return SourceRow(row.where, error=error, text=row.text)


def _lines(path: Path, most_bytes: int | None) -> Iterator[SourceRow]:
    for number, text, size in lines_of(path, most_bytes=most_bytes):
        yield of_json(text, f"{path}:{number}", size=size, most_bytes=most_bytes, what="A line")
