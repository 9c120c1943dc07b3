"""The HDF5 cache format: shards of ragged arrays laid end to end.

Datasets of a shard: the arrays of its samples over all tokens (shard_arrays.py), offsets [n + 1] and
original_length [n] over samples.

Knows what is in a shard; when one is begun, sealed or opened is sharded.py's.

Legend: T tokens, C = taps * H, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from deepspec_core.cache.chunked_rows import ChunkedRows, GrownRows, MappedFile
from deepspec_core.cache.manifest import Shard
from deepspec_core.cache.shard_arrays import array_shapes, arrays_of, features_from
from deepspec_core.cache.shard_file import ShardOutput, open_shard
from deepspec_core.cache.shard_layout import ShardLayout
from deepspec_core.cache.sharded import ShardedFormat
from deepspec_core.cache.taps import runs
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures


class HDF5Format(ShardedFormat):
    """contracts.cache.CacheFormat."""

    def __init__(self) -> None:
        super().__init__(HDF5Layout())


class HDF5Layout(ShardLayout):
    """A shard is an HDF5 file."""

    format = "hdf5"
    suffix = ".h5"

    def new(self, path: Path, header: CacheHeader) -> _NewShard:
        """An empty HDF5 file."""
        return _NewShard(path, header)

    def open(self, path: Path, header: CacheHeader, shard: Shard) -> _OpenShard:
        """The file, every dataset in the shape and type that header and manifest give it."""
        return _OpenShard(path, header, shard)


class _NewShard:
    """shard_layout.NewShard."""

    def __init__(self, path: Path, header: CacheHeader) -> None:
        self._header = header
        self._output = ShardOutput(path)
        self._grown: dict[str, GrownRows] = {}
        try:
            self._file: Any = h5py.File(self._output, "w")
        except BaseException:
            self._output.close()
            path.unlink()
            raise

    def append(self, sample: Sample, features: TargetFeatures) -> None:
        """Grow every dataset by the sample's tokens."""
        for name, array in arrays_of(sample, features, self._header).items():
            if name not in self._grown:
                self._grown[name] = GrownRows(self._file, name, array)
            self._grown[name].append(array)
        self._output.check()

    def finish(self, lengths: Sequence[int], original_lengths: Sequence[int]) -> None:
        """Write what is kept by sample, and close."""
        for rows in self._grown.values():
            rows.finish()
        self._file["offsets"] = np.cumsum([0, *lengths], dtype="<i8")
        self._file["original_length"] = np.array(original_lengths, dtype="<i8")
        self._file.close()
        self._output.finish()

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._output.close()


class _OpenShard:
    """shard_layout.OpenShard."""

    def __init__(self, path: Path, header: CacheHeader, shard: Shard) -> None:
        shapes = _shapes(header, shard)
        self._file, self._header = open_shard(path, shapes, shard.lengths), header
        content = MappedFile(path)
        # Opening a dataset takes as long as reading a short sample.
        self._data = {name: ChunkedRows(self._file[name], content) for name in shapes}
        self._begins = np.cumsum([0, *shard.lengths])
        self._original = self._file["original_length"][:]

    def tokens(self, row: int) -> tuple[Any, Any, int]:
        """The sample's part of the datasets without features."""
        begin, end = self._span(row)
        ids, mask = (self._data[name].read(begin, end) for name in ("input_ids", "loss_mask"))
        return ids, mask, int(self._original[row])

    def features(self, row: int) -> TargetFeatures:
        """Its part of the others."""
        begin, end = self._span(row)
        return features_from(lambda name: self._data[name].read(begin, end), self._header)

    def features_of(self, row: int, layers: Sequence[int]) -> TargetFeatures:
        """The same with some of the layers."""
        begin, end = self._span(row)

        def read(name: str) -> Any:
            if not name.startswith("hidden"):
                return self._data[name].read(begin, end)
            dataset = self._data[name].dataset
            width = dataset.shape[1] // len(self._header.taps)
            parts = [dataset[begin:end, first * width : last * width] for first, last in runs(layers)]
            return np.concatenate(parts, axis=1)

        return features_from(read, self._header)

    def close(self) -> None:
        """Let go of the file and of its mapping."""
        self._file.close()
        self._data.clear()

    def _span(self, row: int) -> tuple[int, int]:
        return int(self._begins[row]), int(self._begins[row + 1])


def _shapes(header: CacheHeader, shard: Shard) -> dict[str, tuple[tuple[int, ...], np.dtype[Any]]]:
    """Name -> shape and type of everything that a shard of these samples holds."""
    samples = len(shard.ids)
    return {
        **array_shapes(header, sum(shard.lengths)),
        "offsets": ((samples + 1,), np.dtype("<i8")),
        "original_length": ((samples,), np.dtype("<i8")),
    }
