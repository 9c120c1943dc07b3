"""Filling a cache, alone or by several workers.

Several workers write parts: caches of one shard each, in folders of their own inside the cache's, which the first
worker moves into the cache. Which samples a part has follows from their order, not from who writes it, so a finished
part counts whatever the number of workers is when an interrupted filling goes on. Knows caches and samples; not how
features are computed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from attrs import field, frozen

from deepspec_core.contracts.cache import CacheFormat, CacheHeader, MergingWriter
from deepspec_core.contracts.draft import Sample
from deepspec_core.crew import Crew, SharedProgress
from deepspec_core.errors import CacheError
from deepspec_core.stopping import StopRequest

log = logging.getLogger("deepspec")

_PART: Final = "part-"

Part = tuple[int, int]
"""The number of its first sample in the order of capture, and how many follow: the samples of one shard."""


@frozen(kw_only=True)
class Filling:
    """What is written, and where.

    ids, lengths: The ids and the tokens of all samples, in the order in which the cache has them.
    captured: captured(done, waiting) gives them with features, in that order, those left out whose ids are in `done`.
        If it waits for servers, it calls `waiting` now and then, which raises an error to stop.
    require_space: require_space(tokens, shards) raises where the disk has no room for so many.
    samples_with: Token -> how many samples have it, for a cache that can note it (contracts.cache.CacheReader).
    """

    cache_format: CacheFormat
    folder: Path
    header: CacheHeader
    ids: Sequence[str]
    lengths: Sequence[int]
    captured: Callable[[Collection[str], Callable[[], None]], Iterator[Sample]]
    require_space: Callable[[int, int], None]
    shard_samples: int
    samples_with: Mapping[int, int] = field(factory=dict)

    def place(self, part: Part) -> Path:
        """The folder of a part."""
        return self.folder / f"{_PART}{part[0]:09d}"

    def digest(self) -> str:
        """Tells what one worker writes from what another does. Sources, template and tokenizer are in the header."""
        digest = hashlib.sha256(json.dumps(self.header.as_json(), sort_keys=True).encode("utf-8", "surrogatepass"))
        for one in zip(self.ids, self.lengths, strict=True):
            digest.update(json.dumps(one).encode())
        return digest.hexdigest()

    def parts(self, done: Collection[str]) -> list[Part]:
        """The samples that are not done, in runs without a gap."""
        parts: list[Part] = []
        for number, name in enumerate(self.ids):
            if name in done:
                continue
            if parts and sum(parts[-1]) == number and parts[-1][1] < self.shard_samples:
                parts[-1] = (parts[-1][0], parts[-1][1] + 1)
            else:
                parts.append((number, 1))
        return parts


def fill(work: Filling, crew: Crew) -> None:
    """Write the missing samples, and finish the cache. Their order does not depend on who wrote them."""
    crew.require_shared(work.folder)
    if crew.first:
        _lead(work, crew)
        return
    digest, parts, done = crew.told_by_first("cache parts")
    if digest != work.digest():
        raise CacheError(
            f"Worker {crew.rank} has other inputs for the cache than the first worker",
            where=work.folder,
            expected="the same target, sources, tokenizer and versions on every machine",
        )
    with crew.progress(len(work.ids), "cache", "samples", done=done) as progress:
        _write_parts(work, crew.share([(first, count) for first, count in parts]), crew, progress)


def _lead(work: Filling, crew: Crew) -> None:
    with closing(work.cache_format.create(work.folder, work.header, shard_samples=work.shard_samples)) as writer:
        merging = writer if isinstance(writer, MergingWriter) else None
        if merging is not None:
            _absorb_finished(work, merging)
        elif crew.count > 1:
            log.warning(
                "several workers cannot write a cache of this format together: the first worker writes it alone"
            )
        done = writer.written()
        parts = work.parts(done)
        missing = [number for number, name in enumerate(work.ids) if name not in done]
        work.require_space(sum(work.lengths[number] for number in missing), len(parts))
        # Samples that are done behind missing ones, as after several workers: written at the end, those would be out of
        # order.
        gaps = bool(missing) and missing[0] != len(work.ids) - len(missing)
        in_parts = merging is not None and (crew.count > 1 or gaps)
        crew.told_by_first("cache parts", [work.digest(), parts if in_parts else [], len(done)])
        with crew.progress(len(work.ids), "cache", "samples", done=len(done)) as progress:
            if in_parts:
                _write_parts(work, crew.share(parts), crew, progress)
            else:
                with StopRequest() as request:
                    for sample in work.captured(done, request.check):
                        writer.write(sample)
                        progress.advance()
                        request.check()  # here and not inside HDF5, which cannot take an exception
        if in_parts:
            assert merging is not None, "as asked above"
            for part in parts:
                crew.require_seen(work.place(part))
                merging.absorb(work.place(part))
            merging.arrange({name: number for number, name in enumerate(work.ids)})
        if (note := getattr(writer, "note_samples_with", None)) is not None:
            for token, count in work.samples_with.items():
                note(token, count)
        writer.finish()


def _write_parts(work: Filling, parts: Sequence[Part], crew: Crew, progress: SharedProgress) -> None:
    """Each part as a finished cache of its own."""
    own = {work.ids[number] for first, count in parts for number in range(first, first + count)}
    with StopRequest() as request:

        def waiting() -> None:
            request.check()
            crew.check()

        captured = work.captured(set(work.ids) - own, waiting)
        for part in parts:
            with closing(
                work.cache_format.create(work.place(part), work.header, shard_samples=work.shard_samples)
            ) as writer:
                for _ in range(part[1]):
                    writer.write(next(captured))
                    progress.advance()
                    waiting()
                writer.finish()


def _absorb_finished(work: Filling, writer: MergingWriter) -> None:
    """Take over the parts that earlier workers finished, and remove the others."""
    for place in sorted(work.folder.glob(f"{_PART}*")):
        try:
            finished = set(work.cache_format.open(place, work.header).ids())
        except CacheError:  # its samples are captured again
            finished = set()
        if finished and finished.isdisjoint(writer.written()):
            writer.absorb(place)
        else:
            shutil.rmtree(place)
