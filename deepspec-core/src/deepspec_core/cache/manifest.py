"""The manifest of a sharded cache: what it was made from and which shards are sealed. Written whole, atomically.

Knows headers, shards and checksums; not what is inside a shard.
"""

from __future__ import annotations

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import evolve, field, fields, frozen
from attrs.validators import deep_mapping, instance_of, matches_re

from deepspec_core.cache.manifest_digest import KEY, has_digest, sealed
from deepspec_core.cache.names import Names
from deepspec_core.config.bounds import MANY, whole
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.digests import digests_of
from deepspec_core.disk import sync
from deepspec_core.errors import CacheError

__all__ = ["Manifest", "Shard"]

NAME: Final = "manifest.json"
# The published layout has a manifest.json of its own; ours then stands beside it.
NAMES: Final = (NAME, "deepspec.json")
VERSION: Final = 2
_LARGEST: Final = 2**63 - 1
_FOR_THE_RECORD: Final = ("plugins", "computed_in", "split", "converted_from")
_MAKE_AGAIN: Final = "Make the cache again (--force cache), or get it again from where it came."


def _names(ids: Iterable[str]) -> Names:
    return ids if isinstance(ids, Names) else Names(ids)


def _lengths(lengths: Iterable[int]) -> array[int]:
    """ValueError if these are not numbers of tokens."""
    if isinstance(lengths, array):
        return lengths
    found = list(lengths)
    for length in found:
        if type(length) is not int or not 1 <= length <= MANY:
            raise ValueError(f"lengths must be whole numbers from 1 to {MANY}: {length!r}")
    return array("i", found)


@frozen(kw_only=True)
class Shard:
    """A sealed shard: its file, size and checksum, and the samples in it, in order, with their numbers of tokens."""

    file: str = field(validator=[instance_of(str), matches_re(r"[\w.-]+")])
    bytes: int = field(validator=whole(0, _LARGEST))
    xxh3: str = field(validator=[instance_of(str), matches_re("[0-9a-f]{32}")])
    ids: Names = field(converter=_names)
    lengths: array[int] = field(converter=_lengths)

    def __attrs_post_init__(self) -> None:
        if self.file in (".", ".."):
            raise ValueError(f"shard {self.file!r} lies outside the cache")
        if len(self.ids) != len(self.lengths):
            raise ValueError(f"shard {self.file!r} has {len(self.ids)} samples and {len(self.lengths)} lengths")

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        samples = {"ids": self.ids.tolist(), "lengths": self.lengths.tolist()}
        return {"file": self.file, "bytes": self.bytes, "xxh3": self.xxh3, **samples}


@frozen(kw_only=True)
class Manifest:
    """A cache on disk. `complete` is set when the writer has finished.

    samples_with: Token id -> how many of a complete cache's samples have it, for tokens that were counted.
    has_digest: Its file has a digest of its content. What was read without one is not given one: it was never checked.
    """

    format: str
    header: CacheHeader
    shards: tuple[Shard, ...] = ()
    complete: bool = field(default=False, validator=instance_of(bool))
    samples_with: Mapping[int, int] = field(factory=dict, validator=deep_mapping(whole(0), whole(0)))
    has_digest: bool = True

    @property
    def num_samples(self) -> int:
        """In sealed shards."""
        return sum(len(shard.ids) for shard in self.shards)

    def with_shard(self, shard: Shard) -> Manifest:
        """One more sealed shard."""
        return evolve(self, shards=(*self.shards, shard))

    def arranged(self, order: Mapping[str, int]) -> Manifest:
        """The same manifest with its shards sorted by the numbers that `order` gives to their first samples."""
        return evolve(self, shards=tuple(sorted(self.shards, key=lambda shard: order[shard.ids[0]])))

    @property
    def digest(self) -> str:
        """The digest of the manifest's contents: header, ids, lengths and the shards' checksums."""
        return str(sealed(self._content())[KEY])

    def _content(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "format": self.format,
            "complete": self.complete,
            "header": self.header.as_json(),
            "shards": [shard.as_json() for shard in self.shards],
            "samples_with": {str(token): count for token, count in self.samples_with.items()},
        }

    def save(self, folder: Path, *, name: str = NAME) -> None:
        """Replace the manifest of `folder`."""
        content = self._content()
        temporary = folder / f"{name}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            # At once: json.dump, piece by piece, takes several times as long.
            file.write(json.dumps(sealed(content) if self.has_digest else content))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / name)
        sync(folder)


