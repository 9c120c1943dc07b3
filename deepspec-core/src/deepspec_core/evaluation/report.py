"""Turns the figures of an evaluation into a Markdown report and a table for the terminal.

The result of an evaluation is metrics.json. Everything here can be made again from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from deepspec_core.disk import in_words
from deepspec_core.evaluation import failed_samples
from deepspec_core.evaluation.markdown_table import literal, markdown_table
from deepspec_core.evaluation.server_report import of_server, server_lines

SERVER_NOTE = (
    "Accepted length counts tokens committed per round, the target's own token included, pooled over the rounds that "
    "the server counted; acceptance by position is of all its rounds. A dash is what the server does not tell."
)
NOTE = (
    "Accepted length counts tokens committed per round, the target's own token included, pooled over rounds; the "
    "interval is a 95% bootstrap over prompts. Speed is measured on this machine with plain decoding of the same "
    "target beside it; eager speed-ups do not predict those of a serving engine."
)


def drafted_by(report: Mapping[str, Any]) -> str:
    """The name of what proposed: the draft's algorithm, or the server, which does not report its draft."""
    server = report.get("server")
    return str(report["draft"]["algorithm"] if server is None else server["engine"])


def task_of(result: Mapping[str, Any]) -> str:
    """The task, with the mode where a report has both."""
    mode = result.get("thinking")
    return str(result["task"]) if mode is None else f"{result['task']} {'with' if mode else 'without'} thinking"


