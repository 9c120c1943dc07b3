"""The contract of feature cache formats: write each sample once, and refuse to open a cache that was made from other
inputs than expected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from attrs import Factory, asdict, field, frozen
from attrs.validators import deep_iterable, deep_mapping, instance_of

from deepspec_core.config.bounds import whole
from deepspec_core.contracts.draft import Sample
from deepspec_core.errors import CacheError

__all__ = ["CacheFormat", "CacheHeader", "CacheReader", "CacheWriter", "MergingWriter"]


@frozen(kw_only=True)
class CacheHeader:
    """The inputs that a cache was made from. Two caches are interchangeable if their headers are equal, apart from
    `plugins`, `computed_in`, `split` and `converted_from`, which are not compared when a cache is opened.

    target: The target's name or path in the run file.
    revision: A fingerprint of the target: a Hub commit, or a digest of a local directory's config and weights.
    template: A digest of the chat template and the masking options.
    source: A digest of the conversations that the cache was made from.
    dtype: The number format in which the features are stored.
    computed_in: The number format in which the target computed them; empty if not known.
    subset: The part of the samples that the cache holds, as written in the run file; empty if it holds all.
    precision: The coarsest number format that the features passed through. If this cache was converted from another,
        this may be the other one's format; else it is `dtype`.
    converted_from: The digest of the cache that this one was converted from; empty if it was not converted.
    split: The rule, the share and the seed by which held-out conversations were left out; empty if not known.

    Raises ValueError or TypeError for values of other types.
    """

    target: str = field(validator=instance_of(str))
    revision: str = field(validator=instance_of(str))
    adapter: str = field(validator=instance_of(str))
    taps: tuple[int, ...] = field(validator=deep_iterable(whole(-1), instance_of(tuple)))
    hidden_size: int = field(validator=whole(1))
    vocab_size: int = field(validator=whole(1))
    dtype: str = field(validator=instance_of(str))
    tokenizer: str = field(validator=instance_of(str))
    template: str = field(validator=instance_of(str))
    max_length: int = field(validator=whole(1))
    source: str = field(validator=instance_of(str))
    plugins: dict[str, str] = field(validator=deep_mapping(instance_of(str), instance_of(str), instance_of(dict)))
    computed_in: str = field(default="", validator=instance_of(str))
    split: str = field(default="", validator=instance_of(str))
    subset: str = field(default="", validator=instance_of(str))
    precision: str = field(default=Factory(lambda self: self.dtype, takes_self=True), validator=instance_of(str))
    converted_from: str = field(default="", validator=instance_of(str))

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types. Fields that were added in later versions are left out if they have the value that caches
        without them imply."""
        content = {**asdict(self), "taps": list(self.taps)}
        says_nothing = {"subset": "", "precision": self.dtype, "converted_from": ""}
        return {
            name: value for name, value in content.items() if name not in says_nothing or value != says_nothing[name]
        }


@runtime_checkable
class CacheWriter(Protocol):
    """Appends samples to shards. A killed process loses at most the shard that it was writing; a new writer continues.

    A writer may have `note_samples_with(token, count)`, which records how many samples of the whole cache contain the
    token. Core calls it before `finish`.
    """

    def written(self) -> set[str]:
        """The ids of the samples in sealed shards."""
        ...

    def write(self, sample: Sample) -> None:
        """Append one sample with its features. Its id is any text: no name of a file, and no path."""
        ...

    def finish(self) -> None:
        """Seal the open shard, mark the cache as complete and release it."""
        ...

    def close(self) -> None:
        """Release the cache, finished or not. Samples outside sealed shards are lost. May be called more than once."""
        ...


@runtime_checkable
class MergingWriter(CacheWriter, Protocol):
    """A writer that can take over caches that other writers wrote in their own folders.

    If the writer of a format has these methods, several workers fill a cache together. Otherwise the first worker fills
    it alone.
    """

    def absorb(self, part: Path) -> None:
        """Move the sealed shards of the finished cache at `part`, which has the same header, into this one.

        `part` is removed. CacheError if it is damaged or unfinished.
        """
        ...

    def arrange(self, order: Mapping[str, int]) -> None:
        """Sort the sealed shards by the number that `order` gives to the id of each shard's first sample."""
        ...


@runtime_checkable
class CacheReader(Protocol):
    """A complete cache, opened for reading. It can be pickled and sent to loader workers.

    These attributes are optional:

    of_taps(taps): Returns a reader of the same cache with only these taps, in this order; its header has these taps. It
        does not read the other taps. Without it, core reads all taps and discards the others.
    samples_with(token): How many samples contain the token, if the writer recorded it; else None. Without it, core
        reads the tokens of all samples to count them.
    has_digest: False if the cache's header and ids could not be checked, because the cache was written by a version
        that stored no digest of them. Core then tells the user.
    digest: Identifies the cache, down to the bytes of its features. Without it, core identifies the cache by its
        header, ids and lengths.
    """

    header: CacheHeader

    def __len__(self) -> int: ...

    def ids(self) -> list[str]: ...

    def lengths(self) -> list[int]: ...

    def __getitem__(self, index: int) -> Sample: ...

    def tokens_of(self, index: int) -> Sample:
        """The sample without its features, which are not read."""
        ...


@runtime_checkable
class CacheFormat(Protocol):
    """A storage format of feature caches."""

    def create(self, path: Path, header: CacheHeader, *, shard_samples: int = 512) -> CacheWriter:
        """Start or continue a cache. Each of its shards has at most `shard_samples` samples.

        CacheError if `path` holds a cache with another header. StageError if another process is writing the cache.
        """
        ...

    def header(self, path: Path) -> CacheHeader | None:
        """The header of the cache at `path`, finished or not; None where there is no cache.

        CacheError if the cache is damaged, or has another format.
        """
        ...

    def open(self, path: Path, expect: CacheHeader | None) -> CacheReader:
        """Open a finished cache. CacheError names the first field of its header that differs from `expect`.

        `plugins`, `computed_in` and `split` are not compared.
        """
        ...

    def verify(self, path: Path, *, part: int = 0, parts: int = 1, remembered: bool = True) -> Sequence[CacheError]:
        """Read all stored files, and return an error for each one that differs from what was written.

        `parts` callers share the work; this one is number `part`. With `remembered`, a file that was verified before
        and has not changed since need not be read again.
        """
        ...

    def bytes_per_token(self, header: CacheHeader) -> int:
        """The bytes that one token takes in the cache, for estimates before anything is written."""
        ...
