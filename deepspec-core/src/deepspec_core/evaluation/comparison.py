"""Several evaluations in one table, and every difference that makes their figures incomparable.

This file knows what a run's metrics.json says. It does not know how the figures were made. Nothing is left out or
averaged. A run on another target, on other prompts or with other settings keeps its rows. These rows are marked, and
the difference is written below the table. If a server does not report a setting, a note says so, but no row is marked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from attrs import evolve, frozen
from rich.table import Table

from deepspec_core.evaluation import report as single
from deepspec_core.evaluation.latex import latex_table
from deepspec_core.evaluation.markdown_table import literal, markdown_table
from deepspec_core.evaluation.sampled import with_defaults
from deepspec_core.evaluation.tasks import task_name

HEADINGS = (
    "draft",
    "task",
    "T",
    "batch",
    "prompts",
    "accepted length",
    "tok/s",
    "speed-up",
    "conditional acceptance by position, %",
)
MARK = " *"
# Settings that must be equal for figures to be compared. Taps and the draft's size may differ: these may be compared.
_TARGET = ("model", "revision", "dtype")
# So is how a draft proposes: as trees of so many tokens, or as chains.
_TREE = "tree_nodes"
_DIGEST = 12
_MACHINE = ("device", "threads", "torch", "transformers")


@frozen(kw_only=True)
class Run:
    """One evaluated run: its name in the table, and its metrics.json."""

    label: str
    report: Mapping[str, Any]


@frozen(kw_only=True)
class Row:
    """One draft on one task at one temperature. A `marked` row cannot be compared with the first run's."""

    run: Run
    result: Mapping[str, Any]
    marked: bool

    def cells(self) -> list[str]:
        """The cells of the row, under HEADINGS."""
        return [
            f"{self.run.label} ({single.drafted_by(self.run.report)})" + (MARK if self.marked else ""),
            single.task_of(self.result),
            f"{self.result['temperature']:g}",
            single.batch(self.result),
            single.prompts(self.result),
            single.accepted(self.result),
            f"{speed:.0f}" if (speed := self._speed()) is not None else "-",
            single.speedup(self.result),
            single.positions(self.result["conditional"]),
        ]

    def _speed(self) -> float | None:
        """Tokens a second with the draft; None where it is not known."""
        timing = self.result.get("speculative") or {}
        return timing.get("tokens_per_second")

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        names = ("task", "temperature", "samples", "acceptance_length", "acceptance_length_interval", "conditional")
        return {
            "run": self.run.label,
            "algorithm": self.run.report["draft"]["algorithm"],
            **{name: self.result[name] for name in names},
            **({"thinking": self.result["thinking"]} if "thinking" in self.result else {}),
            "batch_size": self.result.get("batch_size"),
            "tokens_per_second": self._speed(),
            "speedup": self.result.get("speedup"),
            "comparable": not self.marked,
        }


@frozen(kw_only=True)
class Comparison:
    """The rows of all runs, ordered by task, temperature and batch size, and how the runs differ.

    `differences` describe what makes figures incomparable; empty if nothing does. `remarks` mark no row: they are about
    speed, about how drafts propose, or about what is not known.
    """

    rows: tuple[Row, ...]
    differences: tuple[str, ...]
    remarks: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "rows": [row.as_json() for row in self.rows],
            "differences": list(self.differences),
            "remarks": list(self.remarks),
        }

    def terminal_table(self) -> Table:
        """The table for the terminal. `notes` belong below it."""
        cells = [row.cells() for row in self.rows]
        return single.table("", HEADINGS, cells, left=("draft", "task", "accepted length"))

    def notes(self) -> list[str]:
        """The notes below the table, one sentence in each line."""
        marked = [f"{MARK.strip()} not comparable with the first run as it is; see below"] if self.differences else []
        return [*marked, *self.differences, *self.remarks]

    def markdown(self) -> str:
        """The table and its notes as a Markdown page."""
        notes = [f"- {literal(line)}" for line in (*self.differences, *self.remarks)]
        warning = ["", f"**Not all rows are comparable** (those marked {literal(MARK)}):"] if self.differences else [""]
        lines = ["# Drafts compared", "", *markdown_table(HEADINGS, [row.cells() for row in self.rows])]
        lines += [*warning, "", *notes, ""] if notes else [""]
        return "\n".join([*lines, single.NOTE, ""])

    def latex(self) -> str:
        """The table and its notes for LaTeX with the package booktabs."""
        cells = [row.cells() for row in self.rows]
        words = ("draft", "task", "accepted length", HEADINGS[-1])
        return latex_table(HEADINGS, cells, left=words, notes=(*self.notes(), single.NOTE))


