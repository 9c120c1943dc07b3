"""One self-contained HTML page of one or several runs: tables, charts, answers, training curves, how to reproduce them.

The page needs no network and no script. The template escapes everything that comes from data, except charts, which
svg.py makes. This file knows the files of a run's folder.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import frozen

from deepspec_core.disk import in_words
from deepspec_core.evaluation import comparison, report
from deepspec_core.evaluation.comparison import Run, compare, named_alike
from deepspec_core.reporting import charts, curves, training
from deepspec_core.reporting.curves import Training, read_training
from deepspec_core.reporting.samples import NAME as SAMPLES
from deepspec_core.reporting.samples import read_samples
from deepspec_core.reporting.svg import COLOURS, THEME, Chart, page_wide

NAME: Final = "report.html"
_TEMPLATE: Final = Path(__file__).with_name("page.html.jinja")


@frozen(kw_only=True)
class Shown:
    """A run, and the parts of it that the page shows.

    run: Its evaluation; None if there is none.
    samples: Answers of the evaluation.
    training: Its lines of training figures; None if there are none.
    run_file: The text of its run file.
    """

    label: str
    run: Run | None
    samples: Sequence[Mapping[str, Any]]
    training: Training | None
    run_file: str | None


def shown(folder: Path, run: Run) -> Shown:
    """The evaluated run whose results lie in `folder`. Raises StageError if its samples are damaged."""
    return _shown(folder, run.label, run, read_samples(folder / "evaluate" / SAMPLES))


def shown_training(folder: Path, label: str) -> Shown:
    """A run whose folder has training figures, but no evaluation."""
    return _shown(folder, label, None, ())


def _shown(folder: Path, label: str, run: Run | None, samples: Sequence[Mapping[str, Any]]) -> Shown:
    config = folder / "config.toml"
    return Shown(
        label=label,
        run=run,
        samples=samples,
        training=read_training(folder, label),
        run_file=config.read_text(encoding="utf-8") if config.is_file() else None,
    )


def write_page(path: Path, runs: Sequence[Shown], *, partial: str = "partial") -> None:
    """Write the page. It appears only when all of it is written. Raises ConfigError if matplotlib is missing.

    `partial` is the suffix of the temporary file that is written first. A caller that may write at the same time as a
    stage of the run needs a suffix of its own.
    """
    text = page(runs)
    unfinished = path.with_name(f"{path.name}.{partial}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def page(runs: Sequence[Shown]) -> str:
    """The page's text. Raises ConfigError if matplotlib is missing."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    # A run has the same number in all charts. Evaluated runs have the lowest numbers.
    runs = sorted(runs, key=lambda one: one.run is None)
    evaluated = named_alike([one.run for one in runs if one.run is not None])
    compared = compare(evaluated) if evaluated else None
    trained = [(number, one.training) for number, one in enumerate(runs) if one.training is not None]
    return template.render(
        title=", ".join(one.label for one in runs),
        theme=THEME.read_text(encoding="utf-8"),
        runs=[
            {
                "label": one.label,
                "colour": index % len(COLOURS),
                "facts": _facts(one.run) if one.run is not None else [],
                "run_file": one.run_file,
                "evaluated": one.run is not None,
            }
            for index, one in enumerate(runs)
        ],
        headings=comparison.HEADINGS,
        rows=[row.cells() for row in compared.rows] if compared is not None else [],
        notes=compared.notes() if compared is not None else [],
        note=report.NOTE,
        sections=_sections(evaluated, trained),
        training_headings=curves.HEADINGS,
        training=[curves.summary(one) for _, one in trained],
        training_notes=[
            f"{one.label}: {one.unreadable} lines of its metrics.jsonl cannot be read"
            for _, one in trained
            if one.unreadable
        ],
        parts=charts.PARTS,
        size_headings=("draft", "parameters", "of its own", "size", "peak memory", "without the draft"),
        sizes=[_sizes(run) for run in evaluated],
        parting_headings=report.PARTING_HEADINGS,
        parting_note=report.PARTING_NOTE,
        partings=[(run.label, found) for run in evaluated if (found := report.partings(run.report))],
        answers=_answers(runs),
        checks=[line for run in evaluated for line in _checks(run, several=len(evaluated) > 1)],
    )


