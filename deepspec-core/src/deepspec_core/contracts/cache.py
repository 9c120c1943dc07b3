"""What a feature cache format must do: write each sample once, and open no cache that was made from anything else."""

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
    """What a cache was made from. Two caches are interchangeable if their headers are equal. `plugins`, `computed_in`,
    `split` and `converted_from` may differ, and are not compared when a cache is opened.

    target: The name or path that the run file gives.
    revision: A fingerprint of the target: a Hub commit, or a digest of a local directory's config and weights.
    template: A digest of the chat template and the masking options.
    source: A digest of the conversations that the cache was made from.
    dtype: The number format in which the features are stored.
    computed_in: The number format in which the target computed them; empty where that is not known.
    subset: The part of the conversations' samples that the cache has, as the run file says it; empty where it has all.
    precision: The coarsest number format that the features passed through: that of an earlier cache, where this one was
        converted from it, else `dtype`.
    converted_from: The digest of the cache that this one was converted from; empty where it was not.
    split: The rule, the share and the seed by which held-out conversations were left out; empty where not known.

    Values of other types are a ValueError or TypeError.
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
        """Plain JSON types. Left out is what later versions added, where it says no more than caches without it."""
        content = {**asdict(self), "taps": list(self.taps)}
        says_nothing = {"subset": "", "precision": self.dtype, "converted_from": ""}
        return {
            name: value for name, value in content.items() if name not in says_nothing or value != says_nothing[name]
        }


@runtime_checkable
class CacheWriter(Protocol):
    """Appends samples to shards. A killed process loses at most the shard it was writing; a new writer goes on.

    A writer may have `note_samples_with(token, count)`: keep how many samples of the whole cache contain the token. It
    is called before `finish`.
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
        """Release the cache, whether finished or not. Samples outside sealed shards are lost. May be called twice."""
        ...


@runtime_checkable
class MergingWriter(CacheWriter, Protocol):
    """A writer that takes over what other writers wrote in folders of their own.

    Several workers fill a cache where its format's writer is one of these. The first worker fills it alone where it is
    not.
    """

    def absorb(self, part: Path) -> None:
        """Move the sealed shards of the finished cache at `part`, which has the same header, into this one.

        `part` is removed. CacheError if it is damaged or unfinished.
        """
        ...

    def arrange(self, order: Mapping[str, int]) -> None:
        """Put the sealed shards in the order of their first samples' numbers in `order`."""
        ...


@runtime_checkable
class CacheReader(Protocol):
    """A complete cache, opened for reading. It can be pickled and sent to loader workers.

    A reader may have `of_taps(taps)`: a reader of the same cache with some of its taps, in their order, which does not
    read the others. Its header has these taps. Without it, core reads all taps and throws the others away.

    It may also have `samples_with(token)`: how many samples contain the token, where the writer was told; else None.
    Without it, core reads the tokens of all samples to count.

    And it may have `has_digest`: False says that what the cache's header and ids say could not be checked, because the
    cache is of a version that kept no digest of them. Core tells the user. `digest` says which cache it is, down to the
    bytes of its features; without it, core takes its header, ids and lengths for that.
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

        CacheError if `path` holds a cache with another header. StageError if another process is writing it.
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
        """Read what is stored, and return an error for each file that is not as it was written.

        `parts` callers share the work; this one is number `part`. With `remembered`, a file that was read before and
        has not changed since need not be read again.
        """
        ...

    def bytes_per_token(self, header: CacheHeader) -> int:
        """Bytes that one token takes in the cache, for estimates before anything is written."""
        ...
