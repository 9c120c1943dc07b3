"""What a regeneration counted: conversations, answers, and what was left out. Knows no lines and no requests."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Final

from attrs import frozen

from deepspec_core.data.regenerated_file import MARKS
from deepspec_core.errors import DataError

# What the side file's lines are counted as.
COUNTED: Final = ("failures", *MARKS)
# Sums over the lines of the finished file.
_TALLIED: Final = (
    "conversations",
    "output_tokens",
    "unfinished",
    "empty",
    "dropped_turns",
    "rerendered_answers",
    "mismatched_answers",
    "replayed_results",
    "skipped_results",
)


@frozen(kw_only=True)
class RegenerateReport:
    """The counts of the whole file, with those of earlier runs. `written` is this run's share, `skipped` theirs.

    `unfinished` conversations end in an answer that met the token limit, kept without an end marker; `empty` ones in an
    answer without text. `cut` conversations were left out because their first answer met it, `too_long` ones because
    their first prompt has max_length tokens or more. `dropped_turns` would have followed such an unfinished answer or
    were answered so and taken back, did not fit max_length, or are refused by the template or for a control token in
    their text.
    `rerendered_answers` are earlier answers whose tokens changed when the next prompt was rendered (thinking dropped,
    other merges): each is kept as a row of its own, with the prompt it answered. `mismatched_answers` have ids that
    were made from a server's text and are not as many as it counted. `replayed_results` are recorded tool results that
    were said after the target's own calls; `skipped_results` were not: no call asked for them, or a turn was dropped.
    """

    path: Path
    conversations: int
    written: int
    skipped: int
    failures: int
    failures_path: Path
    output_tokens: int
    unfinished: int
    empty: int
    dropped_turns: int
    rerendered_answers: int
    cut: int
    too_long: int
    mismatched_answers: int
    replayed_results: int
    skipped_results: int


def report_of(
    out: Path, failures_path: Path, tally: Counter[str], *, written: int, failures: int, **left_out: int
) -> RegenerateReport:
    """The report of the file `out`, whose lines sum up to `tally`. `left_out` has counts by mark."""
    return RegenerateReport(
        path=out,
        written=written,
        skipped=tally["conversations"] - written,
        failures=failures,
        failures_path=failures_path,
        **left_out,
        **{name: tally[name] for name in _TALLIED},
    )


def none_fits(failures_path: Path, conversations: int, max_length: int) -> DataError:
    """The error where no first prompt leaves room for an answer."""
    return DataError(
        "No prompt leaves room for an answer",
        where=failures_path,
        found=f"{conversations} conversations, whose first prompts have data.max_length ({max_length}) tokens or more",
        fix="Raise data.max_length, or give shorter prompts.",
    )
