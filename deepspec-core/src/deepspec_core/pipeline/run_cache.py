"""A run's feature cache: its folder, its header, and opening it.

Knows the run file's [cache]; does not know how features are stored (cache/) or computed (features/).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import define, evolve, field

from deepspec_core.cache.manifest import check_header
from deepspec_core.cache.manifest_digest import CANNOT_BE_CHECKED
from deepspec_core.cache.part import SomeSamples
from deepspec_core.cache.taps import covers, of_taps
from deepspec_core.config.schema import CacheOptions
from deepspec_core.contracts.cache import CacheFormat, CacheHeader, CacheReader
from deepspec_core.data.split import RULE
from deepspec_core.errors import CacheError, DataError
from deepspec_core.locks import Lock, lock
from deepspec_core.pipeline import contents, workers
from deepspec_core.pipeline.reads import Reads
from deepspec_core.pipeline.run_data import RunData
from deepspec_core.pipeline.run_target import RunTarget
from deepspec_core.plugins.registry import Registry

if TYPE_CHECKING:
    from deepspec_core.data.samples import Samples
    from deepspec_core.data.subset import Numbers

log = logging.getLogger("deepspec")


@define(kw_only=True)
class RunCache:
    """[cache] in effect.

    made_here: This run has the stage that writes it.
    by_servers: Servers compute the features, in numbers that are not known here.
    """

    options: CacheOptions
    folder: Path
    made_here: bool
    target: RunTarget
    data: RunData
    reads: Reads
    registry: Registry
    plugin_versions: Mapping[str, str]
    by_servers: bool = False
    _held: Lock = field(factory=lambda: Lock(None), init=False)
    _written_now: bool = field(default=False, init=False)

    @property
    def format(self) -> CacheFormat:
        """The format the run file names."""
        cache_format: CacheFormat = self.registry.cache_format(self.options.format)
        return cache_format

    def header(self) -> CacheHeader:
        """What a cache of this run is made from."""
        if self.data.regenerated is not None:
            return self._header(self.data.regenerated_digest())
        data = self.data.options
        content = [self.data.source_digest(index, ask_hub=True) for index in range(len(data.sources))]
        facts = [[str(option) for option in data.sources], content, RULE, data.held_out, self.data.seed]
        if any(option.columns for option in data.sources):
            facts.append([option.columns for option in data.sources])
        if data.duplicates != "keep":
            facts.append(data.duplicates)
        return self._header(hashlib.sha256(json.dumps(facts).encode()).hexdigest())

    def _header(self, source: str) -> CacheHeader:
        tokenizer = self.target.tokenizer
        return evolve(
            self.bare_header(),
            revision=self.target.fingerprint(),
            tokenizer=tokenizer.tokenizer_fingerprint(),
            template=tokenizer.template_fingerprint(
                self.target.adapter.conversation_format(), self.data.options.system_prompt, self.data.supervision
            ),
            source=source,
            computed_in="" if self.by_servers else str(self.target.dtype).removeprefix("torch."),
            split=self._split(),
            subset="" if self.options.subset is None else str(self.options.subset),
        )

    def header_of(self, source: str) -> CacheHeader:
        """What a cache of this run's target and settings says, made from other conversations than the run's own."""
        return evolve(self._header(source), split="", subset="", computed_in="")

    def _split(self) -> str:
        split = self.data.split()
        return f"{split['rule']}, held_out {split['held_out']:g}, seed {split['seed']}"

    def bare_header(self) -> CacheHeader:
        """The header without its digests: enough to know sizes before data and tokenizer are read."""
        architecture = self.target.architecture
        return CacheHeader(
            target=self.target.options.model,
            revision="",
            adapter=architecture.model_type,
            taps=self.target.options.layers,
            hidden_size=architecture.hidden_size,
            vocab_size=architecture.vocab_size,
            dtype=self.options.dtype,
            tokenizer="",
            template="",
            max_length=self.data.options.max_length,
            source="",
            plugins=dict(self.plugin_versions),
        )

    def open(self) -> CacheReader:
        """The finished cache; raises CacheError if it is missing, unfinished, or made for something else.

        Another run's cache may have more taps than this run asks for. Those are not read.
        """
        cache_format, taps = self.format, self.target.options.layers
        expected = self.header() if self.made_here else self._like(cache_format.open(self.folder, None).header)
        self._held = self.locked(shared=True)
        reader = cache_format.open(self.folder, expected)
        if not self._written_now:
            self._verify()
        if not getattr(reader, "has_digest", True):
            log.warning("cache %s: %s", self.folder, CANNOT_BE_CHECKED)
        self.reads.content(contents.CACHE, self.digest())
        if reader.header.taps != taps:
            log.info("the cache has taps %s; this run reads %s", list(reader.header.taps), list(taps))
        part = self.part_of(of_taps(reader, taps))
        if len(part) < len(reader):
            log.info("the cache has %s samples; cache.subset selects %s", f"{len(reader):,}", f"{len(part):,}")
        return part

    def samples(self) -> Samples:
        """The training samples that belong into the cache: those of cache.subset, or all."""
        from deepspec_core.data.subset import SamplesOfPart

        samples = self.data.training_samples()
        numbers = self._part(samples.ids(), len(samples))
        if numbers is None:
            return samples
        self.data.counts["not_in_subset"] = len(samples) - len(numbers)
        log.info("there are %s samples; cache.subset selects %s", f"{len(samples):,}", f"{len(numbers):,}")
        return SamplesOfPart(samples, numbers)

    def part_of(self, reader: CacheReader) -> CacheReader:
        """The samples of cache.subset, which are all of a cache that this run makes.

        Raises DataError if there is none.
        """
        numbers = None if self.made_here else self._part(reader.ids(), len(reader))
        if numbers is None:
            return reader
        self.data.counts["not_in_subset"] = len(reader) - len(numbers)
        return SomeSamples(reader, numbers)

    def _part(self, ids: Iterable[str], count: int) -> Numbers | None:
        from deepspec_core.data.subset import part_of

        subset = self.options.subset
        if subset is None:
            return None
        numbers = part_of(ids, subset)
        if not len(numbers):
            raise DataError(
                "No sample is left to train on",
                where="cache.subset",
                found=f"{subset:g} of {count:,} samples",
                expected="a part with at least one sample",
                fix="Raise cache.subset, or give a number of samples, such as 100.",
            )
        if subset > count:
            log.warning("cache.subset asks for %s samples, but there are only %s", f"{subset:,}", f"{count:,}")
        return numbers

    def expected_samples(self) -> int | None:
        """How many samples the cache has at most, as far as limits of sources and cache.subset say; else None.

        For a share, the number is approximate. Each conversation counts as one sample.
        """
        subset, most = self.options.subset, self.data.expected_conversations()
        if subset is None or (most is None and isinstance(subset, float)):
            return most
        if isinstance(subset, float):
            assert most is not None, "as asked above"
            return math.ceil(most * subset)
        return subset if most is None else min(subset, most)

    def _like(self, found: CacheHeader) -> CacheHeader:
        """What this run expects of a cache that another run made.

        It may be made of conversations that this run does not have, or of a part of them, which is not compared, and
        have more taps.
        """
        expected = evolve(self._header(found.source), subset=found.subset)
        return evolve(expected, taps=found.taps) if covers(found, expected) else expected

    def written(self) -> None:
        """Note that this process has just written the cache, so that it need not verify it."""
        self._written_now = True

    def _verify(self) -> None:
        """Read the stored files, each worker its share; raises CacheError for the first damage.

        Every time: a disk that loses bits changes no time of a file.
        """
        problems = self.format.verify(self.folder, part=workers.rank(), parts=workers.count(), remembered=False)
        if problems:
            log.error("%d damaged or missing files in the cache; `deepspec cache verify` names them all", len(problems))
            raise problems[0]

    def refuse_another(self) -> bool:
        """Whether a cache of this run is there, finished or not. Raises CacheError if it is damaged or another's.

        The conversations are not compared: before the first stage they may not be answered yet.
        """
        found = self.format.header(self.folder)
        if found is None:
            return False
        check_header(self.folder, found, self._header(found.source))
        return True

    def require(self) -> None:
        """Raise CacheError if the cache that another run made is not there, not finished, or not for this run."""
        reader = self.format.open(self.folder, None)
        check_header(self.folder, reader.header, self._like(reader.header))
        self.part_of(reader)

    def require_same_split(self) -> None:
        """Raise CacheError if held-out prompts of this run may stand in the cache that another run made."""
        found = self.format.header(self.folder)
        if found is not None and found.split != self._split():
            raise CacheError(
                "The cache was made with another split, so it may contain held-out prompts of this run",
                where=self.folder,
                found=found.split or "a cache that does not record its split",
                expected=self._split(),
                fix="Set data.held_out and run.seed to those of the cache, or name other evaluate.tasks than held-out.",
            )

    def locked(self, *, shared: bool = False) -> Lock:
        """Hold the cache's folder, which other runs may name too; StageError where another process is in the way."""
        return lock(
            self.folder,
            shared=shared,
            problem=f"Another process is {'writing' if shared else 'using'} this cache",
            fix="Wait for it, stop it, or give this run another cache.path.",
        )

    def let_go(self) -> None:
        """Release the opened cache, so that others may write it."""
        self._held.release()

    def digest(self) -> str:
        """What tells this cache from another: its samples, in order, and what it was made from."""
        reader = self.format.open(self.folder, None)
        content = [reader.header.as_json(), reader.ids(), reader.lengths()]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()
