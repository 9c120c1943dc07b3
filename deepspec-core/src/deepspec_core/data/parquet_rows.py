"""The rows of a Parquet file, read batch by batch, so that neither the file nor a whole row group is in memory.

Knows the format through pyarrow. Does not know its values (table_rows.py), or what a row means.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from deepspec_core.data.source_row import SourceRow
from deepspec_core.data.table_rows import BATCH_ROWS, columns_read, rows_of_table
from deepspec_core.errors import DataError

_BUFFER_BYTES: Final = 1 << 20


def parquet_columns(path: Path) -> tuple[str, ...]:
    """The names of the columns. Raises DataError if the file cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        return tuple(pyarrow.parquet.read_schema(path).names)
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from error


def read_parquet(path: Path, *, most_bytes: int | None, columns: Collection[str] | None) -> Iterator[SourceRow]:
    """Every row, as an object of its columns, of which only `columns` are read. Raises DataError if the file cannot be
    read.

    A row that is longer than `most_bytes`, or has a value that cannot be read, has an error in place of a value.
    """
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            names = file.schema_arrow.names
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns_read(names, columns)):
                rows = rows_of_table(batch, names, place=f"{path}: row ", before=number, most_bytes=most_bytes)
                for row in rows:
                    number += 1
                    yield row
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(f"{path}: row {number + 1}", error) from error


def _unreadable(where: object, error: Exception) -> DataError:
    return DataError("A Parquet file cannot be read", where=where, found=error)