def _sections(runs: Sequence[Run], trained: Sequence[tuple[int, Training]]) -> list[dict[str, Any]]:
    """The charts under their headings. A heading without charts is left out."""
    drawn: list[tuple[str, str, list[Chart]]] = [
        (
            "Accepted length",
            "Tokens that a round commits, the target's own included, with 95% intervals over prompts.",
            charts.accepted_length(runs),
        ),
        (
            "Acceptance by position",
            "The share of proposed tokens that were accepted. Solid: among those after accepted ones. Dashed: of all.",
            charts.acceptance(runs),
        ),
        (
            "Reliability of confidences",
            "The share of prefixes that were accepted, by the draft's confidence in them. The dotted line is perfect.",
            charts.reliability(runs),
        ),
        (
            "Reliability by position",
            "The same for the prefixes that end at each position.",
            charts.reliability_by_position(runs),
        ),
        (
            "Accepted length by context",
            "Tokens that a round commits, by the tokens there are when it begins.",
            charts.by_context(runs),
        ),
        (
            "Throughput by batch size",
            "Tokens of output per second. Solid: with the draft. Dashed: without it. It depends on the machine.",
            charts.throughput(runs),
        ),
        (
            "Where the time goes",
            "Wall time of an output token. Host is what neither model computes. It depends on the machine.",
            charts.time_split(runs),
        ),
        *training.charts(curves.groups(trained)),
    ]
    wide = iter(page_wide([chart for _, _, several in drawn for chart in several]))
    sections = [(title, about, [next(wide) for _ in several]) for title, about, several in drawn]
    return [{"title": title, "about": about, "charts": several} for title, about, several in sections if several]


def _answers(runs: Sequence[Shown]) -> list[dict[str, Any]]:
    """Sample answers by task and temperature. The answers of several runs stand below each other."""
    found: dict[str, dict[str, Any]] = {}
    for index, one in enumerate(runs):
        for sample in one.samples:
            title = f"{report.task_of(sample)}, T = {sample['temperature']:g}"
            group = found.setdefault(title, {"title": title, "prompt": sample["prompt"], "answers": []})
            pieces = sample["pieces"]
            group["answers"].append(
                {
                    **sample,
                    "label": one.label,
                    "colour": index % len(COLOURS),
                    "rounds": max((piece["round"] for piece in pieces), default=0),
                    "tokens": sum(piece["tokens"] for piece in pieces),
                    "other_prompt": sample["prompt"] != group["prompt"],
                }
            )
    return list(found.values())


def _sizes(run: Run) -> list[str]:
    """The size of the draft, and the peak memory of decoding with and without it."""
    draft = run.report["draft"]
    counts = [draft.get(name) for name in ("parameters", "trainable_parameters")]
    numbers = ["-" if count is None else f"{count:,}" for count in counts]
    size = "-" if (found := draft.get("parameter_bytes")) is None else in_words(found)
    peaks = []
    for way in ("speculative", "plain"):
        most = [one[way]["peak_bytes"] for one in run.report["results"] if (one.get(way) or {}).get("peak_bytes")]
        peaks.append(in_words(max(most)) if most else "-")
    return [run.label, *numbers, size, *peaks]


def _facts(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """The facts about how the figures were made: titles, each with names and values."""
    made, results = run.report, run.report["results"]
    prompts = {
        f"{report.task_of(one)}, T = {one['temperature']:g}": f"{one['samples']} answers, digest {digest}"
        for one in results
        if (digest := one.get("prompts_digest"))
    }
    sections = (
        ("Server", made.get("server", {})),
        ("Draft", made["draft"]),
        ("Target", made["target"]),
        ("Settings", made["settings"]),
        ("Prompts", prompts),
        ("Machine", made["machine"]),
        ("Plugins", made.get("plugins", {})),
    )
    return [(title, [(name, _value(value)) for name, value in values.items()]) for title, values in sections]


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _checks(run: Run, *, several: bool) -> list[str]:
    lines = report.checks(run.report)
    return [f"{run.label}: {line}" for line in lines] if several else lines
