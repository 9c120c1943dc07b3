"""Samples stored in shards, which are memory-mapped one by one. A sample is read when it is needed.

Knows shards in order. Does not know whether a store is complete, or what it was made from (token_store.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from deepspec_core.contracts.draft import Sample
from deepspec_core.data.samples import Samples
from deepspec_core.data.token_shards import TokenShard, open_shard


class StoredSamples(Samples):
    """The samples of whole shards. 8 bytes a sample stand in memory; a copy that is sent to a process maps anew."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._open: dict[int, TokenShard] = {}
        shards = [np.diff(self._shard(index).starts) for index in range(len(self._paths))]
        self._lengths = np.concatenate(shards).astype(np.int32) if shards else np.zeros(0, dtype=np.int32)
        # Shard i has the samples [firsts[i], firsts[i + 1]).
        self._firsts = np.cumsum([0, *map(len, shards)])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}

    def __len__(self) -> int:
        return len(self._lengths)

    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """As of Samples."""
        return self._lengths.astype(np.int64)

    def ids(self) -> Iterator[str]:
        """As of Samples."""
        for index in range(len(self._paths)):
            for name in self._shard(index).ids:
                yield name.as_py()

    def by_id(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """As of Samples. Bytes of UTF-8 sort as their characters do."""
        names = pa.chunked_array([self._shard(index).ids for index in range(len(self._paths))], pa.string())
        order: np.ndarray[Any, np.dtype[np.int64]] = pa.compute.sort_indices(names).to_numpy().astype(np.int64)
        return order

    def with_token(self, token: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """As of Samples."""
        shards = [self._shard(index).with_token(token) + first for index, first in enumerate(self._firsts[:-1])]
        return np.concatenate([np.zeros(0, dtype=np.int64), *shards])

    def sample(self, number: int) -> Sample:
        """As of Samples."""
        index = int(np.searchsorted(self._firsts, number, side="right")) - 1
        return self._shard(index).sample(number - int(self._firsts[index]))

    def _shard(self, index: int) -> TokenShard:
        if index not in self._open:
            self._open[index] = open_shard(self._paths[index], checked=False)
        return self._open[index]
