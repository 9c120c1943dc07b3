"""Evaluation prompts: registered tasks, files of rows, and the run's own held-out prompts.

Knows where prompts come from and how a limit cuts them. Does not know how they are rendered or decoded. Of several user
turns only the first is asked, as in the published protocol.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from deepspec_core.config.schema import HELD_OUT as HELD_OUT
from deepspec_core.config.schema import ROW_FILES
from deepspec_core.data.conversations import SAID, from_row, identity_of
from deepspec_core.data.row_files import read_rows
from deepspec_core.data.source_digest import file_digest
from deepspec_core.data.unicode_text import not_unicode
from deepspec_core.errors import DataError
from deepspec_core.plugins.registry import Registry

HELD_OUT_QUOTA = 500


@frozen(kw_only=True)
class Prompt:
    """One question: messages to render with the generation prompt. Its `index` in the task decides its seed.

    `where` is the row it came from (FILE:LINE), for messages.
    """

    id: str
    index: int
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    where: str = ""


def load_task(
    task: str,
    *,
    limit: int | None,
    seed: int,
    base: Path,
    registry: Registry,
    held_out: Callable[[], Iterable[Mapping[str, Any]]],
) -> list[Prompt]:
    """The prompts of a task, at most `limit`.

    `task` is "held-out", a registered task, or a file (relative to `base`) whose rows are those of sources
    (data/row_files.py, data/conversations.py). If a task has more rows than its limit, random.Random(seed) shuffles
    them before they are cut. DataError if the file is missing, a row is malformed, or a row says what no conversation
    here can hold.
    """
    if task.endswith(ROW_FILES):
        prompts = _read_file(base / task, base)
    else:
        rows = held_out() if task == HELD_OUT else _registered(task, limit, seed, registry)
        prompts = [_prompt(row, index, task, f"{task}:{index + 1}") for index, row in enumerate(rows)]
    if limit is not None and len(prompts) > limit:
        random.Random(seed).shuffle(prompts)
        prompts = prompts[:limit]
    if not prompts:
        raise DataError(
            "A task has no prompts", where=task, fix="Give it at least one prompt, or leave it out of evaluate.tasks."
        )
    repeated = [name for name, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if repeated:
        raise DataError(
            "Prompts of a task share an id",
            where=task,
            found=", ".join(repeated[:5]),
            fix="Give every row an `id` of its own, or none: rows without one are numbered.",
        )
    return [evolve(prompt, index=index) for index, prompt in enumerate(prompts)]


def task_name(task: str) -> str:
    """What a task is called: a file by its name without the ending."""
    ending = next((end for end in ROW_FILES if task.endswith(end)), None)
    return task if ending is None else Path(task.removesuffix(ending)).name


def task_digest(task: str, *, base: Path) -> str | None:
    """The digest of a task's file; None if the task is no file. OSError if it cannot be read."""
    return file_digest(base / task) if task.endswith(ROW_FILES) and (base / task).is_file() else None


def _registered(task: str, limit: int | None, seed: int, registry: Registry) -> Iterable[Any]:
    """The rows of a registered task. All of them are made here, where a failure is told as the plugin's."""
    make = registry.load("task", task)
    with registry.blaming("task", task):
        return list(make(limit, seed))


def _read_file(path: Path, base: Path) -> list[Prompt]:
    if not path.is_file():
        raise DataError(
            "A task's file is missing",
            where=path,
            found="a folder" if path.is_dir() else None,
            expected="a file of JSON lines, a JSON array or Parquet",
            fix=f"Relative paths start at {base.absolute()}.",
        )
    return [_prompt(row.content(), index, task_name(str(path)), row.where) for index, row in enumerate(read_rows(path))]


def _prompt(row: Any, index: int, name: str, where: str) -> Prompt:
    """The messages up to the first user turn. DataError if there is none, or if the row is malformed."""
    fields = {key: row.get(key) for key in SAID if key in row} if isinstance(row, Mapping) else row
    conversation = from_row(fields, where)
    roles = [message["role"] for message in conversation.messages]
    asked = roles.index("user") if "user" in roles else len(roles)
    if "user" not in roles or "assistant" in roles[:asked]:
        raise DataError(
            "A task's row does not begin with a user's question",
            where=where,
            found=", ".join(roles),
            expected="a user message, after system messages at most",
        )
    if not conversation.messages[asked]["content"].strip():
        raise DataError("A task's question is empty", where=where, expected="a user message with text")
    prompt = Prompt(
        id=identity_of(row, where) or f"{name}-{index}",
        index=index,
        messages=conversation.messages[: asked + 1],
        tools=conversation.tools,
        where=where,
    )
    found = not_unicode(prompt.id, prompt.messages, prompt.tools)
    if found is not None:
        raise DataError(
            "A task's row is not valid Unicode", where=where, found=found, fix="Correct or remove that row."
        )
    return prompt
