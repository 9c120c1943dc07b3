"""Checks, before the first stage, whether recorded tool results can be replayed with the chat template.

Knows counts of rows and the template; does not know how conversations are answered.
"""

from __future__ import annotations

import logging
from collections import Counter

from deepspec_core.errors import ConfigError
from deepspec_core.pipeline.run import Run

log = logging.getLogger("deepspec")


def check_replay(run: Run, rows: Counter[str]) -> None:
    """Raise ConfigError if too many conversations would fail, because the template writes no tool calls.

    A few are warned about. `rows` are counts as of data.sources.check_rows.
    """
    failing, read = rows["with_results"], rows["conversations"]
    if not failing or run.target.tokenizer.call_form(run.target.adapter.conversation_format()) is not None:
        return
    most = run.file.regenerate.max_failures
    if failing <= most * read:
        log.warning(
            "%d of %d conversations have tool results and will not be answered: the chat template writes no tool calls",
            failing,
            read,
        )
        return
    raise ConfigError(
        "the chat template writes no tool calls, so recorded tool results cannot be replayed",
        where=f"{run.path}: data.sources",
        found=f"tool results in {failing} of {read} conversations",
        expected=f"at most {most:g} of them (regenerate.max_failures)",
        fix="Name a template with tool calls in target.chat_template, leave these rows out, or leave out the stage.",
    )
