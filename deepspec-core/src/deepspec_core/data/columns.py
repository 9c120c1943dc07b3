"""Renames the columns of a source with a `columns` map to DeepSpec's names.

Knows which column is which part of a conversation. Does not know what a message may hold (messages.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from deepspec_core.config.columns import BASES
from deepspec_core.data.alpaca import asked_and_answered
from deepspec_core.data.conversations import FIELDS
from deepspec_core.data.messages import listed
from deepspec_core.errors import DataError, nearest

# Columns that rows may lack, as JSON leaves out what is empty. One of them has to have it.
_MAY_LACK: Final = ("system", "input", "tools", "id")
# Without a name of their own, these stand under ours.
_OURS: Final = ("tools", "id")
_EMPTY: Final[tuple[Any, ...]] = (None, "", [], ())


class ColumnMap:
    """The `columns` of one source. It remembers which of them it has seen in a row."""

    def __init__(self, columns: Mapping[str, str], key: str) -> None:
        """`key` is the run file's, such as data.sources[0].columns; errors name it."""
        self._columns, self._key = dict(columns), key
        self._unseen = set(columns) - {"role", "content"}

    @property
    def read(self) -> frozenset[str]:
        """The names of the columns that are read of a row. What else it has is not."""
        named = {column for name, column in self._columns.items() if name not in ("role", "content")}
        return frozenset((*named, *_OURS)) if self._columns else FIELDS

    def row(self, row: Any, where: str) -> Any:
        """A row as `messages`, `system`, `tools`, `id`.

        Raises DataError if it lacks a column, or one holds no messages.
        """
        if not self._columns or not isinstance(row, Mapping):
            return row
        columns = {name: column for name, column in self._columns.items() if name not in ("role", "content")}
        found = {name: row[column] for name, column in columns.items() if column in row}
        self._unseen -= found.keys()
        for name in columns:
            if name not in found and name not in _MAY_LACK:
                raise self._missing(name, where, row)
        kept = {name: row[name] for name in _OURS if name not in self._columns and name in row}
        given = {name: found[name] for name in (*_OURS, "system") if name in found}
        return {**kept, **given, "messages": self._messages(found, where)}

    def _messages(self, found: Mapping[str, Any], where: str) -> list[Any]:
        base = next(name for name in BASES if name in found)
        if found[base] in _EMPTY and not found.get("input"):
            raise DataError(
                "A row holds no conversation", where=where, found=f"nothing in its column {self._columns[base]!r}"
            )
        if base == "messages":
            return [self._message(item) for item in listed(found[base], self._columns[base], where)]
        if base == "turns":
            return [{"role": "user", "content": text} for text in listed(found[base], self._columns[base], where)]
        if isinstance(found[base], list | tuple):
            answer = found.get("answer")
            return [*found[base], *([{"role": "assistant", "content": answer}] if answer else [])]
        return asked_and_answered(found[base], found.get("input"), found.get("answer"))

    def _message(self, item: Any) -> Any:
        """A message with its role and its content under our names."""
        ours = {name: self._columns[name] for name in ("role", "content") if name in self._columns}
        if not isinstance(item, Mapping) or not ours:
            return item
        kept = {key: value for key, value in item.items() if key not in ours.values()}
        return {**kept, **{name: item.get(column) for name, column in ours.items()}}

    def check(self, names: tuple[str, ...] | None) -> None:
        """Raise DataError if a column is not among the names of a table's columns; None: they are not known."""
        if names is not None:
            for name, column in self._columns.items():
                if name not in ("role", "content") and column not in names:
                    raise self._missing(name, f"{self._key}.{name}", dict.fromkeys(names))

    def check_seen(self) -> None:
        """Raise DataError if no row at all had one of the columns: its name is a mistake."""
        for name in sorted(self._unseen):
            raise DataError(
                "No row has a column that `columns` names",
                where=f"{self._key}.{name}",
                found=repr(self._columns[name]),
                expected="a column of that source",
            )

    def _missing(self, name: str, where: str, row: Mapping[str, Any]) -> DataError:
        close = nearest(self._columns[name], [str(column) for column in row])
        return DataError(
            f"A row lacks the column {self._columns[name]!r}",
            where=where,
            found="columns " + ", ".join(sorted(map(str, row))),
            expected="every column that the source's `columns` names",
            fix=f"Is {close!r} meant?" if close else None,
        )
