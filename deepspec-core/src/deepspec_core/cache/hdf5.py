"""The HDF5 cache format: shards of ragged arrays laid end to end, sealed one by one.

A shard is written as shard-00000.h5.HOST-PID.partial, synced, renamed, and entered in the manifest; only then do its
samples count. One writer holds the cache at a time. Datasets: input_ids, loss_mask, hidden and last_hidden over all
tokens (with *_scale where features are 8 bits), offsets [n + 1] and original_length [n] over samples.

Knows storage; not where features come from.

Legend: T tokens, C = taps * H, H hidden size.
"""

from __future__ import annotations

import os
import socket
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import torch
from attrs import evolve

from deepspec_core.cache import quantize
from deepspec_core.cache.manifest import (
    Manifest,
    Shard,
    check_header,
    check_sizes,
    damaged_shards,
    load,
    sync_folder,
)
from deepspec_core.cache.shard_file import ShardOutput, open_shard
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.digests import digest_of
from deepspec_core.errors import CacheError
from deepspec_core.locks import Lock, lock

FORMAT: Final = "hdf5"
_PARTIAL: Final = ".partial"
_LOCK: Final = "writer.lock"
_CHUNK_BYTES: Final = 256 * 1024
_OPEN_SHARDS: Final = 64


class HDF5Format:
    """contracts.cache.CacheFormat."""

    def create(self, path: Path, header: CacheHeader, *, shard_samples: int = 512) -> HDF5Writer:
        """Start or continue a cache; what an earlier writer left unsealed is removed.

        CacheError where `path` holds a cache with another header, or one whose sealed shards are damaged. StageError
        where another writer is at work.
        """
        with _storage_errors(path):
            held = lock(
                path,
                name=_LOCK,
                problem="Another process is writing this cache",
                fix="Wait for it, stop it, or choose another cache.path.",
            )
        try:
            manifest = load(path, format=FORMAT)
            with _storage_errors(path):
                if manifest is None:
                    manifest = Manifest(format=FORMAT, header=header)
                    manifest.save(path)
                else:
                    check_header(path, manifest.header, header)
                    check_sizes(path, manifest)
                sealed = {shard.file for shard in manifest.shards}
                for leftover in path.glob("shard-*.h5*"):
                    if leftover.name not in sealed:
                        leftover.unlink()
        except BaseException:
            held.release()
            raise
        return HDF5Writer(path, manifest, shard_samples, held)

    def header(self, path: Path) -> CacheHeader | None:
        """What the manifest says."""
        manifest = load(path, format=FORMAT)
        return None if manifest is None else manifest.header

    def open(self, path: Path, expect: CacheHeader | None) -> HDF5Reader:
        """A finished cache, its header and its shards' sizes checked."""
        manifest = _finished(path, expect)
        check_sizes(path, manifest)
        return HDF5Reader(path, manifest)

    def verify(self, path: Path, *, part: int = 0, parts: int = 1, remembered: bool = True) -> list[CacheError]:
        """Shards that are not what the manifest says, by checksum or by what is in them. One part: every parts-th."""
        manifest = _finished(path, None)
        shards = manifest.shards[part::parts]
        problems = damaged_shards(path, shards, remembered=remembered)
        # A checksum tells accidents. What HDF5 finds in the file is looked at too, whoever made both.
        reader = HDF5Reader(path, manifest)
        return problems or [problem for shard in shards if (problem := reader.problem_with(shard)) is not None]

    def bytes_per_token(self, header: CacheHeader) -> int:
        """Features, token id and loss mask."""
        size = header.hidden_size
        return quantize.bytes_per_token(header.dtype, (len(header.taps) + 1) * size, size) + 4 + 1


def _finished(path: Path, expect: CacheHeader | None) -> Manifest:
    """The manifest of a finished cache that was made from what is expected."""
    manifest = load(path, format=FORMAT)
    if manifest is None:
        raise CacheError(
            "There is no cache", where=path, expected="manifest.json", fix="Run the cache stage, or set cache.path."
        )
    if expect is not None:
        check_header(path, manifest.header, expect)
    if not manifest.complete:
        raise CacheError(
            "The cache is unfinished",
            where=path,
            found=f"{manifest.num_samples} samples in {len(manifest.shards)} sealed shards",
            expected="a cache whose writer has finished",
            fix="Run the cache stage again: it continues.",
        )
    if manifest.header.dtype not in quantize.ARRAY_TYPES:
        raise CacheError(
            "The cache's features are stored in an unknown type",
            where=path,
            found=manifest.header.dtype,
            expected=f"one of {', '.join(quantize.ARRAY_TYPES)}",
        )
    return manifest


