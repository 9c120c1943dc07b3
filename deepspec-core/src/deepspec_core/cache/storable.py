"""Whether a format takes a header, found out before anything is written or read at length.

Knows the contract of formats. The trial lies in a temporary folder.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from deepspec_core.contracts.cache import CacheFormat, CacheHeader


def require_storable(cache_format: CacheFormat, header: CacheHeader) -> None:
    """Raise CacheError if the format refuses to begin a cache with this header, for instance for its dtype."""
    with TemporaryDirectory() as folder:
        cache_format.create(Path(folder) / "cache", header).close()
