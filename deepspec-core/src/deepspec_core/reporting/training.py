"""The curves of training as charts of a page, and as one PNG picture.

This file knows how a panel is drawn, in the colours of the page or of the picture. curves.py decides what is in it.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from deepspec_core.reporting.curves import Group, Panel, Series, Training, groups
from deepspec_core.reporting.svg import COLOURS, GRID, INK, MARKS, MUTED, Chart, drawing, matplotlib_settings, styled

NAME: Final = "training.png"
_WIDTH, _HEIGHT = 3.4, 2.5  # inches of a panel
_ACROSS: Final = 3
_TOP: Final = 0.4  # inches above the panels, for the runs' names
_DPI: Final = 110
# The page's light theme, for pictures, which have one theme only.
_LIGHT: Final = {
    INK: "#1b1f24",
    MUTED: "#5b6470",
    GRID: "#d7dbe0",
    **dict(
        zip(
            COLOURS,
            ("#2367c4", "#c8590a", "#1a8560", "#a33a8b", "#8a6d00", "#0b7f95", "#c02d3c", "#6650c2"),
            strict=True,
        )
    ),
}
_AS_THEY_ARE: Final = {colour: colour for colour in _LIGHT}


def charts(found: Sequence[Group]) -> list[tuple[str, str, list[Chart]]]:
    """Each group as (heading, description, charts). Raises ConfigError if matplotlib is missing."""
    drawn = []
    for group in found:
        several = []
        for panel in group.panels:
            with drawing(width=_WIDTH, height=_HEIGHT, x="step", y=panel.y) as one:
                _draw(one.axes, panel, _AS_THEY_ARE)
                several.append(Chart(title=panel.title, remark=panel.remark, svg=one.svg()))
        drawn.append((group.title, group.about, several))
    return drawn


def write_picture(path: Path, runs: Sequence[Training]) -> None:
    """Write all panels as one PNG. It appears only when all of it is written. Raises ConfigError without matplotlib."""
    panels = [panel for group in groups(list(enumerate(runs))) for panel in group.panels]
    rows = -(-len(panels) // _ACROSS)
    with matplotlib_settings():
        from matplotlib.figure import Figure

        width, height = _ACROSS * _WIDTH, rows * _HEIGHT + _TOP
        figure = Figure(figsize=(width, height), facecolor="white")
        # Fixed margins, in inches: measured ones take several times as long.
        figure.subplots_adjust(
            left=0.62 / width,
            right=1 - 0.12 / width,
            bottom=0.5 / height,
            top=1 - (_TOP + 0.25) / height,
            wspace=0.25,
            hspace=0.45,
        )
        cells = figure.subplots(rows, _ACROSS, squeeze=False).flat
        for axes, panel in zip(cells, panels, strict=False):
            styled(axes, x="step", y=panel.y, muted=_LIGHT[MUTED], grid=_LIGHT[GRID])
            axes.set_title(panel.title, color=_LIGHT[INK], fontsize=10, loc="left")
            _draw(axes, panel, _LIGHT)
        for axes in figure.axes[len(panels) :]:
            axes.set_visible(False)
        handles = [
            _line(axes=figure.axes[0], colour=_LIGHT[COLOURS[number % len(COLOURS)]], mark=MARKS[number % len(MARKS)])
            for number in range(len(runs))
        ]
        figure.legend(handles, [run.label for run in runs], loc="upper left", frameon=False, ncols=4)
        written = io.BytesIO()
        figure.savefig(written, format="png", dpi=_DPI, metadata={"Software": None})
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(written.getvalue())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _draw(axes: Any, panel: Panel, colours: dict[str, str]) -> None:
    for one in panel.series:
        _draw_series(axes, one, colours[COLOURS[one.run % len(COLOURS)]])
    axes.xaxis.set_major_formatter(lambda value, _place: _short(value))
    axes.yaxis.set_major_formatter(lambda value, _place: _short(value))
    axes.locator_params(axis="x", nbins=5)
    values = [value for one in panel.series for value in one.values]
    if panel.unit == "share":
        low, high = (float(limit) for limit in axes.get_ylim())
        axes.set_ylim(max(-0.02, low), min(1.02, max(high, low + 0.02)))
        axes.yaxis.set_major_formatter(lambda value, _place: f"{value:.0%}")
    elif panel.unit == "amount":
        axes.set_ylim(bottom=0, top=1.1 * max(values) or 1.0)
    elif panel.unit == "log" and min(values) > 0 and max(values) > 10 * min(values):
        from matplotlib.ticker import LogLocator, NullLocator

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(lambda value, _place: _short(value))


def _draw_series(axes: Any, one: Series, colour: str) -> None:
    if one.kind == "points":
        mark = MARKS[one.run % len(MARKS)]
        axes.plot(one.steps, one.values, color=colour, linewidth=0.8, marker=mark, markersize=5.5)
        return
    style: dict[str, Any] = {"color": colour, "linewidth": 1.8, "alpha": one.shade}
    if one.kind == "dashed":
        style |= {"linewidth": 1.2, "linestyle": (0, (4, 3))}
    if len(one.values) == 1:
        style["marker"] = MARKS[one.run % len(MARKS)]
    if one.smooth is not None and one.kind == "line" and one.shade == 1.0:
        axes.plot(one.steps, one.values, color=colour, linewidth=0.8, alpha=0.35)
    axes.plot(one.steps, one.smooth or one.values, **style)


def _line(*, axes: Any, colour: str, mark: str) -> Any:
    return axes.plot([], [], color=colour, linewidth=2, marker=mark)[0]


def _short(value: float) -> str:
    """An axis label for a number, in a few characters."""
    if abs(value) >= 10000:
        return f"{value / 1000:g}k"
    if 0 < abs(value) < 0.01:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    return f"{value:.6g}"
