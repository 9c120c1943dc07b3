"""Rows of a dataset read straight from where its chunks lie in the file, without HDF5's way through them.

HDF5 says where a chunk lies. Reading it is one system call, into the array that is returned, which takes about a third
of the time. Knows datasets without filters, which shard_file.py has checked; not what is in them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np


class ChunkedRows:
    """The file of a shard, opened once more for reading by place. No position is kept, so forks may share it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def read(self, dataset: Any, begin: int, end: int) -> Any:
        """dataset[begin:end]. OSError where the file ends before the rows do.

        HDF5 reads what lies in no chunks, or in chunks of part of the columns, as other programs may write it.
        """
        chunks, shape = dataset.chunks, dataset.shape
        if not chunks or chunks[1:] != shape[1:] or begin == end:
            return dataset[begin:end]
        found = np.empty((end - begin, *shape[1:]), dtype=dataset.dtype)
        of_row = found[0].nbytes
        for first in range(begin - begin % chunks[0], end, chunks[0]):
            info = dataset.id.get_chunk_info_by_coord((first, *(0 for _ in shape[1:])))
            if info.byte_offset is None:  # never written: HDF5 knows what stands for it
                return dataset[begin:end]
            start, stop = max(begin, first), min(end, first + chunks[0])
            into: Any = found[start - begin : stop - begin].reshape(-1).view(np.uint8)
            if os.preadv(self._file.fileno(), [into], info.byte_offset + (start - first) * of_row) != into.nbytes:
                raise OSError(f"the file ends within chunk {first // chunks[0]} of {dataset.name}")
        return found
