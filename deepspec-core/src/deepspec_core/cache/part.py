"""Reading some of a cache's samples. Knows readers; not which samples are wanted, nor storage formats."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from deepspec_core.contracts.cache import CacheReader
from deepspec_core.contracts.draft import Sample


class SomeSamples:
    """contracts.cache.CacheReader over the samples of another one that have these numbers."""

    def __init__(self, reader: CacheReader, numbers: Iterable[int]) -> None:
        self._reader = reader
        self._numbers: np.ndarray[Any, np.dtype[np.int64]] = np.array(numbers, dtype=np.int64)
        self.header = reader.header

    def __len__(self) -> int:
        return len(self._numbers)

    def ids(self) -> list[str]:
        """The ids of these samples, in the order of the cache."""
        names = self._reader.ids()
        return [names[number] for number in self._numbers]

    def lengths(self) -> list[int]:
        """Tokens of each of them."""
        lengths = self._reader.lengths()
        return [lengths[number] for number in self._numbers]

    def __getitem__(self, index: int) -> Sample:
        return self._reader[int(self._numbers[index])]

    def tokens_of(self, index: int) -> Sample:
        """As of the whole cache."""
        return self._reader.tokens_of(int(self._numbers[index]))
