"""The conversations of a run's sources: split, mixed and without duplicates.

Does not know where the rows of a source are found (source_rows.py), or templates, tokens, or how conversations are
used.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

from attrs import evolve

from deepspec_core.config.schema import BUILTIN, SourceOptions
from deepspec_core.data.bad_rows import BadRow, BadRows, OfOneSource
from deepspec_core.data.columns import ColumnMap
from deepspec_core.data.conversations import Conversation, from_row
from deepspec_core.data.dialogue import has_results
from deepspec_core.data.digest_set import DigestSet, digest16
from deepspec_core.data.prepared import is_prepared, manifest_of
from deepspec_core.data.shipped_prompts import Registry, not_held_out
from deepspec_core.data.source_row import SourceRow
from deepspec_core.data.source_rows import check_source, columns_of, has_splits, on_hub, rows_of
from deepspec_core.data.split import RULE, Split, is_held_out, prompt_digest, whole_prompt_digest
from deepspec_core.errors import DataError
from deepspec_core.progress import Progress

log = logging.getLogger("deepspec")

_SHOWN_BYTES: Final = 1 << 26
_DROPS_SHOWN: Final = 5
# Too many bad rows may be all rows of a large source.
_KEPT: Final = 10_000


def read_sources(
    sources: Sequence[SourceOptions],
    *,
    split: Split,
    held_out: float,
    seed: int,
    base: Path,
    registry: Registry,
    counts: Counter[str] | None = None,
    bad_rows: BadRows | None = None,
    duplicates: str = "keep",
    own: bool = False,
) -> Iterator[Conversation]:
    """The conversations of one split, lazily, each once.

    Conversations are split by what the first user asks (split.py), so that no question stands in both splits, whatever
    is read, in whatever order, under whatever id. Prompts a plugin ships have splits of their own; beside another
    source they are split by their question as well. A prepared folder keeps its split, and stands alone. `limit` caps
    the train conversations of a source.

    Sources are interleaved in proportion to their weights for as long as they last; every conversation comes once, so
    weights decide the order, and limits how much. `counts` receives `conversations`, `duplicates` (same id, same
    content: dropped), `renamed` (same id, other content: kept under a longer id), `same_question` (the first user
    asks what an earlier conversation's asked: kept), `same_prompt` (systems and users say what they said in an earlier
    conversation: dropped if `duplicates` is "drop", and counted only then), `unusable` (rows that say what no
    conversation here can hold) and `malformed` (rows that are no conversation). The last two are dropped, and kept and
    limited by `bad_rows`; without it the first of them is an error.

    `own`: what this project wrote itself is read, where a row may have any length.

    Raises DataError if a source is missing or not readable, or has too many bad rows. Where `check_rows` has not
    counted them, because the source does not lie on this machine, far too many of the first rows are enough.
    """
    _refuse_beside_prepared(sources, base)
    counts = Counter() if counts is None else counts
    alone = len(sources) == 1
    streams = [
        _of_split(source, split, held_out, seed, base, registry, counts, bad_rows, alone=alone, own=own)
        for source in sources
    ]
    # Digests only: 100 to 200 bytes a conversation, however long it is.
    ids, contents, asked, prompts = DigestSet(), DigestSet(), DigestSet(), DigestSet()
    for conversation in _interleave(streams, [source.weight for source in sources]):
        digest = conversation.digest
        renamed = f"{conversation.id}-{digest[:12]}"
        known = digest16(conversation.id) in ids
        if known and (_named(conversation.id, digest) in contents or digest16(renamed) in ids):
            counts["duplicates"] += 1
            continue
        if duplicates == "drop" and not prompts.add(whole_prompt_digest(conversation)):
            counts["same_prompt"] += 1
            continue
        if known:
            counts["renamed"] += 1
            conversation = evolve(conversation, id=renamed)
        ids.add(digest16(conversation.id))
        contents.add(_named(conversation.id, digest))
        counts["same_question"] += not asked.add(prompt_digest(conversation))
        counts["conversations"] += 1
        yield conversation


def _named(identity: str, digest: str) -> bytes:
    """A digest of a conversation's id and content. `digest` has a fixed length."""
    return digest16(digest + identity)


def check_sources(sources: Sequence[SourceOptions], *, base: Path, registry: Registry) -> None:
    """DataError where a source is not there. No conversation is read; of Hub datasets only what describes them is."""
    _refuse_beside_prepared(sources, base)
    for source in sources:
        check_source(source, base=base, registry=registry)


def split_of(sources: Sequence[SourceOptions], *, base: Path, held_out: float, seed: int) -> dict[str, Any]:
    """`rule`, `held_out` and `seed` of the split: an only source's own where it has one, else the rule of split.py."""
    own = {"rule": RULE, "held_out": held_out, "seed": seed}
    if len(sources) > 1 or not has_splits(sources[0], base):
        return own
    if sources[0].path.startswith(BUILTIN):
        return {**own, "rule": f"the split of {sources[0].path}"}
    return manifest_of(base / sources[0].path).split


