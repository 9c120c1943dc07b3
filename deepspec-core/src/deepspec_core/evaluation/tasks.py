"""Evaluation prompts: registered tasks, files of rows, registered tasks from files, and the run's held-out prompts.

This file knows where prompts come from and how a limit cuts them. It does not know how they are rendered or decoded.
"""

from __future__ import annotations

import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from deepspec_core.config.schema import HELD_OUT as HELD_OUT
from deepspec_core.config.schema import ROW_FILES
from deepspec_core.data.conversations import TOKENS, from_row, identity_of
from deepspec_core.data.row_files import read_rows
from deepspec_core.data.source_digest import file_digest
from deepspec_core.data.unicode_text import not_unicode
from deepspec_core.errors import DataError
from deepspec_core.plugins.references import resolve
from deepspec_core.plugins.registry import Registry
from deepspec_core.plugins.specs import TaskSpec

log = logging.getLogger("deepspec")
HELD_OUT_QUOTA = 500
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")
_OF_A_PROMPT = re.compile(r" \((sample|turn) \d+\)$")
# A file for a registered task may hold conversations, under one of these keys, instead of the task's own rows.
_CONVERSATIONS = ("messages", "conversations", "turns")


@frozen(kw_only=True)
class Prompt:
    """One prompt: messages to render with the generation prompt. Its `index` in the task decides its seed.

    `later` has the user's further turns, each with the system messages before it. Answers that the row itself contains
    are left out. `where` names the row that the prompt came from (FILE:LINE), for messages.
    """

    id: str
    index: int
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    later: tuple[tuple[Mapping[str, Any], ...], ...] = ()
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
    """The prompts of a task, at most `limit`, or the quota of a registered task where that is None.

    `task` is "held-out", a registered task, or a file (relative to `base`) whose rows are those of sources
    (data/row_files.py, data/conversations.py). NAME:FILE is a registered task, from a file of conversations or of the
    rows of the task's own data. If a task has more rows than its limit or quota, random.Random(seed) shuffles them
    before they are cut. Raises DataError if the file is missing, a row is malformed, or a row says what no conversation
    here can hold.
    """
    file = task_file(task)
    quota = quota_of(task, registry) if limit is None and task != HELD_OUT else None
    most = quota if limit is None else limit
    if file is not None:
        prompts = _read_file(base / file, base, task_name(task), _mapped(task, registry))
    else:
        rows = held_out() if task == HELD_OUT else _registered(task, most, seed, registry)
        prompts = [prompt_of(row, index, task, f"{task}:{index + 1}") for index, row in enumerate(rows)]
    if most is not None and len(prompts) > most:
        if quota is not None:
            log.info("%s: %d of %d rows, the task's own quota. A limit asks another number.", task, most, len(prompts))
        random.Random(seed).shuffle(prompts)
        prompts = prompts[:most]
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


def quota_of(task: str, registry: Registry) -> int | None:
    """How many prompts of a task are asked where no limit is given; None: all."""
    if task == HELD_OUT:
        return HELD_OUT_QUOTA
    name, _ = _parts(task)
    if name is None or name not in registry.names("task"):
        return None
    spec = registry.get("task", name)
    assert isinstance(spec, TaskSpec)
    return spec.quota


def task_file(task: str) -> str | None:
    """The file that a task is read from; None if it names none."""
    return _parts(task)[1]


def task_name(task: str) -> str:
    """The name of a task: that of a registered task, or the file's name without its ending."""
    name, file = _parts(task)
    if name is not None or file is None:
        return name or task
    return Path(file.removesuffix(next(end for end in ROW_FILES if file.endswith(end)))).name


def task_label(task: str) -> str:
    """The name of a task in results. A registered task has the same name, whatever file its rows come from."""
    name, file = _parts(task)
    return task if name is None or file is None else name


def task_digest(task: str, *, base: Path) -> str | None:
    """The digest of a task's file; None if the task has no file. Raises OSError if the file cannot be read."""
    file = task_file(task)
    return file_digest(base / file) if file is not None and (base / file).is_file() else None


