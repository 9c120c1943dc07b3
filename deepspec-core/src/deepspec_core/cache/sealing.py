"""Sealing a shard: it is synced to disk, gets a checksum, and is renamed to its final name. Reports errors of the disk.

Knows files; does not know what is inside a shard.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import xxhash

from deepspec_core.disk import sync
from deepspec_core.errors import CacheError


def seal(partial: Path, sealed: Path) -> str:
    """Sync a shard's file, which is closed, rename it, and return its checksum. OSError where the disk refuses.

    The checksum is taken of the pages in memory, without a copy of them, while the disk still writes them.
    """
    with ThreadPoolExecutor(1) as pool:
        digest = pool.submit(_digest, partial)
        sync(partial)
    os.replace(partial, sealed)
    sync(sealed.parent)
    return digest.result()


def _digest(path: Path) -> str:
    """As digests.digest_of, of a file that nobody else writes and that is not empty."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return xxhash.xxh3_128_hexdigest(content)


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """CacheError for what the disk refuses."""
    try:
        yield
    except OSError as error:
        raise CacheError(
            "The cache cannot be written",
            where=path,
            found=error,
            fix="Make room or choose another cache.path, then run again: sealed shards are kept.",
        ) from error
