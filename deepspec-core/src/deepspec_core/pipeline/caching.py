"""The cache stage. It checks that the disk has room, and writes the target features of every training sample once."""

from __future__ import annotations

from contextlib import closing
from typing import Any

from deepspec_core.cache.estimate import cache_bytes, require_space
from deepspec_core.contracts.cache import CacheWriter
from deepspec_core.data.samples import Samples
from deepspec_core.dtypes import torch_dtype
from deepspec_core.features.capture import capture
from deepspec_core.pipeline.fingerprint import RECORD
from deepspec_core.pipeline.run import Run
from deepspec_core.progress import Progress
from deepspec_core.stopping import StopRequest


def run_stage(run: Run) -> dict[str, Any]:
    """Write the cache. Sealed shards of an interrupted run are kept. CacheError if the disk has no room for it."""
    options = run.file.cache
    samples = run.data.training_samples()
    header = run.cache.header()
    cache_format, folder = run.cache.format, run.cache.folder
    with closing(cache_format.create(folder, header, shard_samples=options.shard_samples)) as writer:
        _write(run, writer, samples)
    run.cache.written()
    return {
        "samples": len(samples),
        "tokens": int(samples.lengths().sum()),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != RECORD),
        **run.data.losses(),
    }


def _write(run: Run, writer: CacheWriter, samples: Samples) -> None:
    options, cache_format, folder = run.file.cache, run.cache.format, run.cache.folder
    done = writer.written()
    lengths = zip(samples.ids(), samples.lengths().tolist(), strict=True)
    missing = [length for name, length in lengths if name not in done]
    shards = -(-len(missing) // options.shard_samples)
    require_space(folder, cache_bytes(cache_format, run.cache.bare_header(), sum(missing), shards=shards))
    # Eight-bit features need scales, which the format computes from full precision.
    dtype = None if options.dtype == "float8_e4m3" else torch_dtype(options.dtype)
    with StopRequest() as request, Progress(len(samples), "cache", "samples", done=len(done)) as progress:
        for sample in capture(
            samples, run.target.model, run.file.target.layers, batch_size=options.batch_size, dtype=dtype, done=done
        ):
            writer.write(sample)
            progress.advance()
            request.check()  # here and not inside HDF5, which cannot take an exception
    writer.finish()
