"""Where conversations come from: prompts a plugin ships, JSON-lines files, datasets; split, mixed and without doubles.

Knows how to find and split conversations; does not know templates, tokens or what is done with them.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from typing import Any, Final, Protocol

from attrs import evolve

from deepspec_core.config.schema import BUILTIN, JSON_LINES, SourceOptions
from deepspec_core.data.conversations import Conversation, from_row
from deepspec_core.data.messages import UnusableRow
from deepspec_core.data.split import Split, is_held_out, prompt_digest
from deepspec_core.errors import DataError, nearest
from deepspec_core.hub import say_local_copy, why_unreachable
from deepspec_core.json_lines import read_json_lines
from deepspec_core.progress import Progress

log = logging.getLogger("deepspec")

OnDrop = Callable[[str, str], None]

_SHOWN_BYTES: Final = 1 << 26
_DROPS_SHOWN: Final = 5


class Registry(Protocol):
    """The part of deepspec_core.plugins.registry.Registry that sources need."""

    def get(self, kind: str, name: str) -> Any: ...

    def load(self, kind: str, name: str) -> Any: ...


def read_sources(
    sources: Sequence[SourceOptions],
    *,
    split: Split,
    held_out: float,
    seed: int,
    base: Path,
    registry: Registry,
    counts: Counter[str] | None = None,
    on_drop: OnDrop = lambda _where, _reason: None,
) -> Iterator[Conversation]:
    """The conversations of one split, lazily, each once.

    Conversations are split by what the first user asks (split.py), so that no question stands in both splits, whatever
    is read, in whatever order, under whatever id. Prompts a plugin ships have splits of their own; beside another
    source they are split by their question as well. `limit` caps the train conversations of a source.

    Sources are interleaved in proportion to their weights for as long as they last; every conversation comes once, so
    weights decide the order, and limits how much. `counts` receives `conversations`, `duplicates` (same id, same
    content: dropped), `renamed` (same id, other content: kept under a longer id), `same_question` (the first user
    asks what an earlier conversation's asked: kept) and `unusable` (rows that say what no conversation here can hold:
    dropped, and told to `on_drop` with their place and the reason).

    DataError where a source is missing, not readable, or holds a malformed row (told by file and line).
    """
    counts = Counter() if counts is None else counts

    def drop(where: str, reason: str) -> None:
        counts["unusable"] += 1
        on_drop(where, reason)

    alone = len(sources) == 1
    streams = [
        islice(
            _of_split(source, split, held_out, seed, base, registry, drop, alone=alone),
            source.limit if split == "train" else None,
        )
        for source in sources
    ]
    seen: dict[str, str] = {}
    asked: set[bytes] = set()
    for conversation in _interleave(streams, [source.weight for source in sources]):
        digest = conversation.digest
        if conversation.id in seen:
            renamed = f"{conversation.id}-{digest[:12]}"
            if seen[conversation.id] == digest or renamed in seen:
                counts["duplicates"] += 1
                continue
            counts["renamed"] += 1
            conversation = evolve(conversation, id=renamed)
        seen[conversation.id] = digest
        question = prompt_digest(conversation)
        counts["same_question"] += question in asked
        asked.add(question)
        counts["conversations"] += 1
        yield conversation


def check_sources(sources: Sequence[SourceOptions], *, base: Path, registry: Registry) -> None:
    """DataError where a source is not there. No conversation is read; of Hub datasets only what describes them is."""
    for source in sources:
        if source.path.startswith(BUILTIN):
            _offered_prompts(source.path, registry)
        elif source.path.endswith(JSON_LINES):
            if not (base / source.path).is_file():
                raise _missing(base / source.path)
        else:
            _open_dataset(source, base, look_only=True)


def check_rows(
    sources: Sequence[SourceOptions], *, held_out: float, seed: int, base: Path, registry: Registry
) -> int | None:
    """The most turns of a user in one conversation; None where not every source is read.

    DataError for the first malformed row that training would read, or if there is nothing to train on. Files and
    dataset folders are read as far as training reads them, and rows that cannot be used are warned about. Of the Hub
    nothing is read, and what a plugin ships is believed.
    """
    local = [source for source in sources if not source.path.startswith(BUILTIN) and not on_hub(source, base)]
    found, unusable, turns = 0, 0, 0

    def drop(where: str, reason: str) -> None:
        nonlocal unusable
        unusable += 1
        if unusable <= _DROPS_SHOWN:
            log.warning("%s cannot be used and is left out: %s", where, reason)

    with Progress(None, "check the rows of data.sources", "rows", enabled=_large(local, base)) as progress:
        for source in local:
            rows = _of_split(source, "train", held_out, seed, base, registry, drop, alone=True)
            for conversation in islice(rows, source.limit):
                found += 1
                turns = max(turns, sum(message["role"] == "user" for message in conversation.messages))
                progress.advance()
    if unusable > _DROPS_SHOWN:
        log.warning("%s rows of data.sources cannot be used and are left out", f"{unusable:,}")
    if not found and len(local) == len(sources):
        raise DataError(
            "There is no conversation to train on",
            where="data.sources: " + ", ".join(source.path for source in sources),
            found=f"{unusable} rows that cannot be used, and no other that is not held out, at a share of {held_out:g}",
            expected="at least one conversation",
            fix="Give more data, or lower data.held_out.",
        )
    return turns if len(local) == len(sources) else None


def _large(sources: Sequence[SourceOptions], base: Path) -> bool:
    """Whether reading all of it takes long enough for a progress bar."""
    places = [base / source.path for source in sources]
    files = [file for place in places for file in (place.rglob("*") if place.is_dir() else [place]) if file.is_file()]
    return sum(file.stat().st_size for file in files) >= _SHOWN_BYTES


def on_hub(source: SourceOptions, base: Path) -> bool:
    """Whether reading the source means asking the Hub."""
    ships = source.path.startswith(BUILTIN) or source.path.endswith(JSON_LINES)
    return not ships and not (base / source.path).is_dir()


def hub_commit(source: SourceOptions, base: Path) -> str:
    """The commit of a dataset on the Hub that is read; offline, that of the local copy."""
    commit: str = _open_dataset(source, base, look_only=True).hash
    return commit


def _of_split(
    source: SourceOptions,
    split: Split,
    held_out: float,
    seed: int,
    base: Path,
    registry: Registry,
    drop: OnDrop,
    *,
    alone: bool,
) -> Iterator[Conversation]:
    """A source's conversations of one split. `alone`: there is no other source, which might repeat its prompts."""
    if source.path.startswith(BUILTIN):
        rows = _builtin(source.path, split, seed, registry)
        if alone:
            yield from _usable(rows, drop)
            return
    else:
        rows = _file(base / source.path) if source.path.endswith(JSON_LINES) else _dataset(source, base)
    for conversation in _usable(rows, drop):
        if is_held_out(prompt_digest(conversation), held_out=held_out, seed=seed) == (split == "held_out"):
            yield conversation