def load(folder: Path, *, format: str, name: str = NAME) -> Manifest | None:
    """The manifest of `folder`, None where there is none; CacheError: damaged, edited, or another format's."""
    path = folder / name
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if "index_record_size" in content:
            raise another_format(path, "the published layout, deepspec-v2", format)
        if content["format"] != format:
            raise another_format(path, f"{content['format']} version {content['version']}", format)
        if content["version"] != VERSION:
            raise CacheError(
                "The cache was written by a version of DeepSpec whose caches this version cannot read",
                where=path,
                found=f"{format} version {content['version']}",
                expected=f"{format} version {VERSION}",
                fix="Make the cache again (--force cache), or use another cache.path.",
            )
        manifest = Manifest(
            has_digest=has_digest(path, content),
            format=content["format"],
            header=_header(content["header"]),
            shards=tuple(_shard(shard) for shard in _items(content["shards"])),
            complete=content["complete"],
            # Caches that were made before there were counts have none.
            samples_with={_token(key): count for key, count in content.get("samples_with", {}).items()},
        )
        _check(manifest)
        return manifest
    except OSError as error:
        raise CacheError("The cache's manifest cannot be read", where=path, found=error.strerror) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CacheError(
            "The cache's manifest is damaged",
            where=path,
            found=f"{type(error).__name__}: {error}",
            fix="Remove the cache and make it again.",
        ) from error


def another_format(path: Path, found: str, expected: str) -> CacheError:
    """The error of a cache that has another format than the one asked for."""
    return CacheError(
        "The cache is of another format",
        where=path,
        found=found,
        expected=f"{expected} version {VERSION}",
        fix="Set cache.format to the cache's own, or use another cache.path.",
    )


def check_header(path: Path, found: CacheHeader, expected: CacheHeader) -> None:
    """CacheError naming the first field that differs. The fields of `_FOR_THE_RECORD` do not matter here."""
    for attribute in fields(CacheHeader):
        name = attribute.name
        here, wanted = getattr(found, name), getattr(expected, name)
        if name not in _FOR_THE_RECORD and here != wanted:
            raise CacheError(
                f"The cache was made for another {name}",
                where=path,
                found=f"{name} = {here}",
                expected=f"{name} = {wanted}",
                fix="Use another cache.path, or make this cache again (--force cache).",
            )


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """CacheError for a sealed shard that is missing or of another size."""
    for shard in manifest.shards:
        if (problem := _of_another_size(folder, shard)) is not None:
            raise problem


def damaged_shards(folder: Path, shards: Sequence[Shard], *, remembered: bool) -> list[CacheError]:
    """An error for each shard that is missing or whose content is not what was written."""
    problems = {shard.file: _of_another_size(folder, shard) for shard in shards}
    whole = [shard for shard in shards if problems[shard.file] is None]
    try:
        digests = digests_of([folder / shard.file for shard in whole], what="verify the cache", remembered=remembered)
    except OSError as error:
        return [CacheError("A shard of the cache cannot be read", where=error.filename, found=error.strerror)]
    for shard, digest in zip(whole, digests, strict=True):
        if digest != shard.xxh3:
            problems[shard.file] = CacheError(
                "A shard of the cache is damaged",
                where=folder / shard.file,
                found=f"checksum {digest}",
                expected=f"checksum {shard.xxh3}",
                fix=_MAKE_AGAIN,
            )
    return [problem for problem in problems.values() if problem is not None]


def _of_another_size(folder: Path, shard: Shard) -> CacheError | None:
    path = folder / shard.file
    size = path.stat().st_size if path.is_file() and not path.is_symlink() else None
    if size == shard.bytes:
        return None
    return CacheError(
        "A shard of the cache is damaged" if size is not None else "A shard of the cache is missing",
        where=path,
        found=None if size is None else f"{size:,} bytes",
        expected=f"a file of {shard.bytes:,} bytes",
        fix=_MAKE_AGAIN,
    )


def _check(manifest: Manifest) -> None:
    """ValueError for contents that no writer produces: a sample or a file listed twice, a sample that is too long."""
    longest = max((length for shard in manifest.shards for length in shard.lengths), default=0)
    if longest > manifest.header.max_length:
        raise ValueError(f"a sample of {longest} tokens, where {manifest.header.max_length} is the most")
    for token, count in manifest.samples_with.items():
        if count > manifest.num_samples:
            raise ValueError(f"{count} of {manifest.num_samples} samples have token {token}")
    files = [shard.file for shard in manifest.shards]
    samples = [name for shard in manifest.shards for name in shard.ids.tolist()]
    for what, names in (("file", files), ("sample", samples)):
        if len(set(names)) < len(names):
            twice = next(name for name, count in Counter(names).items() if count > 1)
            raise ValueError(f"{what} {twice!r} is there twice")


def _header(content: Mapping[str, Any]) -> CacheHeader:
    return CacheHeader(**{**content, "taps": _items(content["taps"])})


def _shard(content: Mapping[str, Any]) -> Shard:
    return Shard(**{**content, "ids": _items(content["ids"]), "lengths": _items(content["lengths"])})


def _token(key: str) -> int:
    if str(int(key)) != key:
        raise ValueError(f"{key!r}, where a token id belongs")
    return int(key)


def _items(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r}, where a list belongs")
    return tuple(value)
