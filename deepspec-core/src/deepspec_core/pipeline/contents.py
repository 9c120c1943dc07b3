"""Names of content that a run reads besides its run file, or leaves: sources, answers, cache, draft, exports, tasks.

A stage notes a digest under such a name when it reads something (reads.py), and the same name is looked up again before
its results are used (changes.py). Knows names only.
"""

from __future__ import annotations

from typing import Final

TARGET: Final = "the target"
TEMPLATE: Final = "the file of target.chat_template"
DTYPE: Final = "what the target computes with, where target.dtype is left out,"
COMPUTED_BY: Final = "what computes the features of the cache"
REGENERATED: Final = "the file of regenerated conversations"
CACHE: Final = "the cache"
DRAFT: Final = "the draft"
INIT: Final = "the checkpoint of draft.init"
OWN_DRAFT: Final = "the run's finished draft"
EVALUATION: Final = "the run's metrics.json"
EXPORTS: Final = "the content of the run's exports"
SPLIT: Final = "the rule that splits conversations"
SOURCE: Final = "the content of data.sources[{}]"
CALIBRATION: Final = "the file of evaluate.calibration"
COST_TABLE: Final = "the file of evaluate.scheduler.cost_table"
TASK: Final = "the content of the task {}"


def source(index: int) -> str:
    """The name of a source's content."""
    return SOURCE.format(index)


def task(name: str) -> str:
    """The name of a task's content."""
    return TASK.format(name)
