"""Rows of a dataset, written and read chunk by chunk where they lie in the file, without HDF5's own way through them.

HDF5 keeps the books: it says where a chunk lies. Reading one is a copy out of the mapped file, and writing one takes no
copy. Knows datasets without filters, which shard_file.py checks; not what is in them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np

_CHUNK_BYTES: Final = 256 * 1024


class GrownRows:
    """A new dataset, to which rows like those of `first` are appended. What fills no chunk yet waits in memory."""

    def __init__(self, file: Any, name: str, first: Any) -> None:
        # Without taps, `hidden` has no channels; a chunk has at least one.
        width = [size or 1 for size in first.shape[1:]]
        rows = max(1, _CHUNK_BYTES // (first.itemsize * int(np.prod(width))))
        self._dataset = file.create_dataset(
            name, shape=(0, *first.shape[1:]), maxshape=(None, *width), chunks=(rows, *width), dtype=first.dtype
        )
        self._waiting = np.empty((rows, *first.shape[1:]), dtype=first.dtype)
        self._written, self._held = 0, 0

    def append(self, rows: Any) -> None:
        """Write every chunk that is full with these rows."""
        rows, size = np.ascontiguousarray(rows), len(self._waiting)
        full = (self._held + len(rows)) // size * size
        if full:
            self._dataset.id.set_extent((self._written + full, *self._waiting.shape[1:]))
        while self._held + len(rows) >= size:
            if self._held:
                taken = size - self._held
                self._waiting[self._held :] = rows[:taken]
                block = self._waiting
            else:
                taken, block = size, rows[:size]
            self._write(block)
            rows, self._held = rows[taken:], 0
        self._waiting[self._held : self._held + len(rows)] = rows
        self._held += len(rows)

    def finish(self) -> None:
        """Write the rows of the last chunk."""
        self._dataset.resize(self._written + self._held, axis=0)
        self._dataset[self._written :] = self._waiting[: self._held]

    def _write(self, block: Any) -> None:
        if block.size:
            begin = (self._written, *(0 for _ in block.shape[1:]))
            self._dataset.id.write_direct_chunk(begin, block.reshape(-1).view(np.uint8))
        self._written += len(block)


class ChunkedRows:
    """The file of a shard, mapped into memory beside HDF5's own handle."""

    def __init__(self, path: Path) -> None:
        self._bytes: Any = np.memmap(path, dtype=np.uint8, mode="r")

    def close(self) -> None:
        """Let go of the mapping."""
        del self._bytes

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
            at = info.byte_offset + (start - first) * of_row
            if at + into.nbytes > len(self._bytes):
                raise OSError(f"the file ends within chunk {first // chunks[0]} of {dataset.name}")
            into[:] = self._bytes[at : at + into.nbytes]
        return found
