"""Samples that failed, in the form of results, warnings and reports.

This file knows results. It does not know why a sample fails.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import asdict

from deepspec_core.evaluation.group_decoding import Failure

log = logging.getLogger("deepspec")

HEADINGS = ("task", "batch", "sample", "reason")
NOTE = "These samples are in no figure."
_MOST = 50


def failures_of(refused: Sequence[Failure]) -> list[dict[str, Any]]:
    """The failures in the form that results have, in JSON types."""
    return [asdict(one) for one in refused]


def with_refused(summary: Mapping[str, Any], refused: Sequence[Failure]) -> dict[str, Any]:
    """The figures of a task, with the prompts that could not be asked before the samples that could not be decoded."""
    return {**summary, "failures": [*failures_of(refused), *summary["failures"]]}


def warn_of_failures(name: str, failures: Sequence[Mapping[str, Any]]) -> None:
    """Warn how many samples failed, with the reason of one of them."""
    if failures:
        first = failures[0]
        log.warning("%s: %d failed and are in no figure; %s: %s", name, len(failures), first["id"], first["reason"])


def rows(task: str, batch: str, failures: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row under HEADINGS for each failure. Where there are many, only the first ones."""
    more = len(failures) - _MOST
    shown = [[task, batch, str(one["id"]), str(one["reason"])] for one in failures[:_MOST]]
    return shown + ([[task, batch, f"and {more} more, in metrics.json", ""]] if more > 0 else [])
