"""The tasks that a command's --task means. Knows names of tasks; not what they ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import click

from deepspec_core.config.schema import HELD_OUT

ALL: Final = "all"


def tasks_meant(tasks: tuple[str, ...], registered: Sequence[str], *, has_data: bool = False) -> tuple[str, ...]:
    """The tasks that are meant. `all` stands for every registered one that is not named beside it.

    A file is another task than the registered one of its name: both are meant, and refused later.

    `has_data`: there is a run whose data has held-out prompts.
    """
    if HELD_OUT in tasks and not has_data:
        raise click.UsageError(f"{HELD_OUT!r} prompts belong to the data of a run: evaluate with a run file instead.")
    if ALL not in tasks:
        return tasks
    if not registered:
        raise click.UsageError("'all' means all registered tasks, but none is installed: pip install deepspec-tasks.")
    from deepspec_core.evaluation.tasks import task_label

    named = [task for task in tasks if task != ALL]
    names = {task_label(task) for task in named}
    return (*named, *(task for task in registered if task not in names))
