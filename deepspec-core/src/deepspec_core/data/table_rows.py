"""The rows of an Arrow table, as JSON lines of the same rows would say them.

A table gives every row the same columns and every struct the same members. What a row does not say is null there, and
values of mixed types are JSON text. Knows Arrow's types. Does not know files, datasets or what a row has to hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final

from deepspec_core.data.source_row import SourceRow, too_long
from deepspec_core.errors import DataError

# Larger batches need more memory, and gain nothing.
BATCH_ROWS: Final = 64
# The value of a column that is not read. Messages about the row still name the column.
_NOT_READ: Final = "(not read)"
# What Arrow and JSON raise for a value that Python has no place for: a date out of range, text that is not UTF-8.
_NO_VALUE: Final = (ArithmeticError, LookupError, RuntimeError, ValueError)

_Restore = Callable[[Any], Any]


def columns_read(names: Sequence[str], wanted: Collection[str] | None) -> list[str]:
    """The columns of a table that are wanted; None: all of them."""
    return [name for name in names if wanted is None or name in wanted]


def rows_of_table(
    table: Any, names: Sequence[str], *, place: str, before: int, most_bytes: int | None
) -> Iterator[SourceRow]:
    """The rows of a pyarrow table or record batch; one at a time only where a row is too long or cannot be read.

    `names` are the columns of the source. Those that the table lacks are named in each row, and not read. Rows are
    called `place` and their number; `before` come earlier. A row longer than `most_bytes`, or with a value that cannot
    be read, has an error in place of a value.
    """
    unread = {name: _NOT_READ for name in names if name not in table.schema.names}
    restore = {field.name: _restoring(field.type) for field in table.schema}

    def values(part: Any) -> list[dict[str, Any]]:
        return [{**unread, **_members(row, restore)} for row in part.to_pylist()]

    if most_bytes is None or table.nbytes <= most_bytes:
        try:
            rows = values(table)
        except _NO_VALUE:
            pass
        else:
            for number, value in enumerate(rows, start=before + 1):
                yield SourceRow(f"{place}{number}", value)
            return
    for index in range(table.num_rows):
        yield _row(table.slice(index, 1), values, f"{place}{before + index + 1}", most_bytes)


def _row(single: Any, values: Callable[[Any], list[Any]], where: str, most_bytes: int | None) -> SourceRow:
    if most_bytes is not None and single.nbytes > most_bytes:
        return SourceRow(where, error=too_long(where, single.nbytes, most_bytes))
    try:
        return SourceRow(where, values(single)[0])
    except UnicodeDecodeError as error:
        return SourceRow(where, error=DataError("A row is not UTF-8 text", where=where, found=error))
    except _NO_VALUE as error:
        return SourceRow(where, error=DataError("A row has a value that cannot be read", where=where, found=error))


def _restoring(kind: Any) -> _Restore | None:
    """What makes the value that was stored of a Python value of this Arrow type; None where it is that already."""
    import pyarrow

    if getattr(kind, "extension_name", None) == "arrow.json":
        return lambda value: None if value is None else json.loads(value)
    if pyarrow.types.is_struct(kind):
        members = {field.name: _restoring(field.type) for field in kind}
        return lambda value: None if value is None else _members(_said(value), members)
    if isinstance(kind, pyarrow.ListType | pyarrow.LargeListType | pyarrow.FixedSizeListType):
        item = _restoring(kind.value_type)
        return item and (lambda value: None if value is None else [item(one) for one in value])
    return None


def _said(struct: dict[str, Any]) -> dict[str, Any]:
    """The members that are not null: a struct has null for a member that only other rows have."""
    return {name: value for name, value in struct.items() if value is not None}


def _members(values: dict[str, Any], restore: dict[str, _Restore | None]) -> dict[str, Any]:
    return {name: value if (of := restore[name]) is None else of(value) for name, value in values.items()}
