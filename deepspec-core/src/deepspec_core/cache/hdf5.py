"""The HDF5 cache format: shards of ragged arrays laid end to end.

Datasets of a shard: input_ids, loss_mask, hidden and last_hidden over all tokens (with *_scale where features are 8
bits), offsets [n + 1] and original_length [n] over samples.

Knows what is in a shard; when one is begun, sealed or opened is sharded.py's.

Legend: T tokens, C = taps * H, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import torch

from deepspec_core.cache import quantize
from deepspec_core.cache.manifest import NAME, Manifest, Shard
from deepspec_core.cache.shard_file import ShardOutput, open_shard
from deepspec_core.cache.sharded import ShardedFormat
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.errors import CacheError

_CHUNK_BYTES: Final = 256 * 1024


class HDF5Format(ShardedFormat):
    """contracts.cache.CacheFormat."""

    def __init__(self) -> None:
        super().__init__(HDF5Layout())


class HDF5Layout:
    """shard_layout.ShardLayout."""

    format = "hdf5"
    suffix = ".h5"
    manifest = NAME
    dtypes = tuple(quantize.ARRAY_TYPES)

    def new(self, path: Path, header: CacheHeader) -> _NewShard:
        """An empty HDF5 file."""
        return _NewShard(path, header)

    def open(self, path: Path, header: CacheHeader, shard: Shard) -> _OpenShard:
        """The file, every dataset in the shape and type that header and manifest give it."""
        return _OpenShard(open_shard(path, _shapes(header, shard), shard.lengths), header.dtype)

    def write_index(self, folder: Path, manifest: Manifest) -> None:
        """Nothing: all is in the shards."""

    def index_problems(self, folder: Path, manifest: Manifest) -> list[CacheError]:
        """None."""
        return []

    def bytes_per_token(self, header: CacheHeader) -> int:
        """Features, token id and loss mask."""
        size = header.hidden_size
        return quantize.bytes_per_token(header.dtype, (len(header.taps) + 1) * size, size) + 4 + 1


class _NewShard:
    """shard_layout.NewShard."""

    def __init__(self, path: Path, header: CacheHeader) -> None:
        self._header = header
        self._output = ShardOutput(path)
        try:
            self._file: Any = h5py.File(self._output, "w")
        except BaseException:
            self._output.close()
            path.unlink()
            raise

    def append(self, sample: Sample, features: TargetFeatures) -> None:
        """Grow every dataset by the sample's tokens."""
        header = self._header
        arrays: dict[str, Any] = {
            "input_ids": sample.input_ids.numpy().astype("<i4"),
            "loss_mask": sample.loss_mask.numpy().astype("<u1"),
        }
        for name, values in (("hidden", features.hidden), ("last_hidden", features.last_hidden)):
            arrays[name], scales = quantize.encode(values, header.dtype, header.hidden_size)
            if scales is not None:
                arrays[f"{name}_scale"] = scales
        for name, array in arrays.items():
            _append(self._file, name, array)
        self._output.check()

    def finish(self, lengths: Sequence[int], original_lengths: Sequence[int]) -> None:
        """Write what is kept by sample, and close."""
        self._file["offsets"] = np.cumsum([0, *lengths], dtype="<i8")
        self._file["original_length"] = np.array(original_lengths, dtype="<i8")
        self._file.close()
        self._output.sync_and_close()

    def close(self) -> None:
        """Close both files."""
        self._file.close()
        self._output.close()


class _OpenShard:
    """shard_layout.OpenShard."""

    def __init__(self, file: Any, dtype: str) -> None:
        self._file, self._dtype = file, dtype

    def tokens(self, row: int) -> tuple[Any, Any, int]:
        """The sample's part of the datasets without features."""
        file, (begin, end) = self._file, self._span(row)
        return file["input_ids"][begin:end], file["loss_mask"][begin:end], int(file["original_length"][row])

    def features(self, row: int) -> TargetFeatures:
        """Its part of the others."""
        span = self._span(row)
        return TargetFeatures(hidden=self._feature("hidden", *span), last_hidden=self._feature("last_hidden", *span))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _span(self, row: int) -> tuple[int, int]:
        begin, end = self._file["offsets"][row : row + 2]
        return int(begin), int(end)

    def _feature(self, name: str, begin: int, end: int) -> torch.Tensor:
        scales = self._file[f"{name}_scale"][begin:end] if quantize.has_scale(self._dtype) else None
        return quantize.decode(self._file[name][begin:end], scales, self._dtype)


def _shapes(header: CacheHeader, shard: Shard) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Name -> shape and type of everything that a shard of these samples holds."""
    samples, tokens = len(shard.ids), sum(shard.lengths)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "input_ids": ((tokens,), np.dtype("<i4")),
        "loss_mask": ((tokens,), np.dtype("<u1")),
        "offsets": ((samples + 1,), np.dtype("<i8")),
        "original_length": ((samples,), np.dtype("<i8")),
    }
    for name, layers in (("hidden", len(header.taps)), ("last_hidden", 1)):
        shapes[name] = ((tokens, layers * header.hidden_size), np.dtype(quantize.ARRAY_TYPES[header.dtype]))
        if quantize.has_scale(header.dtype):
            shapes[f"{name}_scale"] = ((tokens, layers), np.dtype("<f4"))
    return shapes


def _append(file: Any, name: str, array: Any) -> None:
    if name not in file:
        # Without taps, `hidden` has no channels; a chunk has at least one.
        width = [size or 1 for size in array.shape[1:]]
        rows = max(1, _CHUNK_BYTES // (array.itemsize * int(np.prod(width))))
        file.create_dataset(
            name,
            shape=(0, *array.shape[1:]),
            maxshape=(None, *width),
            chunks=(rows, *width),
            dtype=array.dtype,
        )
    dataset = file[name]
    begin = dataset.shape[0]
    dataset.resize(begin + array.shape[0], axis=0)
    dataset[begin:] = array
