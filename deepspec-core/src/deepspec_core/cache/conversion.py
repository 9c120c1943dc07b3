"""A cache in another format or number format, sample by sample. Knows the contract of formats; none of them."""

from __future__ import annotations

import logging
from contextlib import closing
from pathlib import Path

from attrs import evolve

from deepspec_core.contracts.cache import CacheFormat, CacheReader
from deepspec_core.progress import Progress

log = logging.getLogger("deepspec")

# How many bits of a number a format keeps, sign and exponent left out.
_MANTISSA = {"float32": 23, "float16": 10, "bfloat16": 7, "float8_e4m3": 3}


def convert(source: CacheReader, to: CacheFormat, out: Path, *, dtype: str, shard_samples: int = 512) -> int:
    """Write every sample of a cache into a new one, and return how many were written now.

    An interrupted conversion goes on after its last sealed shard. CacheError where `out` holds another cache, or the
    format cannot store `dtype`.
    """
    was = source.header.dtype
    if _MANTISSA[dtype] < _MANTISSA[was]:
        log.warning("features are rounded from %s to %s", was, dtype)
    elif was == "float8_e4m3" and dtype != was:
        log.warning("features stay as rounded to %s before", was)
    header = evolve(source.header, dtype=dtype)
    with closing(to.create(out, header, shard_samples=shard_samples)) as writer:
        there = writer.written()
        missing = [index for index, name in enumerate(source.ids()) if name not in there]
        with Progress(len(source), "convert the cache", "samples", done=len(there)) as progress:
            for index in missing:
                writer.write(source[index])
                progress.advance()
        writer.finish()
    return len(missing)