def compare(runs: Sequence[Run]) -> Comparison:
    """Put runs into one table. Every other run is compared with the first one."""
    runs = [_with_defaults(run) for run in named_alike(runs)]
    differences: list[str] = []
    unlike: set[int] = set()
    settings = dict.fromkeys(name for run in runs for name in run.report["settings"] if name != _TREE)
    untold: dict[int, list[str]] = {}
    for section, names in (("target", _TARGET), ("settings", tuple(settings))):
        for name in names:
            silent = {index for index, run in enumerate(runs) if _untold(run, section, name)}
            told = [index for index in range(len(runs)) if index not in silent]
            values = [runs[index].report[section].get(name) for index in told]
            unlike |= {index for index, value in zip(told, values, strict=True) if value != values[0]}
            differences += _difference(f"{section}.{name}", [runs[index] for index in told], values)
            for index in silent:
                untold.setdefault(index, []).append(f"{section}.{name}")
    here = [run for run in runs if "server" not in run.report]
    scaled_otherwise = [index for index, run in enumerate(runs) if run in here and not _scaled_alike(run, here[0])]
    calibrations = _difference("draft.calibration", here, [run.report["draft"].get("calibration") for run in here])
    if scaled_otherwise and any(_cut(run) for run in here):
        unlike.update(scaled_otherwise)
        differences += calibrations
    rows: list[Row] = []
    keys = dict.fromkeys(key for run in runs for key in _results(run))
    sizes = {size for _, _, size in keys}
    for task, temperature, size in keys:
        found = [_results(run).get((task, temperature, size)) for run in runs]
        have = [(index, result) for index, result in enumerate(found) if result is not None]
        where = f"{task} at T={temperature:g}" + (f", batch {size}" if len(sizes) > 1 else "")
        if len(have) < len(runs):
            missing = ", ".join(run.label for run, result in zip(runs, found, strict=True) if result is None)
            differences.append(f"{where} was not evaluated in {missing}")
        prompts = [(result["samples"], result.get("prompts_digest")) for _, result in have]
        if len(set(prompts)) > 1:
            # Older files have no digest.
            same = None not in (digests := {digest for _, digest in prompts}) and len(digests) == 1
            what = "has not as many answers to the same prompts" if same else "asked other prompts"
            counts = ", ".join(f"{_counted(result)} in {runs[index].label}" for index, result in have)
            differences.append(f"{where} {what}: {counts}")
        for (index, result), asked in zip(have, prompts, strict=True):
            marked = index in unlike or asked != prompts[0]
            rows.append(Row(run=runs[index], result=result, marked=marked))
    remarks = [
        f"a server does not tell {', '.join(names)}: not compared for {runs[index].label}"
        for index, names in untold.items()
    ]
    if scaled_otherwise and not any(_cut(run) for run in here):
        remarks += [f"this changes confidences and no accepted length: {line}" for line in calibrations]
    trees = _difference(f"settings.{_TREE}", here, [run.report["settings"].get(_TREE) for run in here])
    remarks += [f"a tree has the target verify more tokens in a round: {line}" for line in trees]
    if 0 < len(here) < len(runs):
        remarks.append("the speed of a server is that of its own machine and program")
    remarks += [
        f"speed-ups are of different machines: {line}"
        for name in _MACHINE
        for line in _difference(f"machine.{name}", here, [run.report["machine"].get(name) for run in here])
    ]
    remarks += [
        f"speed-ups were measured by another number of workers at once: {line}"
        for line in _difference("workers", runs, [single.most_workers(run.report) for run in runs])
    ]
    return Comparison(rows=tuple(rows), differences=tuple(differences), remarks=tuple(remarks))


def named_alike(runs: Sequence[Run]) -> list[Run]:
    """The runs, with tasks renamed so that the same file of prompts has the same name in all of them.

    A task that is read from a file is named by the file's path, which depends on where the run file lies. Tasks with
    the same file name and the same prompts take the name that the first of these runs gives them.
    """
    names: dict[tuple[str, str], str] = {}

    def named(result: Mapping[str, Any]) -> dict[str, Any]:
        task, digest = str(result["task"]), result.get("prompts_digest")
        return {**result, "task": task if digest is None else names.setdefault((task_name(task), digest), task)}

    return [
        evolve(run, report={**run.report, "results": [named(one) for one in run.report["results"]]}) for run in runs
    ]


def _with_defaults(run: Run) -> Run:
    return evolve(run, report={**run.report, "settings": with_defaults(run.report["settings"])})


def _results(run: Run) -> dict[tuple[str, float, int | None], Mapping[str, Any]]:
    return {
        (single.task_of(result), result["temperature"], result.get("batch_size")): result
        for result in run.report["results"]
    }


def _counted(result: Mapping[str, Any]) -> str:
    """The number of prompts and answers, and of those that are missing."""
    failed, turns = len(result.get("failures") or ()), result.get("turns_not_asked") or 0
    missing = [f"{failed} failed"] if failed else []
    missing += [f"{turns} later turns were not asked"] if turns else []
    return single.prompts(result) + (f" ({', '.join(missing)})" if missing else "")


def _untold(run: Run, section: str, name: str) -> bool:
    """Whether the run is a server's, and the server did not report this value."""
    own = run.report[section]
    return "server" in run.report and name in own and own[name] is None


def _cut(run: Run) -> bool:
    """Whether confidences decide how long the proposals are (by a threshold or a scheduler)."""
    settings = run.report["settings"]
    return bool(settings.get("confidence_threshold") or settings.get("scheduler"))


def _scaled_alike(run: Run, first: Run) -> bool:
    """Whether both runs, or neither, scaled confidences by a calibration. The same draft must have the same one."""
    drafts = [one.report["draft"] for one in (run, first)]
    mine, other = (draft.get("calibration") for draft in drafts)
    return mine == other or (None not in (mine, other) and drafts[0].get("revision") != drafts[1].get("revision"))


def _is_digest(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{32,}", value) is not None


def _difference(what: str, runs: Sequence[Run], values: Sequence[object]) -> list[str]:
    """A sentence that says which run has which value; none if all are equal."""
    if all(value == values[0] for value in values):  # also true of no values
        return []
    # The first characters of digests and commits are enough to see that they differ.
    short = [f"{value[:_DIGEST]}..." if _is_digest(value) else value for value in values]
    said = ", ".join(f"{value} in {run.label}" for run, value in zip(runs, short, strict=True))
    return [f"{what} differs: {said}"]
