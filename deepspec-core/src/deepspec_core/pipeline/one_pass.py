"""Answers and features in one pass: the regenerate stage stores features that the cache stage then need not request.

The key [regenerate] features switches it on. The features stay in the regenerate stage's folder until the cache is
complete. They belong to token ids of one target with its taps and number format, not to conversations. Knows a run's
stages and folders; does not know how servers are asked, or how features are stored.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from attrs import evolve, frozen

from deepspec_core.cache.manifest import check_header
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.crew import ALONE
from deepspec_core.data.answering import Answer
from deepspec_core.data.samples import Samples
from deepspec_core.dtypes import torch_dtype
from deepspec_core.errors import DeepSpecError, StageError
from deepspec_core.features.kept import STORE, KeptFeatures, KeptWriter, discard
from deepspec_core.features.served.answered import WITHOUT_FILES, AnsweringWithFeatures
from deepspec_core.features.served.capturing import in_dtype
from deepspec_core.features.served.exchange import Ownership, owner_of
from deepspec_core.features.served.source import FeatureServers
from deepspec_core.features.served.stage_record import read_record
from deepspec_core.pipeline import feature_servers, workers
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.serving import farm_of
from deepspec_core.servers.answering import Answering
from deepspec_core.servers.farm import Farm
from deepspec_core.servers.vllm_command import ROOM

log = logging.getLogger("deepspec")

FOLDER: Final = "features"
_EARLIER: Final = "a further question was to follow the answer"
_NOT_LAST: Final = "it ends in an earlier answer, which was rendered anew"
_NOT_KEPT: Final = "no features were kept"


def folder_of(run: Run) -> Path:
    """The folder in which the features of a run's answers are stored."""
    return run.stage_folder("regenerate") / FOLDER


def check(run: Run, *, may_write: bool = True) -> None:
    """ConfigError, before the first stage, where a server cannot give answers with features."""
    trial = Ownership(owner=owner_of(run.folder, may_write=may_write), rank=workers.rank(), world=workers.count())
    servers = feature_servers.servers_of(run, ownership=trial, alone=True)
    work: Any = servers.farm.work
    try:
        _farm(run, servers).check()
    finally:
        work.exchange.clear(session=True)  # another process may be at work in this run


@frozen(kw_only=True)
class Keeping:
    """A regenerate stage that keeps features. `farm` answers."""

    farm: Farm
    writer: KeptWriter
    taps: tuple[int, ...]
    dtype: torch.dtype | None

    def keep(self, line: Mapping[str, Any], answer: Answer) -> None:
        """The features of a conversation's last text, before its line counts.

        Raises CacheError if one is not finite.
        """
        for prompt_ids, output_ids in line["rewritten"]:
            self.writer.lacks(_text(prompt_ids, output_ids), _NOT_LAST)
        text_T = _text(line["prompt_ids"], line["output_ids"])
        said = answer.completion
        own = text_T.tolist() == [*said.prompt_ids, *said.output_ids]
        if own and answer.features is not None:
            self.writer.keep(text_T, in_dtype(answer.features, self.dtype, self.taps, line["id"]))
        else:
            self.writer.lacks(text_T, (answer.lacks or _EARLIER) if own else _EARLIER)


@contextmanager
def keeping(run: Run) -> Iterator[Keeping]:
    """The stage's servers, and the place of the features. At the end, this run's files in the exchange are removed."""
    folder = folder_of(run)
    # No answer depends on what is read here: features that were kept for other settings are discarded.
    with run.reads.unnoted():
        _discard_others(run)
        folder.mkdir(parents=True, exist_ok=True)
        record = folder / feature_servers.RECORD
        servers = feature_servers.begin(run, "regenerate", record=record, crew=ALONE)
        cache_format, header = run.cache.format, _header(run)
        taps, dtype = run.file.target.layers, run.cache.options.dtype
    work: Any = servers.farm.work
    try:
        with KeptWriter(cache_format, folder, header) as writer:
            yield Keeping(
                farm=_farm(run, servers),
                writer=writer,
                taps=taps,
                # Eight-bit features need scales, which the format computes from full precision.
                dtype=None if dtype == "float8_e4m3" else torch_dtype(dtype),
            )
    finally:
        work.exchange.clear()


