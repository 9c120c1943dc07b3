"""The cache stage. It checks that the disk has room, and writes the target features of every training sample once.

Several workers write parts: caches of one shard each, in folders of their own, which the first worker moves into the
cache. Which samples a part has follows from their order, not from who writes it, so a finished part counts whatever the
number of workers is when the run goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from deepspec_core.cache.estimate import cache_bytes, require_space
from deepspec_core.contracts.cache import CacheFormat, CacheHeader, CacheWriter, MergingWriter
from deepspec_core.contracts.draft import Sample
from deepspec_core.crew import Crew, SharedProgress, appears
from deepspec_core.dtypes import torch_dtype
from deepspec_core.errors import CacheError, StageError
from deepspec_core.features.capture import capture, in_order
from deepspec_core.pipeline import workers
from deepspec_core.pipeline.fingerprint import RECORD
from deepspec_core.pipeline.run import Run
from deepspec_core.stopping import StopRequest

log = logging.getLogger("deepspec")

_PART: Final = "part-"

Part = tuple[int, int]
"""Number of its first sample in the order of capture, and how many follow: the samples of one shard."""


def run_stage(run: Run) -> dict[str, Any]:
    """Write the cache. Sealed shards of an interrupted run are kept. CacheError if the disk has no room for it."""
    samples = run.data.training_samples()
    header, folder, crew = run.cache.header(), run.cache.folder, workers.crew()
    crew.require_shared(folder)
    if not crew.first:
        _follow(run, samples, header, crew)
        return {}
    with closing(run.cache.format.create(folder, header, shard_samples=run.file.cache.shard_samples)) as writer:
        _lead(run, writer, samples, header, crew)
    run.cache.written()
    return {
        "samples": len(samples),
        "tokens": sum(len(sample.input_ids) for sample in samples),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != RECORD),
        **run.data.losses(),
    }


def _lead(run: Run, writer: CacheWriter, samples: Sequence[Sample], header: CacheHeader, crew: Crew) -> None:
    options, cache_format, folder = run.file.cache, run.cache.format, run.cache.folder
    if isinstance(writer, MergingWriter):
        _absorb_finished(writer, cache_format, folder, header)
    elif crew.count > 1:
        log.warning("cache.format %r cannot be written by several workers: the first one does it", options.format)
    done = writer.written()
    missing = [len(sample.input_ids) for sample in samples if sample.id not in done]
    shards = -(-len(missing) // options.shard_samples)
    require_space(folder, cache_bytes(cache_format, run.cache.bare_header(), sum(missing), shards=shards))
    order = in_order(samples)
    parts = _parts(order, done, options.shard_samples)
    in_parts = isinstance(writer, MergingWriter) and (crew.count > 1 or _has_gaps(order, parts))
    crew.told_by_first("cache parts", {"samples": _digest(header, order), "parts": parts if in_parts else []})
    with crew.progress(len(samples), "cache", "samples", done=len(done)) as progress:
        if not in_parts:
            with StopRequest() as request:
                for sample in _captured(run, samples, done):
                    writer.write(sample)
                    progress.advance()
                    request.check()  # here and not inside HDF5, which cannot take an exception
            crew.gather("cache written", True, meanwhile=progress.refresh)
        else:
            assert isinstance(writer, MergingWriter), "as asked above"
            _write_parts(run, order, crew.share(parts), header, progress)
            crew.gather("cache written", True, meanwhile=progress.refresh)
            for part in parts:
                place = _place(folder, part)
                if not appears(place):
                    raise StageError(
                        "The first worker does not see what another one wrote",
                        where=place,
                        expected="a folder on a file system that all machines share",
                    )
                writer.absorb(place)
            writer.arrange({sample.id: number for number, sample in enumerate(order)})
    writer.finish()


def _follow(run: Run, samples: Sequence[Sample], header: CacheHeader, crew: Crew) -> None:
    told = crew.told_by_first("cache parts")
    order = in_order(samples)
    if told["samples"] != _digest(header, order):
        raise StageError(
            f"Worker {crew.rank} caches something else than the first worker",
            where=run.path,
            expected="the same target, sources, tokenizer and versions on every machine",
        )
    parts = crew.share([(first, count) for first, count in told["parts"]])
    with crew.progress(len(samples), "cache", "samples") as progress:
        _write_parts(run, order, parts, header, progress)
    crew.gather("cache written", True)


def _write_parts(
    run: Run, order: Sequence[Sample], parts: Sequence[Part], header: CacheHeader, progress: SharedProgress
) -> None:
    """Each part as a finished cache of its own."""
    own = {order[number].id for first, count in parts for number in range(first, first + count)}
    captured = _captured(run, order, {sample.id for sample in order} - own)
    with StopRequest() as request:
        for part in parts:
            place = _place(run.cache.folder, part)
            with closing(run.cache.format.create(place, header, shard_samples=part[1])) as writer:
                for _ in range(part[1]):
                    writer.write(next(captured))
                    progress.advance()
                    request.check()
                    workers.crew().check()
                writer.finish()


def _captured(run: Run, samples: Sequence[Sample], done: Collection[str]) -> Iterator[Sample]:
    options = run.file.cache
    # Eight-bit features need scales, which the format computes from full precision.
    dtype = None if options.dtype == "float8_e4m3" else torch_dtype(options.dtype)
    layers = run.file.target.layers
    return capture(samples, run.target.model, layers, batch_size=options.batch_size, dtype=dtype, done=done)


def _parts(order: Sequence[Sample], done: Collection[str], most: int) -> list[Part]:
    """The samples that are missing, in runs without a gap of at most `most`."""
    parts: list[Part] = []
    for number, sample in enumerate(order):
        if sample.id in done:
            continue
        if parts and sum(parts[-1]) == number and parts[-1][1] < most:
            parts[-1] = (parts[-1][0], parts[-1][1] + 1)
        else:
            parts.append((number, 1))
    return parts


def _has_gaps(order: Sequence[Sample], parts: Sequence[Part]) -> bool:
    """Whether samples that are done stand behind missing ones. Written at the end, those would be out of order."""
    return bool(parts) and parts[0][0] + sum(count for _, count in parts) < len(order)


def _place(folder: Path, part: Part) -> Path:
    return folder / f"{_PART}{part[0]:09d}"


def _absorb_finished(writer: MergingWriter, cache_format: CacheFormat, folder: Path, header: CacheHeader) -> None:
    """Take over the parts that earlier workers finished, and remove the others."""
    for place in sorted(folder.glob(f"{_PART}*")):
        try:
            finished = set(cache_format.open(place, header).ids())
        except CacheError:  # its samples are captured again
            finished = set()
        if finished and finished.isdisjoint(writer.written()):
            writer.absorb(place)
        else:
            shutil.rmtree(place)


def _digest(header: CacheHeader, order: Sequence[Sample]) -> str:
    """Tells what one worker writes from what another does. Sources, template and tokenizer are in the header."""
    digest = hashlib.sha256(json.dumps(header.as_json(), sort_keys=True).encode("utf-8", "surrogatepass"))
    for sample in order:
        digest.update(json.dumps([sample.id, len(sample.input_ids)]).encode())
    return digest.hexdigest()
