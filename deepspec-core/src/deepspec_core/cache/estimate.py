"""How large a cache will be, and whether the disk has room. Knows token counts and disks; stores nothing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from deepspec_core.contracts.cache import CacheFormat, CacheHeader
from deepspec_core.disk import free_bytes, in_words, nearest_folder
from deepspec_core.errors import CacheError

# What a format needs for a shard beside its tokens, at most: the last chunk of each array is not full.
SHARD_BYTES = 2 * 1024 * 1024


def cache_bytes(cache_format: CacheFormat, header: CacheHeader, num_tokens: int, *, shards: int = 0) -> int:
    """Bytes of a cache: tokens * bytes a token, and what the format needs for so many shards."""
    return cache_format.bytes_per_token(header) * num_tokens + SHARD_BYTES * shards


def too_small(wanted: Sequence[tuple[Path, int]]) -> Iterator[tuple[Path, int, int]]:
    """Folders whose bytes to write exceed the free bytes of their disk, with both numbers.

    Folders on one disk (which need not exist yet) are added up under the first of them.
    """
    together: dict[int, list[tuple[Path, int]]] = defaultdict(list)
    for path, needed in wanted:
        together[nearest_folder(path).stat().st_dev].append((path, needed))
    for parts in together.values():
        needed, free = sum(each for _, each in parts), free_bytes(parts[0][0])
        if needed > free:
            yield parts[0][0], needed, free


def require_space(path: Path, needed: int) -> None:
    """CacheError where the disk under `path` (which need not exist yet) has less than `needed` bytes free."""
    free = free_bytes(path)
    if needed > free:
        raise CacheError(
            "The disk has no room for the cache",
            where=path,
            found=f"{in_words(free)} free",
            expected=in_words(needed),
            fix='Put the cache on another disk (cache.path), store it in 8 bits (cache.dtype = "float8_e4m3"), '
            'or compute features while training (features.mode = "online").',
        )
