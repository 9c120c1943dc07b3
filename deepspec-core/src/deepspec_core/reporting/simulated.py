"""The picture of a simulation: throughput of all requests against tokens per second of one user, a curve per policy.

This file knows outcomes of replays. svg.py turns a chart into SVG.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from deepspec_core.evaluation.simulation import Outcome, best_of_kinds
from deepspec_core.reporting.svg import COLOURS, INK, MARKS, MUTED, Chart, alone, drawing

TITLE: Final = "Throughput by speed for a user, simulated"
_WIDTH, _HEIGHT = 7.5, 4.6  # inches


def picture(outcomes: Sequence[Outcome]) -> str:
    """The text of an SVG file. Each point is a number of requests; the curve without speculation is labelled with it.

    Of the fixed lengths and of the thresholds, only the best at each number of requests is drawn. Raises ConfigError if
    matplotlib is missing.
    """
    return alone(chart(outcomes))


def is_picture(path: Path) -> bool:
    """Whether a file is a picture that this module wrote."""
    try:
        return f"<title>{TITLE}</title>" in path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False


def chart(outcomes: Sequence[Outcome]) -> Chart:
    """The same picture as a chart of a page."""
    curves: dict[str, list[Outcome]] = {}
    for one in best_of_kinds(outcomes):
        curves.setdefault(one.policy.split()[0], []).append(one)
    x, y = "tokens per second of one user", "tokens per second of all requests"
    with drawing(width=_WIDTH, height=_HEIGHT, x=x, y=y) as drawn:
        for index, (kind, own) in enumerate(curves.items()):
            own = sorted(own, key=lambda one: one.requests)
            points = [(one.tokens_per_second_per_user, one.tokens_per_second) for one in own]
            name = f"{kind} (the best)" if own[0].policy != kind else kind
            bound = {"linestyle": ":"} if kind == "oracle" else {}
            drawn.axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[index],
                marker=MARKS[index],
                markersize=5.5,
                linewidth=2,
                label=name,
                **bound,
            )
            if kind == "none":
                for one, point in zip(own, points, strict=True):
                    drawn.axes.annotate(
                        str(one.requests), point, xytext=(0, -14), textcoords="offset points", ha="center", color=MUTED
                    )
        drawn.axes.set_xlim(left=0)
        drawn.axes.set_ylim(bottom=0)
        drawn.axes.legend(frameon=False, labelcolor=INK)
        return Chart(title=TITLE, svg=drawn.svg())