def kept_of(run: Run) -> KeptFeatures | None:
    """The stored features that the cache stage need not request; None if there are none. Warns of unusable ones."""
    if not run.has("regenerate") or not (folder := folder_of(run)).exists():
        return None
    if not run.file.regenerate.features:
        log.warning("features that were received with answers are not used, because regenerate.features = false")
        return None
    _discard_others(run)
    kept: KeptFeatures | None = None
    try:
        _require_begun_alike(run)
        kept = KeptFeatures(run.cache.format, folder, _header(run)) if folder.exists() else None
    except DeepSpecError as error:
        log.warning(
            "features that were received with answers cannot be used; servers are asked for them again: %s", error
        )
    # The workers ask servers together, so the first one decides for all. What it can read, they can.
    usable = workers.crew().told_by_first("features that came with answers can be used", kept is not None)
    return (kept or KeptFeatures(run.cache.format, folder, _header(run))) if usable else None


def begin_alike(run: Run) -> None:
    """Let the cache stage begin with the record that the regenerate stage made of its servers.

    The servers of both stages must give the same features, because one cache holds the features of both.
    """
    there, here = _records(run)
    if workers.crew().first and there.exists() and not here.exists():
        here.parent.mkdir(parents=True, exist_ok=True)
        partial = here.with_name(f".{here.name}.partial")
        shutil.copyfile(there, partial)
        os.replace(partial, here)


def _records(run: Run) -> tuple[Path, Path]:
    """The records of the regenerate stage and of the cache stage."""
    return folder_of(run) / feature_servers.RECORD, run.stage_folder("cache") / feature_servers.RECORD


def _require_begun_alike(run: Run) -> None:
    """StageError where a part of the cache is there, and was begun with other features than those that are kept."""
    there, here = _records(run)
    begun = feature_servers.begun_with(here, "cache")
    if begun is not None and there.exists() and there.read_bytes() != here.read_bytes():
        raise StageError(
            "The cache was begun with features that servers gave at another time",
            where=here,
            found=f"another record than {there}",
            expected="the record of the regenerate stage, since one cache holds the features of both",
        )


def told(samples: Samples, kept: KeptFeatures | None) -> Counter[str]:
    """The number of samples whose features came with their answers (""), and of the others by reason."""
    if kept is None:
        return Counter({_NOT_KEPT: len(samples)})
    each = (samples.sample(number) for number in range(len(samples)))
    return Counter("" if kept.has(sample) else kept.why_not(sample) for sample in each)


def end(run: Run) -> None:
    """Remove the stored features; called when the cache is complete."""
    if run.has("regenerate"):
        discard(folder_of(run))


def _text(prompt_ids: Any, output_ids: Any) -> torch.Tensor:
    return torch.tensor([*prompt_ids, *output_ids], dtype=torch.int64)


def _farm(run: Run, servers: FeatureServers) -> Farm:
    plain, features = farm_of(run), servers.farm.work
    answering: Any = plain.work
    work: Any = features
    work.wanted = evolve(work.wanted, max_length=run.data.max_length + ROOM)
    own = Answering(answering.wanted, dialects=(WITHOUT_FILES,))
    return evolve(plain, work=AnsweringWithFeatures(answering=own, features=work))


def _header(run: Run) -> CacheHeader:
    """A header with everything that features depend on beside token ids."""
    return evolve(run.cache.bare_header(), revision=run.target.fingerprint())


def _discard_others(run: Run) -> None:
    """Remove, with a warning, features that were stored for another target, other taps or another number format."""
    folder = folder_of(run)
    if not folder.exists() or not workers.crew().first:
        return
    try:
        found, record = run.cache.format.header(folder / STORE), folder / feature_servers.RECORD
        if found is not None:
            check_header(folder, found, _header(run))
        if found is not None or record.exists():
            read_record(record)
    except DeepSpecError as error:
        log.warning("features that were received with answers are discarded: %s", error)
        discard(folder)