def _usable(rows: Iterable[tuple[str, Any]], drop: OnDrop) -> Iterator[Conversation]:
    """The conversations of rows, each with its place. Rows that cannot be used are told to `drop`."""
    for where, row in rows:
        try:
            yield from_row(row, where)
        except UnusableRow as error:
            drop(str(error.where), error.problem[0].lower() + error.problem[1:] + f" ({error.found})")


def _builtin(path: str, split: Split, seed: int, registry: Registry) -> Iterator[tuple[str, Any]]:
    name = _offered_prompts(path, registry)
    for number, row in enumerate(registry.load("builtin", name)(split, seed=seed), start=1):
        yield f"{path}:{number}", row


def _offered_prompts(path: str, registry: Registry) -> str:
    """The name of the builtin. DataError where it offers no prompts."""
    name = path.removeprefix(BUILTIN)
    spec = registry.get("builtin", name)
    if spec.kind != "prompts":
        raise DataError(
            "This builtin is not a source of conversations",
            where=f"data.sources: {path}",
            found=f"a {spec.kind}",
            expected="a builtin that offers prompts",
            fix="See `deepspec plugins` for those that are installed.",
        )
    return name


def _file(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise _missing(path)
    yield from read_json_lines(path)


def _missing(path: Path) -> DataError:
    folder = path.parent
    if folder.is_dir():
        close = nearest(path.name, [entry.name for entry in folder.iterdir()])
        fix = f"Is {close!r} meant?" if close else None
    else:
        fix = f"The folder {folder} does not exist either."
    return DataError("A source of conversations is missing", where=path, expected="a file or a folder", fix=fix)


def _dataset(source: SourceOptions, base: Path) -> Iterator[tuple[str, Any]]:
    """A dataset folder, or a dataset on the Hub."""
    rows = iter(_open_dataset(source, base))
    for number in count(1):
        with _dataset_errors(source):
            row = next(rows, None)
        if row is None:
            return
        yield f"{source.path}:{number}", row


def _open_dataset(source: SourceOptions, base: Path, *, look_only: bool = False) -> Any:
    """Its rows, lazily. `look_only`: of what is not saved yet only its builder, no rows. DataError either way.

    A folder is streamed: a copy that `datasets` keeps is told by the files' times only, and may be of older content. A
    dataset of the Hub is streamed where only a part of it is wanted.
    """
    local = base / source.path
    if local.is_file():
        raise DataError(
            "A source is neither JSON lines nor a dataset folder",
            where=local,
            expected=f"a name ending in {JSON_LINES[0]}",
        )
    if not local.is_dir() and (source.path.count("/") != 1 or source.path.startswith((".", "/", "~"))):
        raise _missing(local)
    import datasets

    split = source.split or "train"
    problem = None if local.is_dir() else why_unreachable()
    with _dataset_errors(source, problem):
        if (local / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(str(local))[split]
            _require_inside(local, {split: [file["filename"] for file in rows.cache_files]})
        elif (local / "dataset_info.json").is_file():
            rows = datasets.load_from_disk(str(local))
            _require_inside(local, {split: [file["filename"] for file in rows.cache_files]})
        else:
            name = str(local) if local.is_dir() else source.path
            if look_only or local.is_dir():
                builder = datasets.load_dataset_builder(name)
                if local.is_dir():
                    _require_inside(local, builder.config.data_files or {})
                if look_only:
                    return builder
            rows = datasets.load_dataset(name, split=split, streaming=local.is_dir() or source.limit is not None)
    if not local.is_dir():
        say_local_copy(source.path)
    return rows


def _require_inside(folder: Path, files: Mapping[str, Iterable[str]]) -> None:
    """DataError where a dataset folder names data that lies elsewhere: nobody would see it change."""
    root = os.path.abspath(folder)
    for path in (path for paths in files.values() for path in paths):
        if not os.path.abspath(path).startswith(root + os.sep):
            raise DataError(
                "A dataset folder names data outside the folder",
                where=folder,
                found=path,
                expected="files in that folder",
                fix="Put the files there, or name them in data.sources themselves.",
            )


@contextmanager
def _dataset_errors(source: SourceOptions, problem: str | None = None) -> Iterator[None]:
    """DataError for what `datasets` raises. `problem` is a better reason, where one is known."""
    import datasets

    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            "A dataset cannot be read",
            where=f"data.sources: {source.path}",
            found=problem or f"{type(error).__name__}: {error}",
            expected=f"split {source.split or 'train'!r} of a dataset folder or of a dataset on the Hub",
            fix="Check the name, the split and the connection; offline, download it first and give its folder.",
        ) from error


def _interleave(streams: Sequence[Iterator[Conversation]], weights: Sequence[float]) -> Iterator[Conversation]:
    """Next comes the stream that is furthest behind its share; the earlier one of equals."""
    taken = dict.fromkeys(range(len(streams)), 0)
    while taken:
        index = min(taken, key=lambda i: ((taken[i] + 1) / weights[i], i))
        conversation = next(streams[index], None)
        if conversation is None:
            del taken[index]
        else:
            taken[index] += 1
            yield conversation
