"""A cache of sealed shards, with one writer at a time. Shards count only when they are complete; readers trust none.

A shard is written as NAME.HOST-PID.partial, synced, renamed, and entered in the manifest; only then do its samples
count. A `ShardLayout` (shard_layout.py) defines the contents of a shard. Knows files, locks and manifests; does not
know where features come from.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from attrs import evolve

from deepspec_core.cache.manifest import (
    NAMES,
    Manifest,
    Shard,
    another_format,
    check_header,
    check_sizes,
    damaged_shards,
    load,
)
from deepspec_core.cache.sealing import seal, storage_errors
from deepspec_core.cache.shard_layout import NewShard, OpenShard, ShardLayout
from deepspec_core.cache.taps import of_layers, places
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.data.digest_set import DigestSet, digest16
from deepspec_core.disk import sync
from deepspec_core.errors import CacheError
from deepspec_core.locks import Lock, lock

__all__ = ["ShardedFormat"]

_PARTIAL: Final = ".partial"
_LOCK: Final = "writer.lock"
_OPEN_SHARDS: Final = 64


class ShardedFormat:
    """A contracts.cache.CacheFormat, for one layout of shards: shard_layout.ShardLayout."""

    def __init__(self, layout: ShardLayout) -> None:
        self.layout = layout

    def create(self, path: Path, header: CacheHeader, *, shard_samples: int = 512) -> ShardedWriter:
        """Start or continue a cache. Unsealed shards of an earlier writer are removed.

        CacheError where `path` holds a cache with another header, or one whose sealed shards are damaged, or where the
        layout cannot store header.dtype. StageError where another writer is at work.
        """
        layout = self.layout
        if header.dtype not in layout.dtypes:
            raise CacheError(
                f"The cache format {layout.format!r} cannot store features in this number format",
                where="cache.dtype",
                found=header.dtype,
                expected=" or ".join(layout.dtypes),
                fix="Set cache.dtype to one of these, or choose another cache.format.",
            )
        with storage_errors(path):
            held = lock(
                path,
                name=_LOCK,
                problem="Another process is writing this cache",
                fix="Wait for it, stop it, or choose another cache.path.",
            )
        try:
            manifest = self._load(path)
            with storage_errors(path):
                if manifest is None:
                    manifest = Manifest(format=layout.format, header=header)
                    manifest.save(path, name=layout.manifest)
                else:
                    check_header(path, manifest.header, header)
                    check_sizes(path, manifest)
                sealed = {shard.file for shard in manifest.shards}
                for leftover in path.glob(f"shard-*{layout.suffix}*"):
                    if leftover.name not in sealed:
                        leftover.unlink()
        except BaseException:
            held.release()
            raise
        return ShardedWriter(path, layout, manifest, shard_samples, held)

    def header(self, path: Path) -> CacheHeader | None:
        """What the manifest says."""
        manifest = self._load(path)
        return None if manifest is None else manifest.header

    def open(self, path: Path, expect: CacheHeader | None) -> ShardedReader:
        """A finished cache, its header and its shards' sizes checked."""
        manifest = self._finished(path, expect)
        check_sizes(path, manifest)
        return ShardedReader(path, self.layout, manifest)

    def verify(self, path: Path, *, part: int = 0, parts: int = 1, remembered: bool = True) -> list[CacheError]:
        """Errors for shards that differ from the manifest, by checksum or contents. A part is every parts-th shard."""
        manifest = self._finished(path, None)
        shards = manifest.shards[part::parts]
        problems = damaged_shards(path, shards, remembered=remembered)
        if part == 0:
            problems += self.layout.index_problems(path, manifest)
        # A checksum tells accidents. What is in the file is looked at too, whoever made both.
        reader = ShardedReader(path, self.layout, manifest)
        return problems or [problem for shard in shards if (problem := reader.problem_with(shard)) is not None]

    def bytes_per_token(self, header: CacheHeader) -> int:
        """Features, token id and masks."""
        return self.layout.bytes_per_token(header)

    def _load(self, path: Path) -> Manifest | None:
        """The manifest. CacheError where the folder holds a cache of another format."""
        own = self.layout.manifest
        others = [name for name in NAMES if name != own and (path / name).is_file()]
        if others and not (path / own).is_file():
            raise another_format(path / others[0], "a cache of another format", self.layout.format)
        return load(path, format=self.layout.format, name=own)

    def _finished(self, path: Path, expect: CacheHeader | None) -> Manifest:
        """The manifest of a finished cache with the expected header."""
        manifest = self._load(path)
        if manifest is None:
            raise CacheError(
                "There is no cache",
                where=path,
                expected=self.layout.manifest,
                fix="Run the cache stage, or set cache.path.",
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
        if manifest.header.dtype not in self.layout.dtypes:
            raise CacheError(
                "The cache's features are stored in an unknown type",
                where=path,
                found=manifest.header.dtype,
                expected=f"one of {', '.join(self.layout.dtypes)}",
            )
        return manifest


class ShardedWriter:
    """contracts.cache.MergingWriter. Every `shard_samples` samples are sealed; samples go to disk as they come.

    `held` is the lock on the cache; it is let go by `finish`, `close`, or an error of writing.
    """

    def __init__(self, path: Path, layout: ShardLayout, manifest: Manifest, shard_samples: int, held: Lock) -> None:
        self._path, self._layout, self._manifest = path, layout, manifest
        self._shard_samples, self._held = shard_samples, held
        self._shard: NewShard | None = None
        self._seen = DigestSet()
        for shard in manifest.shards:
            self._see(shard.ids)
        self._ids: list[str] = []
        self._lengths: list[int] = []
        self._original_lengths: list[int] = []

    def written(self) -> set[str]:
        """Ids in sealed shards."""
        return {name for shard in self._manifest.shards for name in shard.ids}

    def write(self, sample: Sample) -> None:
        """Append one sample with features. CacheError where the disk refuses."""
        features, header = sample.features, self._manifest.header
        assert features is not None, "a cache holds features"
        assert digest16(sample.id) not in self._seen, f"sample {sample.id} comes twice"
        length, channels = len(sample.input_ids), len(header.taps) * header.hidden_size
        assert features.hidden.shape == (length, channels), f"{tuple(features.hidden.shape)} for {length, channels}"
        assert features.last_hidden.shape == (length, header.hidden_size), f"{tuple(features.last_hidden.shape)}"
        self._see([sample.id])
        with storage_errors(self._path), self._closed_by_errors():
            if self._manifest.complete:
                self._manifest = evolve(self._manifest, complete=False, samples_with={})
                self._save()
            if self._shard is None:
                self._shard = self._layout.new(self._partial, header)
            self._shard.append(sample, features)
            self._ids.append(sample.id)
            self._lengths.append(length)
            self._original_lengths.append(sample.original_length)
            if len(self._ids) == self._shard_samples:
                self._seal(self._shard)

    def finish(self) -> None:
        """Seal the open shard and mark the cache complete."""
        with storage_errors(self._path), self._closed_by_errors():
            if self._shard is not None:
                self._seal(self._shard)
            self._layout.write_index(self._path, self._manifest)
            self._manifest = evolve(self._manifest, complete=True)
            self._save()
        self.close()

    def absorb(self, part: Path) -> None:
        """Shard by shard: a kill between two loses none that is in either manifest, or costs one."""
        assert self._shard is None, "a shard is open"
        layout = self._layout
        theirs = load(part, format=layout.format, name=layout.manifest)
        if theirs is None or not theirs.complete:
            raise CacheError("A worker's part of the cache is unfinished", where=part, fix="Remove it and run again.")
        check_header(part, theirs.header, self._manifest.header)
        check_sizes(part, theirs)
        if any(digest16(name) in self._seen for shard in theirs.shards for name in shard.ids):
            raise CacheError("A worker's part is in the cache already", where=part, fix="Remove it and run again.")
        with storage_errors(self._path), self._closed_by_errors():
            for shard in theirs.shards:
                name = self._shard_name
                os.replace(part / shard.file, self._path / name)
                sync(self._path)
                manifest = self._manifest.with_shard(evolve(shard, file=name))
                checked = manifest.has_digest and theirs.has_digest
                self._manifest = evolve(manifest, complete=False, samples_with={}, has_digest=checked)
                self._save()
                self._see(shard.ids)
        shutil.rmtree(part, ignore_errors=True)

    def note_samples_with(self, token: int, count: int) -> None:
        """The manifest keeps it once the cache is complete."""
        self._manifest = evolve(self._manifest, samples_with={**self._manifest.samples_with, token: count})

    def arrange(self, order: Mapping[str, int]) -> None:
        """The cache's order is that of the manifest."""
        with storage_errors(self._path), self._closed_by_errors():
            self._manifest = self._manifest.arranged(order)
            self._save()

    def _see(self, names: Iterable[str]) -> None:
        for name in names:
            self._seen.add(digest16(name))

    def close(self) -> None:
        """Release the cache. Samples that are not in a sealed shard are lost."""
        if self._shard is not None:
            self._shard.close()
            self._shard = None
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
        return f"shard-{len(self._manifest.shards):05d}{self._layout.suffix}"

    def _save(self) -> None:
        self._manifest.save(self._path, name=self._layout.manifest)

    def _seal(self, new: NewShard) -> None:
        partial, sealed = self._partial, self._path / self._shard_name
        new.finish(self._lengths, self._original_lengths)
        checksum = seal(partial, sealed)
        self._shard = None
        shard = Shard(
            file=sealed.name,
            bytes=sealed.stat().st_size,
            xxh3=checksum,
            ids=self._ids,
            lengths=self._lengths,
        )
        self._manifest = self._manifest.with_shard(shard)
        self._save()
        self._ids, self._lengths, self._original_lengths = [], [], []


class ShardedReader:
    """contracts.cache.CacheReader. Files are opened when first read, once a process: it may be pickled and forked."""

    def __init__(self, path: Path, layout: ShardLayout, manifest: Manifest) -> None:
        self.header = self._stored = manifest.header
        self._layers: tuple[int, ...] | None = None
        self._path, self._layout = path, layout
        self.has_digest, self.digest = manifest.has_digest, manifest.digest
        self._shards, self._samples_with = manifest.shards, manifest.samples_with
        # Shard i has the samples [firsts[i], firsts[i + 1]).
        self._firsts = np.cumsum([0, *(len(sealed.ids) for sealed in manifest.shards)])
        self._owner = os.getpid()
        self._files: OrderedDict[int, OpenShard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def ids(self) -> list[str]:
        """In the order of writing."""
        return [name for shard in self._shards for name in shard.ids.tolist()]

    def lengths(self) -> list[int]:
        """Tokens of each sample."""
        return [length for shard in self._shards for length in shard.lengths]

    def samples_with(self, token: int) -> int | None:
        """How many samples have the token, as it was counted when the cache was written; None where it was not."""
        return self._samples_with.get(token)

    def __getitem__(self, index: int) -> Sample:
        """The sample, its features in the storage type (bfloat16 where that is float8)."""
        return self._read(index, with_features=True)

    def tokens_of(self, index: int) -> Sample:
        """The sample without its features, which are not read."""
        return self._read(index, with_features=False)

    def of_taps(self, taps: tuple[int, ...]) -> ShardedReader:
        """The same cache with some of its taps. The others are not read where the layout can do so."""
        narrowed = copy(self)
        narrowed._files = OrderedDict()
        narrowed.header, narrowed._layers = evolve(self._stored, taps=taps), places(self._stored, taps)
        return narrowed

    def _features(self, file: OpenShard, row: int) -> TargetFeatures:
        if self._layers is None:
            return file.features(row)
        narrow = getattr(file, "features_of", None)
        if narrow is None:
            return of_layers(file.features(row), self._layers, self.header.hidden_size)
        return narrow(row, self._layers)  # type: ignore[no-any-return]

    def _read(self, index: int, *, with_features: bool) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard = int(np.searchsorted(self._firsts, index, side="right")) - 1
        row = index - int(self._firsts[shard])
        try:
            file = self._open(shard)
            ids, mask, original_length = file.tokens(row)
            features = self._features(file, row) if with_features else None
        except CacheError:
            raise
        except Exception as error:  # what a layout's library raises on a damaged file is its own
            raise self._unreadable(self._shards[shard], error) from error
        return Sample(
            id=self._shards[shard].ids[row],
            input_ids=torch.from_numpy(ids.astype(np.int64)),
            loss_mask=torch.from_numpy(mask.astype(np.bool_)),
            original_length=original_length,
            features=features,
        )

    def problem_with(self, shard: Shard) -> CacheError | None:
        """What is wrong with a shard's content, None where it is as it must be. No feature is read."""
        try:
            self._layout.open(self._path / shard.file, self._stored, shard).close()
        except CacheError as error:
            return error
        except Exception as error:  # as above
            return self._unreadable(shard, error)
        return None

    def _unreadable(self, shard: Shard, error: Exception) -> CacheError:
        return CacheError(
            "A shard of the cache cannot be read",
            where=self._path / shard.file,
            found=f"{type(error).__name__}: {error}",
            fix="Make the cache again (--force cache).",
        )

    def _open(self, shard: int) -> OpenShard:
        if self._owner != os.getpid():
            # A fork shares file positions with its parent: leave the parent's handles alone and open our own.
            self._owner, self._files = os.getpid(), OrderedDict()
        if shard not in self._files:
            if len(self._files) == _OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
            sealed = self._shards[shard]
            self._files[shard] = self._layout.open(self._path / sealed.file, self._stored, sealed)
        self._files.move_to_end(shard)
        return self._files[shard]
