"""`deepspec compare`: a run's draft beside baselines (drafts that are not trained, and trees) on the run's own prompts.

Every baseline is evaluated as a separate run in a folder below the run's, so it resumes, and is skipped if it is
finished. Knows runs and their evaluations. evaluation/ puts the figures side by side.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import evolve, frozen
from rich.table import Table

from deepspec_core.config.load import RunFile
from deepspec_core.config.schema import MOST_NODES, TreeOptions
from deepspec_core.config.trees import require_trees
from deepspec_core.decoding.engine import Completion
from deepspec_core.errors import ConfigError, DataError, StageError
from deepspec_core.evaluation import comparison, report
from deepspec_core.evaluation.comparison import Comparison, compare
from deepspec_core.evaluation.markdown_table import literal, markdown_table
from deepspec_core.evaluation.metrics_file import NAME as METRICS
from deepspec_core.evaluation.metrics_file import read_metrics
from deepspec_core.evaluation.paired import Difference, NoDifference, paired_difference
from deepspec_core.evaluation.tasks import task_name
from deepspec_core.pipeline.recorded_rounds import completions_of
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.running import run_stages
from deepspec_core.plugins.discovery import Plugins
from deepspec_core.reporting.page import shown, write_page
from deepspec_core.untrained.named import no_such_draft, untrained_of

log = logging.getLogger("deepspec")
FOLDER = "compare"
TREE = "tree"
PAGE = "comparison.html"
AHEAD = "run's draft ahead by"
_AFTER = comparison.HEADINGS.index("accepted length") + 1
HEADINGS = (*comparison.HEADINGS[:_AFTER], AHEAD, *comparison.HEADINGS[_AFTER:])


_Key = tuple[str, float, int | None]


@frozen(kw_only=True)
class Compared:
    """The evaluations side by side.

    ahead: In the order of the rows, the accepted length of the run's draft minus that of the row. None for the run's
        own rows, and where there is none. The remarks then say why, and how many prompts a difference leaves out.
    """

    comparison: Comparison
    ahead: tuple[Difference | None, ...]
    folder: Path

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        whole = self.comparison.as_json()
        for row, ahead in zip(whole["rows"], self.ahead, strict=True):
            row["ahead"] = None if ahead is None else ahead.value
            row["ahead_interval"] = None if ahead is None else list(ahead.interval)
        return whole

    def terminal_table(self) -> Table:
        """The table for the terminal."""
        return report.table("", HEADINGS, self._cells(), left=("draft", "task", "accepted length"))

    def markdown(self) -> str:
        """The table and its notes as a page."""
        table = markdown_table(HEADINGS, self._cells())
        notes = [f"- {literal(line)}" for line in self.comparison.notes()]
        below = ["", *notes, ""] if notes else [""]
        return "\n".join(["# Compared with baselines", "", *table, *below, report.NOTE, ""])

    def _cells(self) -> list[list[str]]:
        cells = [row.cells() for row in self.comparison.rows]
        for row, ahead in zip(cells, self.ahead, strict=True):
            row.insert(HEADINGS.index(AHEAD), _said(ahead))
        return cells


def _said(ahead: Difference | None) -> str:
    return "-" if ahead is None else f"{ahead.value:+.2f} ({ahead.interval[0]:+.2f} to {ahead.interval[1]:+.2f})"


def compare_with(
    file: RunFile,
    path: Path,
    names: Sequence[str],
    *,
    plugins: Plugins,
    say: Callable[[str], None],
    beside: Sequence[Path] = (),
    force: Sequence[str] = (),
) -> Compared:
    """Evaluate the run's draft and the named baselines, as far as that is not done, and write the table and its page.

    `tree:N` among the names is the run's own draft, proposing trees of N tokens. `force` discards evaluations first.
    `beside` are folders of evaluations that are there already, such as a server's. Where the rounds of one are missing
    or damaged, its rows have no difference, and that is said before the first evaluation. Raises ConfigError for a name
    that is no draft without training. Raises DeepSpecError if an evaluation fails, and where there is none in `beside`.
    """
    own = Run(file=file, path=path, plugins=plugins)
    others = {str(folder): folder for folder in beside}
    _refuse_shared_names(file.run.name, [*names, *others])
    finished = {label: _finished(folder) for label, folder in others.items()}
    baselines = {name: _baseline(file, name, own) for name in names}
    rounds = {label: _rounds(label, others[label], found) for label, found in finished.items()}
    for _, remarks in rounds.values():
        for remark in remarks:
            say(remark)
    runs = {file.run.name: own}
    for name, baseline in baselines.items():
        runs[name] = Run(file=baseline, path=path, plugins=plugins)
    for name, run in runs.items():
        say(f"{name}:")
        run_stages(run, only=["evaluate"], force=force, say=say)
    made = {name: read_metrics(run.folder / METRICS) for name, run in runs.items()}
    rounds |= {name: _rounds(name, runs[name].folder, found) for name, found in made.items()}
    reports = made | finished
    folders = {name: run.folder for name, run in runs.items()} | others
    evaluated = [comparison.Run(label=name, report=found) for name, found in reports.items()]
    whole = compare(evaluated)
    remarks = [remark for name in reports for remark in rounds[name][1]]
    ahead: list[Difference | None] = []
    for row in whole.rows:
        mine = rounds[file.run.name][0].get(_key(row.result))
        other = rounds[row.run.label][0].get(_key(row.result))
        if row.run.label == file.run.name or mine is None or other is None:
            ahead.append(None)
            continue
        found = paired_difference(mine, other, seed=file.evaluate.seed)
        ahead.append(None if isinstance(found, NoDifference) else found)
        remarks += _of_difference(f"{row.run.label} on {_where(row.result)}", found)
    whole = evolve(whole, remarks=(*whole.remarks, *dict.fromkeys(remarks)))
    compared = Compared(comparison=whole, ahead=tuple(ahead), folder=own.folder / FOLDER)
    for name, text in (
        ("comparison.json", json.dumps(compared.as_json(), indent=1) + "\n"),
        ("comparison.md", compared.markdown()),
    ):
        (compared.folder / name).write_text(text, encoding="utf-8")
    pages = [shown(folders[one.label], one) for one in evaluated]
    try:
        write_page(compared.folder / PAGE, pages)
    except ConfigError as error:  # there is no library that draws
        log.warning("%s is left out: %s", PAGE, error)
    return compared


def _finished(folder: Path) -> dict[str, Any]:
    try:
        return read_metrics(folder / METRICS)
    except FileNotFoundError:
        raise StageError(
            "There is no evaluation in this folder",
            where=folder,
            expected=f"a folder with {METRICS}",
            fix="Name another in --beside.",
        ) from None


def _refuse_shared_names(own: str, names: Sequence[str]) -> None:
    """Raise ConfigError if two of the compared evaluations would have the same name or folder."""
    slugs = [_slug(name) for name in names]
    for index, name in enumerate(names):
        if name == own:
            raise ConfigError(
                "a baseline has the same name as the run",
                where="--with",
                found=name,
                expected="a name that differs from run.name",
                fix=f"Write an option too, such as {name}:max_tokens=7, or give the run another name.",
            )
        if slugs[index] in slugs[:index]:
            raise ConfigError(
                "two baselines would share one folder",
                where="--with",
                found=f"{names[slugs.index(slugs[index])]} and {name}",
                expected="names that differ in their letters or digits, which make the folder's name",
                fix="Compare them in two commands, each with an output of its own: --set run.output=...",
            )


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def _baseline(file: RunFile, name: str, own: Run) -> RunFile:
    """The run file of the baseline `name`.

    Raises ConfigError if it is neither a draft that is not trained nor a tree.
    """
    slug = _slug(name)
    baseline = evolve(
        file,
        run=evolve(file.run, name=slug, output=f"{file.run.output}/{FOLDER}/{slug}", stages=("evaluate",)),
        # What concerns the chains of the run's own draft. What cuts by its confidence is a difference that is told.
        evaluate=evolve(file.evaluate, calibration=None, confidence_threshold=0.0, scheduler=None),
    )
    registry = own.plugins.registry
    if (nodes := _nodes(name)) is not None:
        trained = registry.get("draft", file.draft.type).trained
        checkpoint = file.evaluate.draft or (f"{file.run.output}/draft" if trained else None)
        if file.evaluate.draft is None:  # a checkpoint says itself of which type it is
            require_trees(file.draft.type, registry, where=f"--with {name}")
        return evolve(
            baseline,
            draft=evolve(file.draft, init=None, tree=TreeOptions(nodes=nodes)),
            evaluate=evolve(baseline.evaluate, draft=checkpoint),
        )
    draft = untrained_of(name, base=own.base, registry=registry, where="--with")
    if draft is None:
        raise no_such_draft(name, where="--with", registry=registry)
    return evolve(
        baseline,
        target=evolve(file.target, layers=()),
        draft=draft,
        evaluate=evolve(baseline.evaluate, draft=None),
    )


def _nodes(name: str) -> int | None:
    """How many tokens the trees have, where the name says trees."""
    kind, colon, number = name.partition(":")
    if kind != TREE:
        return None
    if not colon or not re.fullmatch(r"[0-9]{1,9}", number) or not 1 <= int(number) <= MOST_NODES:
        raise ConfigError(
            "tree:N needs the number of tokens of the tree",
            where="--with",
            found=name,
            expected=f"{TREE}:N, N from 1 to {MOST_NODES}, as in {TREE}:16",
        )
    return int(number)


def _key(result: Mapping[str, Any]) -> _Key:
    # No two tasks of one evaluation share a name, but another evaluation may have the same file by another path.
    task = report.task_of({**result, "task": task_name(result["task"])})
    return task, result["temperature"], result.get("batch_size")


def _where(result: Mapping[str, Any]) -> str:
    return f"{report.task_of(result)} at temperature {result['temperature']:g}"


def _of_difference(where: str, found: Difference | NoDifference) -> list[str]:
    """A sentence that says why there is no difference, or that it leaves out prompts."""
    if isinstance(found, NoDifference):
        return [f"no difference from {where}: {found.reason}"]
    if not found.left_out:
        return []
    return [
        f"the difference from {where} is of {found.prompts} prompts: {found.left_out} more have answers in one of the "
        "two only"
    ]


def _rounds(label: str, folder: Path, evaluated: Mapping[str, Any]) -> tuple[dict[_Key, list[Completion]], list[str]]:
    """The answers of every result with their rounds, and remarks on those whose rounds cannot be read."""
    found: dict[_Key, list[Completion]] = {}
    remarks: list[str] = []
    if "server" in evaluated:
        return found, [f"no difference from {label}: a server tells counts, and not the rounds of each answer"]
    for result in evaluated["results"]:
        try:
            found[_key(result)] = completions_of(folder, evaluated, result)
        except (DataError, StageError) as error:
            remarks.append(
                f"no difference from {label} on {_where(result)}: {error.problem} ({error.where}). Copy the whole "
                "folder of that evaluation, with its folder evaluate/, or evaluate again there with --force evaluate"
            )
    return found, remarks
