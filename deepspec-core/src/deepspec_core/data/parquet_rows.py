"""The rows of a Parquet file, batch by batch: neither the file nor one of its row groups stands in memory whole.

Knows the format through pyarrow. Does not know what a row means.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from deepspec_core.data.source_row import SourceRow, too_long
from deepspec_core.errors import DataError

_BATCH_ROWS: Final = 64
_BUFFER_BYTES: Final = 1 << 20


def parquet_columns(path: Path) -> tuple[str, ...]:
    """The names of the columns. DataError where the file cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        return tuple(pyarrow.parquet.read_schema(path).names)
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error


def read_parquet(path: Path, *, most_bytes: int | None) -> Iterator[SourceRow]:
    """Every row, as an object of its columns. DataError where the file cannot be read.

    A row that is longer than `most_bytes`, or whose texts are not UTF-8, has an error in place of a value.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in _rows(batch, path, number, most_bytes):
                    number += 1
                    yield row
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(f"{path}: row {number + 1}", error) from error


def _rows(batch: Any, path: Path, before: int, most_bytes: int | None) -> Iterator[SourceRow]:
    """The rows of a batch, at once where none of them can be too long and all can be read."""
    if most_bytes is None or batch.nbytes <= most_bytes:
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            pass
        else:
            for number, value in enumerate(rows, start=before + 1):
                yield SourceRow(f"{path}: row {number}", value)
            return
    for index in range(batch.num_rows):
        yield _row(batch.slice(index, 1), f"{path}: row {before + index + 1}", most_bytes)


def _row(single: Any, where: str, most_bytes: int | None) -> SourceRow:
    if most_bytes is not None and single.nbytes > most_bytes:
        return SourceRow(where, error=too_long(where, single.nbytes, most_bytes))
    try:
        return SourceRow(where, single.to_pylist()[0])
    except UnicodeDecodeError as error:
        return SourceRow(where, error=DataError("A row is not UTF-8 text", where=where, found=error))


def _unreadable(where: object, error: Exception) -> DataError:
    return DataError("A Parquet file cannot be read", where=where, found=error)
