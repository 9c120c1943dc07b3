"""Shards as NumPy archives: an array of sample i is called "i/NAME", and `original_length` covers all samples.

An .npz file is a zip file of .npy files. They are written one by one, so that no shard is in memory as a whole, and
without compression, so that reading a sample reads no bytes of other samples. No pickled data is written or read. Knows
one shard. Does not know sealing, manifests or checksums, which are core's work.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from deepspec_core.cache.manifest import Shard
from deepspec_core.cache.shard_arrays import array_shapes, arrays_of, features_from
from deepspec_core.cache.shard_layout import ShardLayout, not_as_written
from deepspec_core.cache.sharded import ShardedFormat
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures


class NpzFormat(ShardedFormat):
    """A contracts.cache.CacheFormat."""

    def __init__(self) -> None:
        super().__init__(NpzLayout())


class NpzLayout(ShardLayout):
    """A shard is an .npz."""

    format = "npz"
    suffix = ".npz"

    def new(self, path: Path, header: CacheHeader) -> NewNpz:
        """An empty archive."""
        return NewNpz(path, header)

    def open(self, path: Path, header: CacheHeader, shard: Shard) -> OpenNpz:
        """The archive. Every array is there, as it is, in the shape and type that header and manifest give it."""
        shapes = {"original_length": ((len(shard.ids),), np.dtype("<i8"))}
        for row, length in enumerate(shard.lengths):
            shapes |= {f"{row}/{name}": shape for name, shape in array_shapes(header, length).items()}
        with zipfile.ZipFile(path) as archive:
            there = {info.filename: info.compress_type for info in archive.infolist()}
            for name, expected in shapes.items():
                if there.get(f"{name}.npy") != zipfile.ZIP_STORED:
                    found = "compressed" if f"{name}.npy" in there else "nothing"
                    raise not_as_written(path, f"{name}: {found}", "an uncompressed array")
                with archive.open(f"{name}.npy") as entry:
                    if (version := npy.read_magic(entry)) != (1, 0):
                        raise not_as_written(path, f"{name}: version {version} of .npy", "version (1, 0)")
                    shape, in_columns, dtype = npy.read_array_header_1_0(entry)
                if (shape, dtype) != expected or (in_columns and len(shape) > 1):
                    raise not_as_written(path, f"{name}: {dtype} {list(shape)}", f"{expected[1]} {list(expected[0])}")
        return OpenNpz(np.load(path, allow_pickle=False), header)


class NewNpz:
    """A shard_layout.NewShard."""

    def __init__(self, path: Path, header: CacheHeader) -> None:
        self._header, self._rows = header, 0
        self._file = path.open("xb")
        self._archive = zipfile.ZipFile(self._file, "w")

    def append(self, sample: Sample, features: TargetFeatures) -> None:
        """The sample's arrays, behind those of the samples before it."""
        for name, array in arrays_of(sample, features, self._header).items():
            self._write(f"{self._rows}/{name}", array)
        self._rows += 1

    def finish(self, lengths: Sequence[int], original_lengths: Sequence[int]) -> None:
        """What is of all samples, and the archive's directory."""
        self._write("original_length", np.array(original_lengths, dtype="<i8"))
        self._archive.close()
        self._file.close()

    def close(self) -> None:
        """Both files. A full disk may refuse what they still hold."""
        for file in (self._archive, self._file):
            with suppress(OSError, ValueError):
                file.close()

    def _write(self, name: str, array: np.ndarray[Any, Any]) -> None:
        with self._archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
            npy.write_array(entry, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)


class OpenNpz:
    """A shard_layout.OpenShard."""

    def __init__(self, file: Any, header: CacheHeader) -> None:
        self._file, self._header = file, header

    def tokens(self, row: int) -> tuple[Any, Any, int]:
        """The sample's tokens, its mask, and how long its conversation was."""
        file = self._file
        return file[f"{row}/input_ids"], file[f"{row}/loss_mask"], int(file["original_length"][row])

    def features(self, row: int) -> TargetFeatures:
        """Its features."""
        return features_from(lambda name: self._file[f"{row}/{name}"], self._header)

    def close(self) -> None:
        """The file."""
        self._file.close()