def _refuse_beside_prepared(sources: Sequence[SourceOptions], base: Path) -> None:
    """Raise DataError for a prepared folder beside other sources, or read in another way than as it is.

    Its split is kept. Another source, split otherwise, might train on what it holds out.
    """
    for source in sources:
        if not is_prepared(base / source.path):
            continue
        if len(sources) > 1:
            raise DataError(
                "A prepared folder must be the only source, because its split is kept",
                where=f"data.sources: {source.path}",
                found=f"{len(sources)} sources",
                expected="no other source",
                fix="Prepare all sources together: name them in one run file, prepare it, and name "
                "the prepared folder here.",
            )
        for key in ("columns", "split"):
            if getattr(source, key):
                raise DataError(
                    f"A prepared folder needs no `{key}`",
                    where=f"data.sources: {source.path}",
                    found=getattr(source, key),
                    fix=f"Remove {key}.",
                )


def check_rows(
    sources: Sequence[SourceOptions],
    *,
    held_out: float,
    seed: int,
    base: Path,
    registry: Registry,
    max_bad_rows: float = 1.0,
    keep_in: Path | None = None,
    counts: Counter[str] | None = None,
) -> int | None:
    """The most turns of a user in one conversation; None where not every source is read.

    `counts` is told of the `conversations` that were read, and how many are `with_results` of tools.

    Raises DataError if a source has too many bad rows, or if there is nothing to train on. Files and dataset folders
    are read as far as training reads them, and bad rows are warned about. The file `keep_in` gets the first of too
    many. Of the Hub nothing is read, and what a plugin ships is believed.
    """
    local = [source for source in sources if _is_local(source, base)]
    found, turns, warned = 0, 0, 0

    def warn(bad: BadRow) -> None:
        nonlocal warned
        warned += 1
        if warned <= _DROPS_SHOWN:
            log.warning("%s cannot be used and is left out: %s", bad.where, bad.reason)

    bad_rows = BadRows(most=max_bad_rows, keep_in=keep_in, most_kept=_KEPT, tell=warn)
    with Progress(None, "check the rows of data.sources", "rows", enabled=_large(local, base)) as progress:
        for source in local:
            for conversation in _of_split(
                source, "train", held_out, seed, base, registry, Counter(), bad_rows, alone=True
            ):
                found += 1
                if counts is not None:
                    counts.update(conversations=1, with_results=has_results(conversation))
                turns = max(turns, sum(message["role"] == "user" for message in conversation.messages))
                progress.advance()
    if warned > _DROPS_SHOWN:
        log.warning("%s rows of data.sources cannot be used and are left out", f"{warned:,}")
    if not found and len(local) == len(sources):
        raise DataError(
            "There is no conversation to train on",
            where="data.sources: " + ", ".join(source.path for source in sources),
            found=f"{warned:,} unusable rows; others, if any, are held out (data.held_out = {held_out:g})",
            expected="at least one conversation",
            fix="Add data to the sources, or lower data.held_out.",
        )
    return turns if len(local) == len(sources) else None


def _is_local(source: SourceOptions, base: Path) -> bool:
    """Whether the source lies on this machine. All of it is then read before the first stage."""
    return not source.path.startswith(BUILTIN) and not on_hub(source, base)


def _large(sources: Sequence[SourceOptions], base: Path) -> bool:
    """Whether reading all of it takes long enough for a progress bar."""
    places = [base / source.path for source in sources]
    files = [file for place in places for file in (place.rglob("*") if place.is_dir() else [place]) if file.is_file()]
    return sum(file.stat().st_size for file in files) >= _SHOWN_BYTES


def _of_split(
    source: SourceOptions,
    split: Split,
    held_out: float,
    seed: int,
    base: Path,
    registry: Registry,
    counts: Counter[str],
    bad_rows: BadRows | None,
    *,
    alone: bool,
    own: bool = False,
) -> Iterator[Conversation]:
    """A source's conversations of one split, at most `limit` of them in training.

    `alone`: there is no other source, which might repeat its prompts.
    """
    read = OfOneSource(source.path, checked=_is_local(source, base))
    rows = rows_of(source, split, seed=seed, base=base, registry=registry, own=own)
    conversations = _usable(rows, columns_of(source), counts, bad_rows, read)
    if not (alone and has_splits(source, base)):
        conversations = (
            one
            for one in conversations
            if is_held_out(prompt_digest(one), held_out=held_out, seed=seed) == (split == "held_out")
        )
    elif split == "train" and source.path.startswith(BUILTIN):
        conversations = not_held_out(
            conversations, source.path, seed=seed, registry=registry, columns=columns_of(source).read
        )
    yield from islice(conversations, source.limit if split == "train" else None)
    if bad_rows is not None:
        bad_rows.check(read)


def _usable(
    rows: Iterable[SourceRow], columns: ColumnMap, counts: Counter[str], bad_rows: BadRows | None, read: OfOneSource
) -> Iterator[Conversation]:
    """The conversations of rows. Bad rows are dropped and counted, or errors where there is no `bad_rows`."""
    for row in rows:
        read.rows += 1
        try:
            yield from_row(columns.row(row.content(), row.where), row.where)
        except DataError as error:
            if bad_rows is None:
                raise
            counts[bad_rows.add(row, error, read)] += 1
    if read.rows:
        columns.check_seen()


def _interleave(streams: Sequence[Iterator[Conversation]], weights: Sequence[float]) -> Iterator[Conversation]:
    """Interleave streams: next comes the one that is furthest behind its share; of equal ones, the earlier."""
    taken = dict.fromkeys(range(len(streams)), 0)
    while taken:
        index = min(taken, key=lambda i: ((taken[i] + 1) / weights[i], i))
        conversation = next(streams[index], None)
        if conversation is None:
            del taken[index]
        else:
            taken[index] += 1
            yield conversation
