"""The charts of a page, drawn from the figures of one or several evaluations.

This file knows metrics.json. svg.py turns a chart into SVG. A run has the same colour and mark in every chart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepspec_core.evaluation.comparison import Run
from deepspec_core.evaluation.report import once, task_of
from deepspec_core.reporting.svg import COLOURS, INK, MARKS, MUTED, Chart, drawing

# The results that are drawn in one chart: those of one task and temperature, each with the number of its run.
Panel = list[tuple[int, Mapping[str, Any]]]
PARTS = ("draft", "verify", "prefill", "host")
_WIDTH, _HEIGHT, _WIDE = 3.4, 2.5, 8.2  # inches
_LONGEST = 32


def acceptance(runs: Sequence[Run]) -> list[Chart]:
    """The acceptance rate by position, one chart for each task and temperature."""
    charts = []
    for title, whole in panels(runs):
        panel = [(index, result) for index, result in whole if result["marginal"] is not None]
        if not panel:
            continue
        with drawing(width=_WIDTH, height=_HEIGHT, x="position in the proposal", y="accepted") as drawn:
            for index, result in panel:
                for name, style in (("conditional", _line(index)), ("marginal", _faint(index))):
                    values = result[name]
                    drawn.axes.plot(range(1, len(values) + 1), [_or_nan(one) for one in values], **style)
            longest = max((len(result["marginal"]) for _, result in panel), default=1)
            drawn.axes.set_xticks(range(1, longest + 1, max(1, longest // 8)))
            _unit(drawn.axes.set_ylim, drawn.axes.yaxis)
            charts.append(Chart(title=title, svg=drawn.svg()))
    return charts


def reliability(runs: Sequence[Run]) -> list[Chart]:
    """The share of accepted prefixes by their confidence, all positions pooled, if drafts give confidences."""
    charts = []
    for title, panel in panels(runs):
        judged = [(index, result["confidence"]) for index, result in panel if result.get("confidence")]
        if not judged:
            continue
        with drawing(width=3.2, height=3.0, x="confidence", y="accepted") as drawn:
            drawn.axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=":")
            for index, confidence in judged:
                drawn.axes.plot(*_pooled_bins(confidence), **_line(index))
            _unit(drawn.axes.set_xlim, drawn.axes.xaxis)
            _unit(drawn.axes.set_ylim, drawn.axes.yaxis)
            said = ", ".join(f"{confidence['ece']:.3f}" for _, confidence in judged if confidence["ece"] is not None)
            charts.append(Chart(title=title, svg=drawn.svg(), remark=f"ECE {said}" if said else ""))
    return charts


def reliability_by_position(runs: Sequence[Run]) -> list[Chart]:
    """The same for each position by itself: a small chart for each position, task and temperature."""
    charts = []
    for title, panel in panels(runs):
        judged = [(index, result["confidence"]["positions"]) for index, result in panel if result.get("confidence")]
        for k in range(max((len(positions) for _, positions in judged), default=0)):
            found = [
                (index, positions[k]) for index, positions in judged if k < len(positions) and positions[k]["bins"]
            ]
            if not found:
                continue
            with drawing(width=2.1, height=1.9, x="confidence", y="accepted") as drawn:
                drawn.axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=":")
                for index, position in found:
                    points = [(one["confidence"], one["accepted"]) for one in position["bins"]]
                    drawn.axes.plot(*zip(*points, strict=True), **_line(index))
                _unit(drawn.axes.set_xlim, drawn.axes.xaxis, marks=3)
                _unit(drawn.axes.set_ylim, drawn.axes.yaxis, marks=3)
                said = ", ".join(f"{one['ece']:.3f}" for _, one in found if one["ece"] is not None)
                charts.append(
                    Chart(title=f"{title}: position {k + 1}", svg=drawn.svg(), remark=f"ECE {said}" if said else "")
                )
    return charts


def accepted_length(runs: Sequence[Run]) -> list[Chart]:
    """The accepted length of every task and temperature with its interval; one chart."""
    found = [
        (title, known)
        for title, panel in panels(runs)
        if (known := [(index, result) for index, result in panel if result["acceptance_length"] is not None])
    ]
    rows = sum(len(panel) for _, panel in found)
    if not rows:
        return []
    with drawing(width=_WIDE, height=0.75 + 0.3 * rows + 0.1 * len(found), x="tokens a round", names=True) as drawn:
        at, ticks = 0.0, []
        for _, panel in found:
            first = at
            for index, result in panel:
                length = result["acceptance_length"]
                low, high = result["acceptance_length_interval"] or (length, length)
                drawn.axes.plot([low, high], [at, at], color=_colour(index), linewidth=2)
                drawn.axes.plot([length], [at], **{**_line(index), "linestyle": "none"})
                drawn.axes.annotate(
                    f"{length:.2f}", (high, at), xytext=(7, 0), textcoords="offset points", va="center", color=INK
                )
                at += 1
            ticks.append((first + at - 1) / 2)
            at += 0.4
        drawn.axes.set_yticks(ticks, [title for title, _ in found])
        drawn.axes.tick_params(axis="y", colors=INK)
        drawn.axes.grid(visible=False, axis="y")
        drawn.axes.set_ylim(at - 0.8, -0.6)
        drawn.axes.set_xlim(left=1, right=1 + 1.12 * max(drawn.axes.get_xlim()[1] - 1, 0.5))
        return [Chart(title="", svg=drawn.svg())]


def by_context(runs: Sequence[Run]) -> list[Chart]:
    """The accepted length by the length of the context, one chart for each task and temperature."""
    charts = []
    for title, panel in panels(runs):
        spans = sorted({(one["start"], one["end"]) for _, result in panel for one in result.get("by_context") or ()})
        if not spans:
            continue
        with drawing(width=_WIDTH, height=_HEIGHT, x="tokens of context", y="tokens a round") as drawn:
            for index, result in panel:
                buckets = result.get("by_context") or ()
                places = [spans.index((one["start"], one["end"])) for one in buckets]
                drawn.axes.plot(places, [one["acceptance_length"] for one in buckets], **_line(index))
            drawn.axes.set_xticks(range(len(spans)), [f"{_short(start)}-{_short(end)}" for start, end in spans])
            drawn.axes.margins(x=0.1)
            drawn.axes.set_ylim(bottom=1, top=max(1.5, drawn.axes.get_ylim()[1]))
            charts.append(Chart(title=title, svg=drawn.svg()))
    return charts


def throughput(runs: Sequence[Run]) -> list[Chart]:
    """Tokens per second by batch size, if there are several sizes. One chart for each task and temperature."""
    charts = []
    for title, panel in panels(runs):
        key = (task_of(panel[0][1]), panel[0][1]["temperature"])
        lines = [
            (index, [one for one in run.report["results"] if (task_of(one), one["temperature"]) == key])
            for index, run in enumerate(runs)
        ]
        sizes = sorted({one["batch_size"] for _, line in lines for one in line if "batch_size" in one})
        if len(sizes) < 2:
            continue
        with drawing(width=_WIDTH, height=_HEIGHT, x="sequences at once", y="tokens per second") as drawn:
            for index, line in lines:
                for way, style in (("speculative", _line(index)), ("plain", _faint(index))):
                    points = sorted((one["batch_size"], one[way]["tokens_per_second"]) for one in line if one.get(way))
                    drawn.axes.plot([x for x, _ in points], [y for _, y in points], **style)
            drawn.axes.set_xscale("log", base=2)
            drawn.axes.set_xticks(sizes, [str(size) for size in sizes])
            drawn.axes.set_ylim(bottom=0)
            charts.append(Chart(title=title, svg=drawn.svg()))
    return charts


def time_split(runs: Sequence[Run]) -> list[Chart]:
    """How the time of an output token is spent, plain decoding beside speculative decoding; one chart."""
    found: dict[tuple[object, ...], list[tuple[str, Mapping[str, float]]]] = {}
    for run in runs:
        for result in run.report["results"]:
            what = f"{_title(result)}{_batch(result)}"
            place = found.setdefault((task_of(result), result["temperature"], result.get("batch_size")), [])
            for way, name in (("plain", "plain"), ("speculative", run.label)):
                if (timing := result.get(way)) and timing["tokens"] and timing["prefill"] is not None:
                    place.append((f"{what}: {name[:_LONGEST]}", timing))
    rows = [row for place in found.values() for row in place]
    if not rows:
        return []
    with drawing(width=_WIDE, height=0.75 + 0.28 * len(rows), x="milliseconds per output token", names=True) as drawn:
        for at, (_, timing) in enumerate(rows):
            left = 0.0
            for number, part in enumerate(PARTS):
                milliseconds = max(0.0, 1000 * timing[part] / timing["tokens"])
                drawn.axes.barh(at, milliseconds, left=left, height=0.7, color=_of_part(number), linewidth=0)
                left += milliseconds
            drawn.axes.annotate(
                f"{left:.2f}", (left, at), xytext=(4, 0), textcoords="offset points", va="center", color=INK
            )
        drawn.axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        drawn.axes.tick_params(axis="y", colors=INK)
        drawn.axes.grid(visible=False, axis="y")
        drawn.axes.invert_yaxis()
        drawn.axes.margins(x=0.1)
        return [Chart(title="", svg=drawn.svg())]


def panels(runs: Sequence[Run]) -> list[tuple[str, Panel]]:
    """The results by task and temperature, each group with its title. A group has one result per run (report.once)."""
    found: dict[tuple[str, float], Panel] = {}
    for index, run in enumerate(runs):
        for result in once(run.report["results"]):
            found.setdefault((task_of(result), result["temperature"]), []).append((index, result))
    return [(_title(panel[0][1]), panel) for panel in found.values()]


def _pooled_bins(confidence: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Mean confidence and share of accepted prefixes in each bin, over the rounds of all positions."""
    bins: dict[int, list[Mapping[str, Any]]] = {}
    for position in confidence["positions"]:
        for one in position["bins"]:
            bins.setdefault(one["index"], []).append(one)
    ordered = [ones for _, ones in sorted(bins.items())]
    return [_mean(ones, "confidence") for ones in ordered], [_mean(ones, "accepted") for ones in ordered]


