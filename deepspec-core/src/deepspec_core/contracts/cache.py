"""What a feature cache format must do: write samples once, sealed; refuse to be read as something it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from attrs import asdict, frozen

from deepspec_core.contracts.draft import Sample

__all__ = ["CacheFormat", "CacheHeader", "CacheReader", "CacheWriter"]


@frozen(kw_only=True)
class CacheHeader:
    """What a cache was made from. Two caches are interchangeable exactly when their headers are equal, but for
    `plugins`.

    `target` is the name or path given, `revision` its content fingerprint (a Hub commit, or a digest of a local
    directory's config and weight sizes); `template` a digest of the chat template and masking options; `source` a
    digest of the conversations it was made from; `dtype` the storage type of the features.
    """

    target: str
    revision: str
    adapter: str
    taps: tuple[int, ...]
    hidden_size: int
    vocab_size: int
    dtype: str
    tokenizer: str
    template: str
    max_length: int
    source: str
    plugins: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "taps": list(self.taps)}


@runtime_checkable
class CacheWriter(Protocol):
    """Appends samples; a killed writer loses at most its open shard, a new writer on the same path continues."""

    def written(self) -> set[str]:
        """Ids already in sealed shards."""
        ...

    def write(self, sample: Sample) -> None:
        """Append one sample with features."""
        ...

    def finish(self) -> None:
        """Seal the open shard, mark the cache complete and let go of it."""
        ...

    def close(self) -> None:
        """Let go of the cache, finished or not; what is not sealed is lost. May be called twice."""
        ...


@runtime_checkable
class CacheReader(Protocol):
    """A complete cache. Safe to pickle into loader workers."""

    header: CacheHeader

    def __len__(self) -> int: ...

    def ids(self) -> list[str]: ...

    def lengths(self) -> list[int]: ...

    def __getitem__(self, index: int) -> Sample: ...


@runtime_checkable
class CacheFormat(Protocol):
    """One storage format."""

    def create(self, path: Path, header: CacheHeader, *, shard_samples: int = 512) -> CacheWriter:
        """Start or continue a cache, its shards of at most shard_samples samples each.

        CacheError where `path` holds a cache with another header, StageError where another process writes it.
        """
        ...

    def open(self, path: Path, expect: CacheHeader | None, *, verify: bool = False) -> CacheReader:
        """Open a finished cache. CacheError names the first field in which `expect` differs (`plugins` aside).

        With `verify` all of it is read, and CacheError names what is not as it was written.
        """
        ...

    def bytes_per_token(self, header: CacheHeader) -> int:
        """Storage of one token, for estimates made before writing."""
        ...
