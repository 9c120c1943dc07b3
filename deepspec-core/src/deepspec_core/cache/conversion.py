"""A cache in another format or number format, sample by sample. Knows the contract of formats; none of them."""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import closing
from pathlib import Path
from typing import Final

from attrs import evolve

from deepspec_core.cache.estimate import cache_bytes, require_space
from deepspec_core.cache.storable import require_storable
from deepspec_core.contracts.cache import CacheFormat, CacheHeader, CacheReader
from deepspec_core.errors import CacheError
from deepspec_core.progress import Progress

log = logging.getLogger("deepspec")

# How many bits of a number a format keeps, sign and exponent left out.
_MANTISSA = {"float32": 23, "float16": 10, "bfloat16": 7, "float8_e4m3": 3}


SHARD_SAMPLES: Final = 512


def check_conversion(source: CacheReader, to: CacheFormat, out: Path, *, dtype: str) -> CacheHeader:
    """The new cache's header. Reads no features.

    CacheError where `out` holds another cache, or one that was not converted from this one, where the format cannot
    store `dtype`, or where the disk has no room for a cache that is not begun.
    """
    header = _header(source, dtype)
    require_storable(to, header)
    found = to.header(out)
    if found is None:
        shards = -(-len(source) // SHARD_SAMPLES)
        require_space(out, cache_bytes(to, header, sum(source.lengths()), shards=shards))
    elif found.converted_from != header.converted_from:
        raise CacheError(
            "The folder holds a cache that was not converted from this one",
            where=out,
            found=found.converted_from or "a cache that was not converted",
            expected=header.converted_from,
            fix="Name a new folder with --out, or remove this one.",
        )
    return header


def convert(source: CacheReader, to: CacheFormat, out: Path, *, dtype: str, shard_samples: int = SHARD_SAMPLES) -> int:
    """Write every sample of a cache into a new one, and return how many were written now.

    An interrupted conversion goes on after its last sealed shard. CacheError as of `check_conversion`.
    """
    header = check_conversion(source, to, out, dtype=dtype)
    was = source.header.precision
    if header.precision != was:
        log.warning("features are rounded from %s to %s", was, dtype)
    elif header.precision != dtype:
        log.warning(
            "the features were rounded to %s before and stay so; a run with cache.dtype = %r refuses them", was, dtype
        )
    with closing(to.create(out, header, shard_samples=shard_samples)) as writer:
        there = writer.written()
        missing = [index for index, name in enumerate(source.ids()) if name not in there]
        with Progress(len(source), "convert the cache", "samples", done=len(there)) as progress:
            for index in missing:
                writer.write(source[index])
                progress.advance()
        writer.finish()
    return len(missing)


def _header(source: CacheReader, dtype: str) -> CacheHeader:
    precision = min(source.header.precision, dtype, key=lambda name: _MANTISSA.get(name, 0))
    return evolve(source.header, dtype=dtype, precision=precision, converted_from=_digest(source))


def _digest(source: CacheReader) -> str:
    """The cache's digest; if its format has none, a digest that differs for caches of other samples."""
    content = [source.header.as_json(), source.ids(), source.lengths()]
    text = json.dumps(content, sort_keys=True).encode("utf-8", "surrogatepass")
    return getattr(source, "digest", None) or hashlib.sha256(text).hexdigest()
