"""The manifest of a sharded cache: what it was made from and which shards are sealed. Written whole, atomically.

Knows headers, shards and checksums; not what is inside a shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import xxhash
from attrs import asdict, evolve, fields, frozen

from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.errors import CacheError

NAME: Final = "manifest.json"
VERSION: Final = 2


@frozen(kw_only=True)
class Shard:
    """A sealed shard: its file, size and checksum, and the samples in it, in order."""

    file: str
    bytes: int
    xxh3: str
    ids: tuple[str, ...]
    lengths: tuple[int, ...]


@frozen(kw_only=True)
class Manifest:
    """A cache on disk. `complete` is set when the writer has finished."""

    format: str
    header: CacheHeader
    shards: tuple[Shard, ...] = ()
    complete: bool = False

    @property
    def num_samples(self) -> int:
        """In sealed shards."""
        return sum(len(shard.ids) for shard in self.shards)

    def with_shard(self, shard: Shard) -> Manifest:
        """One more sealed shard."""
        return evolve(self, shards=(*self.shards, shard))

    def save(self, folder: Path) -> None:
        """Replace the manifest of `folder`."""
        content = {
            "version": VERSION,
            "format": self.format,
            "complete": self.complete,
            "header": self.header.as_json(),
            "shards": [asdict(shard) for shard in self.shards],
        }
        temporary = folder / f"{NAME}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / NAME)
        sync_folder(folder)


def load(folder: Path, *, format: str) -> Manifest | None:
    """The manifest of `folder`, None where there is none; CacheError where it is damaged or another format's."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION or content["format"] != format:
            raise CacheError(
                "The cache is of another format",
                where=path,
                found=f"{content['format']} version {content['version']}",
                expected=f"{format} version {VERSION}",
            )
        return Manifest(
            format=content["format"],
            header=_header(content["header"]),
            shards=tuple(_shard(shard) for shard in content["shards"]),
            complete=content["complete"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(
            "The cache's manifest is damaged",
            where=path,
            found=f"{type(error).__name__}: {error}",
            fix="Remove the cache and make it again.",
        ) from error


def check_header(path: Path, found: CacheHeader, expected: CacheHeader) -> None:
    """CacheError naming the first field that differs; which plugins made a cache does not matter."""
    for attribute in fields(CacheHeader):
        name = attribute.name
        here, wanted = getattr(found, name), getattr(expected, name)
        if name != "plugins" and here != wanted:
            raise CacheError(
                f"The cache was made for another {name}",
                where=path,
                found=f"{name} = {here}",
                expected=f"{name} = {wanted}",
                fix="Use another cache.path, or make this cache again (--force cache).",
            )


def check_shards(folder: Path, manifest: Manifest, *, verify: bool) -> None:
    """CacheError for a sealed shard that is missing or of another size; with `verify`, of other content."""
    for shard in manifest.shards:
        path = folder / shard.file
        size = path.stat().st_size if path.is_file() else None
        if size != shard.bytes:
            raise CacheError(
                "A shard of the cache is damaged" if size is not None else "A shard of the cache is missing",
                where=path,
                found=None if size is None else f"{size:,} bytes",
                expected=f"{shard.bytes:,} bytes",
                fix="Make the cache again (--force cache).",
            )
        if verify and (digest := checksum(path)) != shard.xxh3:
            raise CacheError(
                "A shard of the cache is damaged",
                where=path,
                found=f"checksum {digest}",
                expected=f"checksum {shard.xxh3}",
                fix="Make the cache again (--force cache).",
            )


def checksum(path: Path) -> str:
    """XXH3 of a file, 128 bits: it finds accidents at the speed of the disk, where SHA-256 is 14 times slower."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames within the folder last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _header(content: Mapping[str, Any]) -> CacheHeader:
    return CacheHeader(**{**content, "taps": tuple(content["taps"])})


def _shard(content: Mapping[str, Any]) -> Shard:
    file = content["file"]
    if Path(file).name != file:
        raise ValueError(f"shard {file!r} lies outside the cache")
    return Shard(**{**content, "ids": tuple(content["ids"]), "lengths": tuple(content["lengths"])})