class HDF5Writer:
    """contracts.cache.CacheWriter. Every `shard_samples` samples are sealed; samples go to disk as they come.

    `held` is the lock on the cache; it is let go by `finish`, `close`, or an error of writing.
    """

    def __init__(self, path: Path, manifest: Manifest, shard_samples: int, held: Lock) -> None:
        self._path, self._manifest, self._shard_samples, self._held = path, manifest, shard_samples, held
        self._output: ShardOutput | None = None
        self._written = {name for shard in manifest.shards for name in shard.ids}
        self._seen = set(self._written)
        self._file: Any = None
        self._ids: list[str] = []
        self._lengths: list[int] = []
        self._original_lengths: list[int] = []

    def written(self) -> set[str]:
        """Ids in sealed shards."""
        return set(self._written)

    def write(self, sample: Sample) -> None:
        """Append one sample with features. CacheError where the disk refuses."""
        assert sample.features is not None, "a cache holds features"
        assert sample.id not in self._seen, f"sample {sample.id} comes twice"
        self._seen.add(sample.id)
        with _storage_errors(self._path), self._closed_by_errors():
            if self._manifest.complete:
                self._manifest = evolve(self._manifest, complete=False)
                self._manifest.save(self._path)
            if self._file is None:
                self._output = ShardOutput(self._partial)
                self._file = h5py.File(self._output, "w")
            for name, array in self._arrays(sample, sample.features).items():
                _append(self._file, name, array)
            assert self._output is not None
            self._output.check()
            self._ids.append(sample.id)
            self._lengths.append(len(sample.input_ids))
            self._original_lengths.append(sample.original_length)
            if len(self._ids) == self._shard_samples:
                self._seal()

    def finish(self) -> None:
        """Seal the open shard and mark the cache complete."""
        with _storage_errors(self._path), self._closed_by_errors():
            if self._file is not None:
                self._seal()
            self._manifest = evolve(self._manifest, complete=True)
            self._manifest.save(self._path)
        self.close()

    def close(self) -> None:
        """Let go of the cache. Samples that are not in a sealed shard are lost."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._output is not None:
            self._output.close()
            self._output = None
            self._partial.unlink(missing_ok=True)
        self._held.release()

    @contextmanager
    def _closed_by_errors(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    @property
    def _partial(self) -> Path:
        return self._path / f"{self._shard_name}.{socket.gethostname()}-{os.getpid()}{_PARTIAL}"

    @property
    def _shard_name(self) -> str:
        return f"shard-{len(self._manifest.shards):05d}.h5"

    def _arrays(self, sample: Sample, features: TargetFeatures) -> dict[str, Any]:
        header = self._manifest.header
        length, channels = len(sample.input_ids), len(header.taps) * header.hidden_size
        assert features.hidden.shape == (length, channels), f"{tuple(features.hidden.shape)} for {length, channels}"
        assert features.last_hidden.shape == (length, header.hidden_size), f"{tuple(features.last_hidden.shape)}"
        arrays: dict[str, Any] = {
            "input_ids": sample.input_ids.numpy().astype("<i4"),
            "loss_mask": sample.loss_mask.numpy().astype("<u1"),
        }
        for name, values in (("hidden", features.hidden), ("last_hidden", features.last_hidden)):
            arrays[name], scales = quantize.encode(values, header.dtype, header.hidden_size)
            if scales is not None:
                arrays[f"{name}_scale"] = scales
        return arrays

    def _seal(self) -> None:
        name = self._shard_name
        partial, sealed = self._partial, self._path / name
        self._file["offsets"] = np.cumsum([0, *self._lengths], dtype="<i8")
        self._file["original_length"] = np.array(self._original_lengths, dtype="<i8")
        self._file.close()
        assert self._output is not None
        self._output.sync_and_close()
        os.replace(partial, sealed)
        self._file = self._output = None
        sync_folder(self._path)
        shard = Shard(
            file=name,
            bytes=sealed.stat().st_size,
            xxh3=digest_of(sealed),
            ids=tuple(self._ids),
            lengths=tuple(self._lengths),
        )
        self._manifest = self._manifest.with_shard(shard)
        self._manifest.save(self._path)
        self._written.update(self._ids)
        self._ids, self._lengths, self._original_lengths = [], [], []


class HDF5Reader:
    """contracts.cache.CacheReader. Files are opened when first read, once a process: it may be pickled and forked."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.header = manifest.header
        self._path = path
        self._shards = manifest.shards
        self._places = [(shard, row) for shard, sealed in enumerate(manifest.shards) for row in range(len(sealed.ids))]
        self._owner = os.getpid()
        self._files: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __len__(self) -> int:
        return len(self._places)

    def ids(self) -> list[str]:
        """In the order of writing."""
        return [name for shard in self._shards for name in shard.ids]

    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [length for shard in self._shards for length in shard.lengths]

    def __getitem__(self, index: int) -> Sample:
        """The sample, its features in the storage type (bfloat16 where that is float8)."""
        shard, row = self._places[index]
        with self._shard_errors(shard):
            file = self._open(shard)
            begin, end = (int(offset) for offset in file["offsets"][row : row + 2])
            ids, mask = file["input_ids"][begin:end], file["loss_mask"][begin:end]
            original_length = int(file["original_length"][row])
            hidden, last_hidden = (self._feature(file, name, begin, end) for name in ("hidden", "last_hidden"))
        return Sample(
            id=self._shards[shard].ids[row],
            input_ids=torch.from_numpy(ids.astype(np.int64)),
            loss_mask=torch.from_numpy(mask.astype(np.bool_)),
            original_length=original_length,
            features=TargetFeatures(hidden=hidden, last_hidden=last_hidden),
        )

    def input_ids(self, index: int) -> torch.Tensor:
        """The token ids alone."""
        shard, row = self._places[index]
        with self._shard_errors(shard):
            file = self._open(shard)
            begin, end = (int(offset) for offset in file["offsets"][row : row + 2])
            return torch.from_numpy(file["input_ids"][begin:end].astype(np.int64))

    @contextmanager
    def _shard_errors(self, shard: int) -> Iterator[None]:
        try:
            yield
        except (OSError, KeyError, RuntimeError) as error:
            raise CacheError(
                "A shard of the cache cannot be read",
                where=self._path / self._shards[shard].file,
                found=error,
                fix="Make the cache again (--force cache).",
            ) from error

    def problem_with(self, shard: Shard) -> CacheError | None:
        """What is wrong with a shard's datasets, None where they are as they must be. No feature is read."""
        try:
            open_shard(self._path / shard.file, self._shapes(shard), shard.lengths).close()
        except CacheError as error:
            return error
        except (OSError, KeyError, RuntimeError) as error:
            return CacheError("A shard of the cache cannot be read", where=self._path / shard.file, found=error)
        return None

    def _shapes(self, shard: Shard) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Name -> shape and type of everything that a shard of these samples holds."""
        header, samples, tokens = self.header, len(shard.ids), sum(shard.lengths)
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

    def _feature(self, file: Any, name: str, begin: int, end: int) -> torch.Tensor:
        scales = file[f"{name}_scale"][begin:end] if quantize.has_scale(self.header.dtype) else None
        return quantize.decode(file[name][begin:end], scales, self.header.dtype)

    def _open(self, shard: int) -> Any:
        if self._owner != os.getpid():
            # A fork shares file positions with its parent: leave the parent's handles alone and open our own.
            self._owner, self._files = os.getpid(), OrderedDict()
        if shard not in self._files:
            if len(self._files) == _OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
            sealed = self._shards[shard]
            self._files[shard] = open_shard(self._path / sealed.file, self._shapes(sealed), sealed.lengths)
        self._files.move_to_end(shard)
        return self._files[shard]


def _append(file: Any, name: str, array: Any) -> None:
    if name not in file:
        rows = max(1, _CHUNK_BYTES // (array.itemsize * int(np.prod(array.shape[1:]))))
        file.create_dataset(
            name,
            shape=(0, *array.shape[1:]),
            maxshape=(None, *array.shape[1:]),
            chunks=(rows, *array.shape[1:]),
            dtype=array.dtype,
        )
    dataset = file[name]
    begin = dataset.shape[0]
    dataset.resize(begin + array.shape[0], axis=0)
    dataset[begin:] = array


@contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CacheError(
            "The cache cannot be written",
            where=path,
            found=error,
            fix="Make room or choose another cache.path, then run again: sealed shards are kept.",
        ) from error
