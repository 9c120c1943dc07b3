"""What a feature cache format must do: write samples once, sealed; refuse to be read as something it is not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from attrs import Attribute, asdict, field, frozen
from attrs.validators import deep_iterable, deep_mapping, instance_of

from deepspec_core.contracts.draft import Sample
from deepspec_core.errors import CacheError

__all__ = ["CacheFormat", "CacheHeader", "CacheReader", "CacheWriter"]


def whole_number(least: int) -> Any:
    """An attrs validator: a whole number, and no bool, from `least` on."""

    def check(_header: object, attribute: Attribute[int], value: object) -> None:
        if type(value) is not int or value < least:
            raise ValueError(f"{attribute.name}: {value!r}, where a whole number from {least} on belongs")

    return check


@frozen(kw_only=True)
class CacheHeader:
    """What a cache was made from. Two caches are interchangeable exactly when their headers are equal, but for
    `plugins`.

    `target` is the name or path given, `revision` its content fingerprint (a Hub commit, or a digest of a local
    directory's config and weight sizes); `template` a digest of the chat template and masking options; `source` a
    digest of the conversations it was made from; `dtype` the storage type of the features. Values of other types are
    a ValueError or TypeError.
    """

    target: str = field(validator=instance_of(str))
    revision: str = field(validator=instance_of(str))
    adapter: str = field(validator=instance_of(str))
    taps: tuple[int, ...] = field(validator=deep_iterable(whole_number(0), instance_of(tuple)))
    hidden_size: int = field(validator=whole_number(1))
    vocab_size: int = field(validator=whole_number(1))
    dtype: str = field(validator=instance_of(str))
    tokenizer: str = field(validator=instance_of(str))
    template: str = field(validator=instance_of(str))
    max_length: int = field(validator=whole_number(1))
    source: str = field(validator=instance_of(str))
    plugins: dict[str, str] = field(validator=deep_mapping(instance_of(str), instance_of(str), instance_of(dict)))

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

    def header(self, path: Path) -> CacheHeader | None:
        """What the cache at `path`, finished or not, is made from; None where there is none.

        CacheError where what is there is damaged, or a cache of another format.
        """
        ...

    def open(self, path: Path, expect: CacheHeader | None) -> CacheReader:
        """Open a finished cache. CacheError names the first field in which `expect` differs (`plugins` aside)."""
        ...

    def verify(self, path: Path, *, part: int = 0, parts: int = 1, remembered: bool = True) -> Sequence[CacheError]:
        """Read what is stored and return what is not as it was written, an error each.

        The work is shared among `parts` callers, of which this one is number `part`. With `remembered`, a file that was
        read before and has not changed since need not be read again.
        """
        ...

    def bytes_per_token(self, header: CacheHeader) -> int:
        """Storage of one token, for estimates made before writing."""
        ...
