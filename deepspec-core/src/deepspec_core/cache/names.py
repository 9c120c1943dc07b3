"""The ids of many samples in one block of memory: 4 bytes and their text each, where Python's own take about 75 more.

Knows text. Does not know samples or shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import pyarrow as pa


class Names(Sequence[str]):
    """Text by number, made of other text once. Equal to any sequence of the same text."""

    def __init__(self, names: Iterable[str]) -> None:
        """TypeError for ids that are not text, ValueError for text that UTF-8 cannot encode."""
        found = list(names)
        if not all(type(name) is str for name in found):
            raise TypeError("ids must be text")
        self._names: Any = pa.array(found, pa.string())

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> Names: ...

    def __getitem__(self, index: int | slice) -> str | Names:
        if isinstance(index, slice):
            return self._of(self._names[index])
        name: str = self._names[index].as_py()
        return name

    def __iter__(self) -> Iterator[str]:
        return (name.as_py() for name in self._names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Names({list(self)!r})"

    def tolist(self) -> list[str]:
        """All of it as Python's own."""
        names: list[str] = self._names.to_pylist()
        return names

    def take(self, numbers: Any) -> Names:
        """Those with these numbers (an array), in their order."""
        return self._of(self._names.take(pa.array(numbers)))

    @classmethod
    def _of(cls, names: Any) -> Names:
        made = cls(())
        made._names = names
        return made
