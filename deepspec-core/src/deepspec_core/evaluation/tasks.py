"""Evaluation prompts: registered tasks, JSON-lines files, and the run's own held-out prompts.

Knows where prompts come from and how a quota cuts them; not how they are rendered or decoded. Of several user turns the
first is asked, as the published protocol does.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from attrs import evolve, frozen

from deepspec_core.config.schema import HELD_OUT as HELD_OUT
from deepspec_core.errors import DataError
from deepspec_core.plugins.registry import Registry

HELD_OUT_QUOTA = 500


@frozen(kw_only=True)
class Prompt:
    """One question: messages to render with the generation prompt. `index` in its task keys the sample's seed."""

    id: str
    index: int
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()


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

    `task` is "held-out", a registered task, or a .jsonl file (relative to `base`) whose rows have `turns` or
    `messages`. Where a task has more rows than its limit, random.Random(seed) shuffles them before the cut. DataError
    where the file is missing or a row is malformed.
    """
    if task == HELD_OUT:
        rows = list(held_out())
    elif task.endswith(".jsonl"):
        rows = _read_file(base / task)
    else:
        rows = list(registry.load("task", task)(limit, seed))
    prompts = [_prompt(row, index, task) for index, row in enumerate(rows)]
    if limit is not None and len(prompts) > limit:
        random.Random(seed).shuffle(prompts)
        prompts = prompts[:limit]
    if not prompts:
        raise DataError("A task has no prompts", where=task, fix="Give a task with at least one prompt.")
    repeated = [name for name, count in Counter(prompt.id for prompt in prompts).items() if count > 1]
    if repeated:
        raise DataError(
            "Prompts of a task share an id",
            where=task,
            found=", ".join(repeated[:5]),
            fix="Give every row an `id` of its own, or none: rows without one are numbered.",
        )
    return [evolve(prompt, index=index) for index, prompt in enumerate(prompts)]


def _read_file(path: Path) -> list[Mapping[str, Any]]:
    if not path.is_file():
        raise DataError("A task's file is missing", where=path, fix="Paths are relative to the run file's folder.")
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError("A task's row is not JSON", where=f"{path}:{number}", found=str(error)) from error
        if not isinstance(row, dict) or not (row.get("turns") or row.get("messages")):
            raise DataError(
                "A task's row has no question",
                where=f"{path}:{number}",
                found=", ".join(row) if isinstance(row, dict) else type(row).__name__,
                expected="an object with `turns` (a list of user texts) or `messages`",
            )
        rows.append(row)
    return rows


def _prompt(row: Mapping[str, Any], index: int, task: str) -> Prompt:
    if "turns" in row:
        messages: tuple[Mapping[str, Any], ...] = ({"role": "user", "content": row["turns"][0]},)
    else:
        kept = []
        for message in row["messages"]:
            if message["role"] == "assistant":
                break
            kept.append(message)
            if message["role"] == "user":
                break
        messages = tuple(kept)
    identity = str(row.get("id", f"{Path(task).stem}-{index}"))
    return Prompt(id=identity, index=index, messages=messages, tools=tuple(row.get("tools") or ()))
