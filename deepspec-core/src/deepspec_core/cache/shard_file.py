"""One shard of an HDF5 cache as a file: a full disk gives an error when it is written, and it is checked when it is
read.

HDF5 cannot close a file that it failed to write: the process then ends with a segmentation fault. `ShardOutput`
therefore accepts every write and stores the error for `check`. A shard that another process wrote is not trusted:
`open_shard` refuses data outside the file, and sizes that differ from the manifest's. Knows HDF5 files; does not know
what features mean.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from deepspec_core.cache.shard_layout import not_as_written


class ShardOutput:
    """The new file of a shard, for h5py to write. It is created: a file of that name is an OSError."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb+", buffering=0)
        self._error: OSError | None = None
        self._kept: list[tuple[int, bytes]] = []

    def check(self) -> None:
        """Raise the first error of writing."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Let go of the file. The first error of writing is raised."""
        with self._file:
            self.check()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    # What h5py asks of a file.

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As a file does."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """As a file does."""
        return self._file.tell()

    def write(self, data: Any) -> int:
        """All of it, or, once the disk is full, into memory: HDF5 reads its own notes again while it closes."""
        left = memoryview(data).cast("B")
        size = len(left)
        if self._error is None:
            try:
                while left:
                    left = left[self._file.write(left) :]
                return size
            except OSError as error:
                self._error = error
        self._kept.append((self._file.tell(), bytes(left)))
        self._file.seek(len(left), os.SEEK_CUR)
        return size

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, with zeros behind the file's end."""
        view = memoryview(buffer).cast("B")
        begin = self._file.tell()
        count = self._file.readinto(view) or 0
        view[count:] = bytes(len(view) - count)
        for offset, data in self._kept:
            first, last = max(offset, begin), min(offset + len(data), begin + len(view))
            if first < last:
                view[first - begin : last - begin] = data[first - offset : last - offset]
        return len(view)

    def read(self, size: int) -> bytes:
        """So many bytes from here, with zeros behind the file's end."""
        data = bytearray(size)
        self.readinto(data)
        return bytes(data)

    def truncate(self, size: int) -> int:
        """As a file does, where there is room."""
        try:
            return self._file.truncate(size)
        except OSError as error:
            self._error = self._error or error
            return size

    def flush(self) -> None:
        """Nothing is held back."""


def open_shard(path: Path, shapes: Mapping[str, tuple[Sequence[int], np.dtype[Any]]], lengths: Sequence[int]) -> Any:
    """The file, opened for reading, every dataset of `shapes` in it in that shape and type; offsets as lengths say.

    CacheError for links, for data outside the file, and for other sizes. OSError where it is no HDF5 file.
    """
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    # Without a cache of chunks, what is asked for is read and nothing else. With one, whole chunks of all layers are,
    # and it is emptied whenever a dataset is opened again.
    access.set_cache(0, 0, 0, 0.0)
    file = h5py.File(h5py.h5f.open(os.fsencode(path), h5py.h5f.ACC_RDONLY, access))
    try:
        for name, (shape, dtype) in shapes.items():
            problem = _problem(file, name, tuple(shape), dtype)
            if problem is not None:
                raise not_as_written(path, f"{name}: {problem[0]}", problem[1])
        if not np.array_equal(file["offsets"][:], np.cumsum([0, *lengths])):
            raise not_as_written(path, "offsets: other lengths of samples", "the lengths in manifest.json")
    except BaseException:
        file.close()
        raise
    return file


def _problem(file: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[str, str] | None:
    """The found and the expected property, if a dataset is not as it must be."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        return ("a link" if name in file else "nothing"), "a dataset in this file"
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        return "a group", "a dataset"
    if dataset.id.get_create_plist().get_nfilters():
        return "data behind a filter, such as a compression", "data as it is"
    if dataset.external is not None or dataset.is_virtual:
        return "data that lies in other files", "data in this file"
    if (dataset.shape, dataset.dtype) != (shape, dtype):
        return f"{dataset.dtype} {list(dataset.shape or ())}", f"{dtype} {list(shape)}"
    return None
