"""Adopts a cache that another program wrote in the published layout, by adding `deepspec.json` to it.

The published manifest does not record which weights, template or conversations a cache was made from; the run provides
these facts. Everything that the files do record is compared first. The cache itself is not changed.

Knows the published layout's files (binary_v2.py has the layout itself); knows no run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepspec_core.cache.binary_v2 import (
    FORMAT,
    INDEX,
    OWN_MANIFEST,
    PUBLISHED_MANIFEST,
    RECORD,
    VERSION,
    OpenShard,
    records,
)
from deepspec_core.cache.manifest import Manifest, Shard
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.digests import digest_of, digests_of
from deepspec_core.errors import CacheError

# Key of the published manifest -> what this version reads.
_READ = {"version": VERSION, "index_record_size": RECORD.itemsize, "token_dtype": "int32", "mask_dtype": "uint8"}


def source_of(folder: Path) -> str:
    """What stands for the conversations of an adopted cache: the digest of its index."""
    return f"adopted {digest_of(folder / INDEX)}" if (folder / INDEX).is_file() else ""


def adopt(folder: Path, header: CacheHeader) -> Manifest:
    """Write `deepspec.json`, saying that the cache was made from what `header` says.

    CacheError where there is one already; where the files are not of the published layout, or damaged; and where they
    say another thing than the header.
    """
    if (folder / OWN_MANIFEST).exists():
        raise CacheError(
            "This cache has DeepSpec's manifest already", where=folder / OWN_MANIFEST, expected="a cache without it"
        )
    published = _published(folder)
    for key, wanted in _facts(header).items():
        if published.get(key) != wanted:
            raise CacheError(
                "The cache was made from other inputs than this run's",
                where=folder / PUBLISHED_MANIFEST,
                found=f"{key} = {json.dumps(published.get(key))}",
                expected=f"{key} = {json.dumps(wanted)}",
            )
    files = _files(folder, published)
    lengths = _lengths(folder, header, published, len(files))
    digests = digests_of([folder / name for name in files], what="read the cache", remembered=False)
    shards, first = [], 0
    for name, digest, of_shard in zip(files, digests, lengths, strict=True):
        OpenShard(folder / name, header, of_shard).close()
        shards.append(
            Shard(
                file=name,
                bytes=(folder / name).stat().st_size,
                xxh3=digest,
                ids=tuple(str(number) for number in range(first, first + len(of_shard))),
                lengths=tuple(of_shard),
            )
        )
        first += len(of_shard)
    manifest = Manifest(format=FORMAT, header=header, shards=tuple(shards), complete=True)
    manifest.save(folder, name=OWN_MANIFEST)
    return manifest


def _facts(header: CacheHeader) -> dict[str, Any]:
    """Key of the published manifest -> what it must say."""
    return {
        "target_layer_ids": list(header.taps),
        "hidden_size": header.hidden_size,
        "hidden_dtype": header.dtype,
        "max_length": header.max_length,
    }


def _published(folder: Path) -> Mapping[str, Any]:
    path = folder / PUBLISHED_MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CacheError("There is no cache in the published layout", where=path, found=error) from error
    if not isinstance(content, dict):
        raise CacheError("There is no cache in the published layout", where=path, found=type(content).__name__)
    for key, wanted in _READ.items():
        if content.get(key) != wanted:
            raise CacheError(
                "The published layout is one that this version does not read",
                where=path,
                found=f"{key} = {json.dumps(content.get(key))}",
                expected=f"{key} = {json.dumps(wanted)}",
            )
    return content


def _files(folder: Path, published: Mapping[str, Any]) -> list[str]:
    """The shards' names, in order. CacheError for a name that leads out of the folder."""
    listed = published.get("shards")
    shards: list[dict[str, Any]] = listed if isinstance(listed, list) and _are_objects(listed) else []
    names, numbers = [shard.get("file_name") for shard in shards], [shard.get("shard_id") for shard in shards]
    if not names or numbers != list(range(len(names))) or not all(_is_name(name) for name in names):
        raise CacheError(
            "The manifest's list of shards cannot be read",
            where=folder / PUBLISHED_MANIFEST,
            found=json.dumps(listed)[:120],
            expected='[{"shard_id": 0, "file_name": "shard-00000.bin"}, ...]',
        )
    for name in map(str, names):
        if not (folder / name).is_file() or (folder / name).is_symlink():
            raise CacheError("A shard of the cache is missing", where=folder / name, expected="a file")
    return [str(name) for name in names]


def _are_objects(items: list[Any]) -> bool:
    return all(isinstance(item, dict) for item in items)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w-][\w.-]*", value) is not None


def _lengths(
    folder: Path, header: CacheHeader, published: Mapping[str, Any], num_shards: int
) -> Sequence[Sequence[int]]:
    """The lengths of the samples of each shard. CacheError where the index does not lay them back to back in order."""
    path = folder / INDEX
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CacheError("The cache has no index", where=path, found=error.strerror) from error
    count = len(content) // RECORD.itemsize
    if len(content) % RECORD.itemsize or published.get("num_samples") != count:
        raise CacheError(
            "The index and the manifest have different numbers of samples",
            where=path,
            found=f"{len(content):,} bytes",
            expected=f"{RECORD.itemsize} for each of {published.get('num_samples')} samples",
        )
    rows = np.frombuffer(content, dtype=RECORD)
    lengths: list[list[int]] = [[] for _ in range(num_shards)]
    for shard, length in zip(rows["shard"].tolist(), rows["length"].tolist(), strict=True):
        if shard >= num_shards or not 0 < length <= header.max_length:
            raise CacheError(
                "The index has an entry that is impossible",
                where=path,
                found=f"{length} tokens in shard {shard}",
                expected=f"1 to {header.max_length} tokens in shard 0 to {num_shards - 1}",
            )
        lengths[shard].append(length)
    if records(header, lengths).tobytes() != content:
        raise CacheError(
            "The index does not place samples one directly after another, in the order of their numbers",
            where=path,
            expected="records as the published writer leaves them",
            fix="Make the cache again: DeepSpec cannot read this layout.",
        )
    return lengths