def once(results: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One result per task and temperature, at its first batch size: acceptance does not depend on the batch size."""
    found: dict[tuple[str, float], Mapping[str, Any]] = {}
    for result in results:
        found.setdefault((task_of(result), result["temperature"]), result)
    return list(found.values())


def positions(values: Sequence[float | None] | None) -> str:
    """The acceptance rate of each position, in percent."""
    if values is None:
        return "-"
    return " ".join("-" if value is None else f"{100 * value:.0f}" for value in values)


def accepted(result: Mapping[str, Any]) -> str:
    """The accepted length with its interval."""
    if result["acceptance_length"] is None:
        return "-"
    if result["acceptance_length_interval"] is None:
        return f"{result['acceptance_length']:.2f}"
    low, high = result["acceptance_length_interval"]
    return f"{result['acceptance_length']:.2f} ({low:.2f}-{high:.2f})"


def batch(result: Mapping[str, Any]) -> str:
    """The batch size; unknown where a file of an older version does not have it."""
    halved = ", ".join(map(str, result.get("halved_to", ())))
    return str(result.get("batch_size", "-")) + (f" (halved: {halved})" if halved else "")


def prompts(result: Mapping[str, Any]) -> str:
    """The number of prompts, and that of answers if there are more. Older files have only the number of answers."""
    answers = result["samples"]
    asked = result.get("prompts", answers)
    return str(asked) if asked == answers else f"{asked} ({answers} answers)"


def speedup(result: Mapping[str, Any]) -> str:
    """The speed-up over plain decoding, if it was measured."""
    return f"{result['speedup']:.2f}x" if "speedup" in result else "-"


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str]) -> Table:
    """A table for the terminal. The columns in `left` hold words; the others hold numbers.

    All text is shown literally: a name in square brackets is no markup.
    """
    made = Table(title=Text(title, style="table.title") if title else None)
    for heading in headings:
        made.add_column(Text(heading), justify="left" if heading in left else "right")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def _rows(report: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for result in report["results"]:
        plain, fast = result.get("plain"), result.get("speculative")
        rows.append(
            [
                task_of(result),
                f"{result['temperature']:g}",
                batch(result),
                prompts(result),
                accepted(result),
                positions(result["marginal"]),
                positions(result["conditional"]),
                f"{plain['tokens_per_second']:.0f}" if plain else "-",
                f"{fast['tokens_per_second']:.0f}" if fast else "-",
                speedup(result),
            ]
        )
    return rows


def _by_context(report: Mapping[str, Any]) -> list[str]:
    """A table of the accepted length by context length. Reports of older versions do not have the figures."""
    results = [result for result in once(report["results"]) if result.get("by_context")]
    spans = sorted({(bucket["start"], bucket["end"]) for result in results for bucket in result["by_context"]})
    if not spans:
        return []
    rows = []
    for result in results:
        cells = {(one["start"], one["end"]): one for one in result["by_context"]}
        shown = [_cell(cells.get(span)) for span in spans]
        rows.append([task_of(result), f"{result['temperature']:g}", *shown])
    headings = ["task", "T", *(f"{start:,} to {end - 1:,}" for start, end in spans)]
    return ["", "## Accepted length by tokens of context (rounds)", "", *markdown_table(headings, rows)]


RELIABILITY_HEADINGS = ("task", "T", "position", "rounds", "confidence, %", "accepted, %", "ECE", "Brier", "AUROC")


def reliability_rows(name: str, temperature: float, found: Mapping[str, Any]) -> list[list[str]]:
    """A row for each position of `found` (Reliability.as_json) under RELIABILITY_HEADINGS, and one for all."""
    rows = [
        [
            name,
            f"{temperature:g}",
            str(k + 1),
            f"{position['rounds']:,}",
            f"{100 * position['confidence']:.1f}",
            f"{100 * position['accepted']:.1f}",
            *map(figure, (position["ece"], position["brier"], position["auroc"])),
        ]
        for k, position in enumerate(found["positions"])
    ]
    figures = map(figure, (found["ece"], found["brier"], found["auroc"]))
    return [*rows, [name, f"{temperature:g}", "all", "", "", "", *figures]]


def _reliability(report: Mapping[str, Any]) -> list[str]:
    """A table of how well confidences predict acceptance, if there are any confidences."""
    threshold = report["settings"].get("confidence_threshold") or 0
    title = ["", "## Confidence beside acceptance", ""]
    if report["settings"].get("scheduler"):
        return [*title, "Not judged, because a scheduler cut the proposals by confidence."]
    if threshold > 0:
        return [*title, f"Not judged, because proposals were cut at a confidence of {threshold:g}."]
    rows = [
        row
        for result in once(report["results"])
        if result.get("confidence")
        for row in reliability_rows(task_of(result), result["temperature"], result["confidence"])
    ]
    if not rows:
        return []
    return [
        *title,
        "Confidence is the draft's probability that all tokens up to a position are accepted; beside it the share of "
        "rounds in which they were. ECE has 20 bins of equal width. Figures of all positions are weighted by rounds.",
        "",
        *markdown_table(RELIABILITY_HEADINGS, rows),
    ]


def _size(draft: Mapping[str, Any]) -> str:
    return f"{in_words(draft['parameter_bytes'])}, " if "parameter_bytes" in draft else ""


def figure(value: float | None) -> str:
    """The figure with three decimals; a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"


def _cell(bucket: Mapping[str, Any] | None) -> str:
    return "-" if bucket is None else f"{bucket['acceptance_length']:.2f} ({bucket['rounds']:,})"


HEADINGS = (
    "task",
    "T",
    "batch",
    "prompts",
    "accepted length",
    "acceptance by position, %",
    "conditional, %",
    "plain tok/s",
    "speculative tok/s",
    "speed-up",
)


def terminal_table(report: Mapping[str, Any]) -> Table:
    """The table shown at the end of a run."""
    title = f"{report['run']}: {drafted_by(report)} on {report['target']['model']}"
    return table(title, HEADINGS, _rows(report), left=("task", "accepted length"))


_TIME_HEADINGS = ("task", "T", "batch", "prefill", "draft", "verify", "host", "peak memory", "plain")
PARTING_HEADINGS = ("task", "batch", "prompt", "parts at token", "plain", "speculative", "logit gap")
PARTING_NOTE = (
    "The gap is the target's logit of the plain token minus that of the speculative one, where the outputs part. "
    "Verification and plain decoding round sums differently, so a gap near 0 is rounding; a large one is a mistake."
)
_MOST_PARTINGS = 50


def partings(report: Mapping[str, Any]) -> list[list[str]]:
    """A row under PARTING_HEADINGS for each output that differs. Where there are many, only the first ones."""
    rows = [
        [
            task_of(result),
            batch(result),
            one["id"],
            *(_or_dash(one.get(name)) for name in ("position", "plain_token", "speculative_token")),
            "-" if (gap := one.get("logit_gap")) is None else f"{gap:+.4g}",
        ]
        for result in report["results"]
        for one in result.get("mismatches") or ()
    ]
    more = len(rows) - _MOST_PARTINGS
    return rows[:_MOST_PARTINGS] + ([[f"and {more} more, in metrics.json", *[""] * 6]] if more > 0 else [])


def failed(report: Mapping[str, Any]) -> list[str]:
    """A table of the samples that failed, if any did."""
    rows = [
        row
        for result in report["results"]
        for row in failed_samples.rows(task_of(result), batch(result), result.get("failures", ()))
    ]
    title = ["", "## Samples that failed", "", failed_samples.NOTE, ""]
    return [*title, *markdown_table(failed_samples.HEADINGS, rows)] if rows else []


def memory(timing: Mapping[str, Any]) -> str:
    """The peak memory, where it is known."""
    peak = timing.get("peak_bytes")
    return "-" if peak is None else in_words(peak)


def _or_dash(value: object) -> str:
    return "-" if value is None else str(value)


def checks(report: Mapping[str, Any]) -> list[str]:
    """Sentences that say whether greedy outputs equal plain decoding's, and what inflates or slows the figures."""
    lines = []
    for result in report["results"]:
        size = f", batch {batch(result)}" if len(once(report["results"])) < len(report["results"]) else ""
        name = f"{task_of(result)} at temperature {result['temperature']:g}{size}"
        if result["temperature"] == 0 and "plain" in result and result["mismatches"] is not None:
            same = result["samples"] - len(result["mismatches"])
            lines.append(f"{name}: {same} of {result['samples']} outputs equal plain greedy decoding.")
        lines.append(
            f"{name}: {100 * result['limit_share']:.0f}% of answers hit the token limit, "
            f"{100 * result['loop_share']:.0f}% end in a loop."
        )
        if result.get("calibration_fitted_here"):
            lines.append(
                f"{name}: the calibration was fitted on these prompts. Confidences look better than on others."
            )
        if failures := result.get("failures"):
            lines.append(f"{name}: {len(failures)} samples failed and are in no figure.")
        lines += [f"{name}: {line}" for line in of_server(result)]
    if (workers := most_workers(report)) > 1:
        lines.append(
            f"Up to {workers} workers decoded at the same time: times, tokens per second and speed-ups are of one "
            "worker beside the others. To measure speed, evaluate with one worker alone."
        )
    return lines


def most_workers(report: Mapping[str, Any]) -> int:
    """The largest number of workers that decoded at the same time."""
    return max((result.get("workers", 1) for result in report["results"]), default=1)


def markdown(report: Mapping[str, Any]) -> str:
    """The report as a Markdown page."""
    if "server" in report:
        return server_markdown(report)
    draft, target = report["draft"], report["target"]
    lines = [
        f"# {literal(report['run'])}",
        "",
        f"{draft['algorithm']} draft ({draft['parameters']:,} parameters, {draft['trainable_parameters']:,} trained, "
        f"{_size(draft)}{draft['num_layers']} layers, at most {draft['max_tokens']} tokens a round, "
        f"taps {list(draft['taps'])}) for "
        f"{target['model']} ({target['num_layers']} layers, revision {target['revision'][:12]}).",
        "",
        *markdown_table(HEADINGS, _rows(report)),
        "",
        NOTE,
        "",
        "## Where the time goes (speculative, % of wall)",
        "",
    ]
    rows = []
    for result in report["results"]:
        timing = result["speculative"]
        parts = [f"{100 * timing[part] / timing['wall']:.0f}" for part in ("prefill", "draft", "verify", "host")]
        cells = [task_of(result), f"{result['temperature']:g}", batch(result), *parts]
        cells += [memory(timing), memory(result.get("plain", {}))]
        rows.append(cells)
    lines += markdown_table(_TIME_HEADINGS, rows)
    lines += _by_context(report)
    lines += _reliability(report)
    if rows := partings(report):
        lines += ["", "## Outputs that differ from plain greedy decoding", "", PARTING_NOTE, ""]
        lines += markdown_table(PARTING_HEADINGS, rows)
    lines += failed(report)
    lines += ["", "## Checks", "", *(f"- {literal(line)}" for line in checks(report))]
    lines += [
        "",
        "## Settings",
        "",
        *(f"- {name}: {value}" for name, value in report["settings"].items()),
        f"- calibration: {draft.get('calibration')}",
        *(f"- {name}: {value}" for name, value in report["machine"].items()),
        "",
    ]
    return "\n".join(lines)


def server_markdown(report: Mapping[str, Any]) -> str:
    """The page of a server's results."""
    server = report["server"]
    lines = [
        f"# {literal(report['run'])}, answered by {server['engine']}",
        "",
        f"{server['engine']} at {server['address']}, which serves {server['model']}.",
        "",
        *markdown_table(HEADINGS, _rows(report)),
        "",
        SERVER_NOTE,
        *server_lines(report),
        *failed(report),
        "",
        "## Checks",
        "",
        *(f"- {literal(line)}" for line in checks(report)),
        "",
        "## Settings",
        "",
        *(f"- {name}: {value}" for name, value in report["settings"].items()),
        "",
    ]
    return "\n".join(lines)
