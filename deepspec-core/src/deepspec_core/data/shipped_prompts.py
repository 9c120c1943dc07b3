"""Prompts that a plugin ships: their rows, their digest, and whether both splits ask the same.

The rows come from code of a plugin. It may fail, give values that JSON does not have, change without a new version,
and hold out what it also trains on. Knows the contract of such prompts. Does not know files or other sources.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from itertools import count, islice
from typing import Any, Final, Protocol

import xxhash

from deepspec_core.config.schema import BUILTIN
from deepspec_core.data.conversations import Conversation, from_row
from deepspec_core.data.digest_set import DigestSet
from deepspec_core.data.messages import require_json
from deepspec_core.data.source_row import SourceRow
from deepspec_core.data.split import Split, prompt_digest
from deepspec_core.errors import DataError

# The first rows of each split tell whether the code gives other rows; a plugin may give more than anybody waits for.
_ROWS_THAT_TELL: Final = 4096
# So many held-out rows are compared with those of training: twice as many as evaluation asks by default.
_HELD_OUT_ROWS: Final = 1024
_END: Final = object()


class Registry(Protocol):
    """The part of deepspec_core.plugins.registry.Registry that sources need."""

    def get(self, kind: str, name: str) -> Any: ...

    def load(self, kind: str, name: str) -> Any: ...

    def blaming(self, kind: str, name: str) -> AbstractContextManager[None]: ...


def offered_prompts(path: str, registry: Registry) -> str:
    """The name of the builtin. Raises DataError if it offers no prompts."""
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


def shipped_rows(
    path: str, split: Split, *, seed: int, registry: Registry, columns: Collection[str]
) -> Iterator[SourceRow]:
    """Every row of the split, lazily. PluginError, with the plugin's name, if its code fails.

    A row has an error of its own if one of its `columns` holds what JSON does not have.
    """
    name = offered_prompts(path, registry)
    build = registry.load("builtin", name)
    with registry.blaming("builtin", name):
        rows = iter(build(split, seed=seed))
    for number in count(1):
        with registry.blaming("builtin", name):
            row = next(rows, _END)
        if row is _END:
            return
        yield _checked(row, f"{path}:{number}", columns)


def _checked(row: Any, where: str, columns: Collection[str]) -> SourceRow:
    if isinstance(row, Mapping):
        try:
            require_json([row[name] for name in columns if name in row], where, what="A row")
        except DataError as error:
            return SourceRow(where, error=error, text=repr(row))
    return SourceRow(where, row)


def rows_digest(path: str, *, seed: int, limit: int | None, registry: Registry, columns: Collection[str]) -> str:
    """The digest of the first rows of both splits, at most `limit` of training's.

    They come from the plugin's code, which may change under one version.
    """
    digest = xxhash.xxh3_128()
    most: dict[Split, int] = {"train": min(limit or _ROWS_THAT_TELL, _ROWS_THAT_TELL), "held_out": _HELD_OUT_ROWS}
    for split, number in most.items():
        digest.update(split.encode())
        for row in islice(shipped_rows(path, split, seed=seed, registry=registry, columns=columns), number):
            value = {name: row.value[name] for name in columns if name in row.value} if _is_row(row) else None
            digest.update(json.dumps(value, sort_keys=True).encode())
    return digest.hexdigest()


def _is_row(row: SourceRow) -> bool:
    return row.error is None and isinstance(row.value, Mapping)


def not_held_out(
    conversations: Iterator[Conversation], path: str, *, seed: int, registry: Registry, columns: Collection[str]
) -> Iterator[Conversation]:
    """Training's conversations. Raises DataError for one whose question is among the first that are held out."""
    asked = DigestSet()
    for row in islice(shipped_rows(path, "held_out", seed=seed, registry=registry, columns=columns), _HELD_OUT_ROWS):
        try:
            asked.add(prompt_digest(from_row(row.content(), row.where)))
        except DataError:
            continue  # counted by whoever reads the held-out prompts
    for conversation in conversations:
        if prompt_digest(conversation) in asked:
            raise DataError(
                "A plugin's prompts for training contain a question that it holds out",
                where=f"data.sources: {path}",
                found=f"conversation {conversation.id!r}",
                expected="splits without a common question",
                fix="Correct the plugin: for each question, its function must decide by the question alone which "
                "split has it.",
            )
        yield conversation