def _parts(task: str) -> tuple[str | None, str | None]:
    """The registered name and the file in the text of a task. Each is None if the text does not have it."""
    if not task.endswith(ROW_FILES):
        return task, None
    name, colon, file = task.partition(":")
    return (name, file) if colon and _NAME.fullmatch(name) else (None, task)


def _mapped(task: str, registry: Registry) -> Callable[[Any, str], Any]:
    """A function that turns a row of the task's file into a conversation. Conversations stay unchanged."""
    name, _ = _parts(task)
    if name is None:
        return lambda row, where: row
    spec = registry.get("task", name)
    assert isinstance(spec, TaskSpec)
    if spec.from_row is None:
        return lambda row, where: row
    from_row = resolve(spec.from_row)

    def mapped(row: Any, where: str) -> Any:
        if not isinstance(row, Mapping) or any(row.get(field) for field in _CONVERSATIONS):
            return row
        with registry.blaming("task", name):
            try:
                return from_row(row)
            except DataError as error:
                raise DataError(
                    error.problem, where=where, found=error.found, expected=error.expected, fix=error.fix
                ) from error

    return mapped


def _registered(task: str, limit: int | None, seed: int, registry: Registry) -> Iterable[Any]:
    """The rows of a registered task. All are made here, so that an error among them is reported as the plugin's."""
    make = registry.load("task", task)
    with registry.blaming("task", task):
        return list(make(limit, seed))


def _read_file(path: Path, base: Path, name: str, mapped: Callable[[Any, str], Any]) -> list[Prompt]:
    if not path.is_file():
        raise DataError(
            "A task's file is missing",
            where=path,
            found="a folder" if path.is_dir() else None,
            expected="a file of JSON lines, a JSON array or Parquet",
            fix=f"Relative paths start at {base.absolute()}.",
        )
    return [
        prompt_of(mapped(row.content(), row.where), index, name, row.where) for index, row in enumerate(read_rows(path))
    ]


def _plain(identity: str) -> str:
    """The id; with a full stop appended if it ends like the ids of further samples and turns (turns.py)."""
    return f"{identity}." if _OF_A_PROMPT.search(identity) else identity


def prompt_of(row: Any, index: int, name: str, where: str) -> Prompt:
    """The messages up to the first user turn. Raises DataError if there is no user turn, or if the row is malformed."""
    said = {key: row[key] for key in row if key not in TOKENS} if isinstance(row, Mapping) else row
    conversation = from_row(said, where)
    roles = [message["role"] for message in conversation.messages]
    asked = roles.index("user") if "user" in roles else len(roles)
    if "user" not in roles or "assistant" in roles[:asked]:
        raise DataError(
            "A task's row does not begin with a user's question",
            where=where,
            found=", ".join(roles),
            expected="a user message, after system messages at most",
        )
    later = _later(conversation.messages[asked + 1 :])
    questions = (conversation.messages[asked], *(turn[-1] for turn in later))
    for number, question in enumerate(questions, 1):
        if not question["content"].strip():
            raise DataError(
                "A task's question is empty",
                where=where,
                found=f"user turn {number} of {len(questions)}",
                expected="a user message with text",
            )
    prompt = Prompt(
        id=_plain(identity_of(row, where) or f"{name}-{index}"),
        index=index,
        messages=conversation.messages[: asked + 1],
        tools=conversation.tools,
        later=later,
        where=where,
    )
    found = not_unicode(prompt.id, (*prompt.messages, *chain(*prompt.later)), prompt.tools)
    if found is not None:
        raise DataError(
            "A task's row is not valid Unicode", where=where, found=found, fix="Correct or remove that row."
        )
    return prompt


def _later(messages: Iterable[Mapping[str, Any]]) -> tuple[tuple[Mapping[str, Any], ...], ...]:
    """The messages before each further answer, up to the user's last turn.

    The turns end at the first result of a tool, because it would answer a call that the target did not make.
    """
    turns: list[tuple[Mapping[str, Any], ...]] = []
    said: list[Mapping[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            break
        if message["role"] != "assistant":
            said.append(message)
        if message["role"] == "user":
            turns.append(tuple(said))
            said = []
    return tuple(turns)