def _mean(bins: Sequence[Mapping[str, Any]], key: str) -> float:
    return float(sum(one[key] * one["rounds"] for one in bins) / sum(one["rounds"] for one in bins))


def _title(result: Mapping[str, Any]) -> str:
    """The task and temperature. A long name, such as a file's path, is shortened to its end."""
    task = task_of(result)
    return f"{task if len(task) <= _LONGEST else '...' + task[-_LONGEST:]}, T = {result['temperature']:g}"


def _batch(result: Mapping[str, Any]) -> str:
    return f", batch {result['batch_size']}" if "batch_size" in result else ""


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _line(index: int) -> dict[str, Any]:
    return {"color": _colour(index), "linewidth": 2, "marker": MARKS[index % len(MARKS)], "markersize": 5.5}


def _faint(index: int) -> dict[str, Any]:
    return {"color": _colour(index), "linewidth": 1.2, "linestyle": (0, (4, 3))}


def _of_part(number: int) -> str:
    return MUTED if PARTS[number] == "host" else COLOURS[number]


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _unit(set_limits: Any, axis: Any, *, marks: int = 5) -> None:
    """Set up an axis of shares: 0 to 1, labelled in percent."""
    set_limits(-0.03, 1.03)
    shares = [mark / (marks - 1) for mark in range(marks)]
    axis.set_ticks(shares, [f"{share:.0%}" for share in shares])


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens and tokens % 1024 == 0 else str(tokens)
