"""The cache stage. It checks that the disk has room, and writes the target features of every training sample once."""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final

from deepspec_core.cache.estimate import cache_bytes, require_space
from deepspec_core.cache.filling import Filling, fill
from deepspec_core.cache.names import Names
from deepspec_core.contracts.draft import Sample
from deepspec_core.dtypes import torch_dtype
from deepspec_core.features.capture import capture
from deepspec_core.pipeline import contents, one_pass, workers
from deepspec_core.pipeline.fingerprint import RECORD
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.serving import uses_servers

log = logging.getLogger("deepspec")

SERVERS: Final = "servers"


def run_stage(run: Run) -> dict[str, Any]:
    """Write the cache. Sealed shards of an interrupted run are kept.

    Raises CacheError if the disk has no room for it.
    """
    options, cache_format, folder = run.file.cache, run.cache.format, run.cache.folder
    samples = run.cache.samples()
    order = samples.longest_first()  # as `capture` goes through them
    ids, mask = Names(samples.ids()), run.data.mask_token
    # Eight-bit features need scales, which the format computes from full precision.
    dtype = None if options.dtype == "float8_e4m3" else torch_dtype(options.dtype)

    run.reads.content(contents.COMPUTED_BY, computed_by(run))
    servers, kept, came = None, one_pass.kept_of(run), Counter[str]()
    if uses_servers(run, "cache"):
        from deepspec_core.features.served.capturing import captured_by
        from deepspec_core.pipeline.feature_servers import begin

        # The features are this target's, although its weights are not read here.
        run.reads.content(contents.TARGET, run.target.content_digest())
        if run.file.regenerate.features:
            came = one_pass.told(samples, kept)
            if kept is not None:
                one_pass.begin_alike(run)
            for reason, count in came.most_common():
                log.info(
                    "features of %d samples %s", count, _asked(reason) if reason else "were received with their answers"
                )
        if came[""] < len(samples):
            servers = begin(run, "cache")

    def captured(done: Collection[str], waiting: Callable[[], None]) -> Iterator[Sample]:
        taps = run.file.target.layers
        if servers is not None or kept is not None:
            return captured_by(servers, samples, taps, dtype=dtype, done=done, kept=kept, waiting=waiting)
        return capture(samples, run.target.model, taps, batch_size=options.batch_size, dtype=dtype, done=done)

    def room(tokens: int, shards: int) -> None:
        require_space(folder, cache_bytes(cache_format, run.cache.bare_header(), tokens, shards=shards))

    work = Filling(
        cache_format=cache_format,
        folder=folder,
        header=run.cache.header(),
        ids=ids.take(order),
        lengths=array("i", samples.lengths()[order]),
        captured=captured,
        require_space=room,
        shard_samples=options.shard_samples,
        samples_with={} if mask is None else {mask: len(samples.with_token(mask))},
    )
    crew = workers.crew()
    fill(work, crew)
    given = {} if servers is None else servers.summary(crew)
    if not crew.first:
        return {}
    run.cache.written()
    one_pass.end(run)
    return {
        "samples": len(samples),
        "tokens": int(samples.lengths().sum()),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.name != RECORD),
        **run.data.losses(),
        **given,
        **({"with answers": came.pop("", 0), "asked again": dict(came)} if came else {}),
    }


def _asked(reason: str) -> str:
    return f"are asked for: {reason}"


def computed_by(run: Run) -> str:
    """What computes the features: another number format and other kernels make them a little different."""
    return SERVERS if uses_servers(run, "cache") else "this process"
