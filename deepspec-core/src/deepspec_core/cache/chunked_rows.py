"""Rows of a dataset, written and read chunk by chunk directly in the file, without HDF5's own read and write functions.

HDF5 only reports where a chunk is. Reading a chunk is one copy from the mapped file, and writing needs no copy. Knows
datasets without filters, which shard_file.py checks; does not know their contents.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any, Final

import numpy as np

from deepspec_core.errors import CacheError

_CHUNK_BYTES: Final = 256 * 1024


class GrownRows:
    """A new dataset, to which rows like those of `first` are appended. An incomplete chunk waits in memory."""

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
    """The rows of one dataset, for reading. `content` is its whole file.

    HDF5 is asked once for the places of all chunks, at the first read: one question a chunk takes longer than the copy.
    It reads what lies in no chunks, or in chunks of part of the columns, as other programs may write it.
    """

    def __init__(self, dataset: Any, content: MappedFile) -> None:
        self.dataset, self._content = dataset, content
        # Asking a dataset for these takes as long as copying a chunk.
        self._shape, self._dtype, chunks = dataset.shape, dataset.dtype, dataset.chunks
        self._of_row = int(np.prod(self._shape[1:])) * self._dtype.itemsize
        direct = chunks is not None and chunks[1:] == self._shape[1:]
        self._rows = chunks[0] if direct else 0
        self._places: list[int] | None = None

    def read(self, begin: int, end: int) -> Any:
        """dataset[begin:end]. OSError where the file ends before the rows do, CacheError where it was cut short."""
        if not self._rows or begin >= end:
            return self.dataset[begin:end]
        found = np.empty((end - begin, *self._shape[1:]), dtype=self._dtype)
        into: Any = found.reshape(-1).view(np.uint8)
        of_row, rows, done = self._of_row, self._rows, 0
        places = self._places = self._places or self._found_places()
        self._content.check_size()
        pieces = []
        for chunk in range(begin // rows, (end - 1) // rows + 1):
            start, stop = max(begin, chunk * rows), min(end, (chunk + 1) * rows)
            place = places[chunk]
            if not place:  # never written: HDF5 knows what stands for it
                return self.dataset[begin:end]
            at, size = place + (start - chunk * rows) * of_row, (stop - start) * of_row
            if at + size > len(self._content.bytes):
                raise OSError(f"the file ends within chunk {chunk} of {self.dataset.name}")
            pieces.append((at, size))
        for at, size in pieces:
            self._content.will_be_read(at, size)
        for at, size in pieces:
            into[done : done + size] = self._content.bytes[at : at + size]
            done += size
        return found

    def _found_places(self) -> list[int]:
        """Where each chunk begins in the file; 0, where no chunk can be, for one that was never written."""
        places = [0] * -(-self._shape[0] // self._rows)

        def note(chunk: Any) -> None:
            number = chunk.chunk_offset[0] // self._rows
            if number < len(places):  # a file may hold chunks behind the end of its dataset
                places[number] = chunk.byte_offset or 0

        self.dataset.id.chunk_iter(note)
        return places


class MappedFile:
    """A file's bytes, mapped into memory; a file of none is refused with ValueError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # As a plain array: a slice of np.memmap takes several times as long.
        self.bytes: Any = np.frombuffer(self._map, dtype=np.uint8)

    def check_size(self) -> None:
        """CacheError where the file was cut short since: a read behind its end would end the process without a word.

        It is asked before every read. Between the two a moment is left.
        """
        size = self._map.size()  # of the file, not of the mapping
        if size < len(self.bytes):
            raise CacheError(
                "A shard of the cache was cut short while it was read",
                where=self._path,
                found=f"{size:,} bytes",
                expected=f"{len(self.bytes):,} bytes, as when it was opened",
                fix="Make the cache again (--force cache), or get it again from where it came.",
            )

    def will_be_read(self, at: int, size: int) -> None:
        """Have the system read these bytes ahead. Without it a disk is asked for a few pages at a time."""
        begin = at - at % mmap.ALLOCATIONGRANULARITY
        self._map.madvise(mmap.MADV_WILLNEED, begin, at + size - begin)
