"""The curves of training: which figures of metrics.jsonl are drawn together, and their points.

This file knows the names and meanings of figures (docs/training-figures.md). A figure with an unknown name gets a panel
of its own. A figure that a run does not have is left out. This file does not know colours or how to draw.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

from attrs import evolve, field, frozen

from deepspec_core.disk import in_words
from deepspec_core.training.metrics_lines import HELD_OUT_LENGTH, METRICS, Line, read_lines

# More points than pixels are averaged.
MOST_POINTS: Final = 400
# The number of a curve's points that are averaged for the bold line, if there are enough.
_SMOOTHED_OVER: Final = 20
_FEWEST_TO_SMOOTH: Final = 40
_SLOT: Final = re.compile(r"(accept_rate|accuracy)@(\d+)")
# Figures that are not drawn, because they are no curve or repeat another figure.
_NOT_DRAWN: Final = ("step", "epoch", "slowest_rank", "sequences_per_second")
# Figures that are not averaged, because their mean would be a value that never occurred.
_WITHOUT_NOISE: Final = ("lr", "peak_memory_bytes")

Kind = Literal["line", "dashed", "points"]


@frozen(kw_only=True)
class Training:
    """A run's lines of training figures, and the run's name in the report."""

    label: str
    lines: Sequence[Line]
    unreadable: int = 0


@frozen(kw_only=True)
class Series:
    """One curve of the run with this number: its points, smoothed points if there are many, and how it is drawn.

    shade: 1, or less for the curves of one panel that form a sequence, such as positions.
    """

    run: int
    name: str
    steps: Sequence[float]
    values: Sequence[float]
    smooth: Sequence[float] | None
    kind: Kind = "line"
    shade: float = 1.0


@frozen(kw_only=True)
class Panel:
    """What is drawn on one pair of axes. `unit`: "", "share", "log", or "amount" for an axis that begins at 0."""

    title: str
    y: str
    series: Sequence[Series]
    remark: str = ""
    unit: str = ""


@frozen(kw_only=True)
class Group:
    """Panels under one heading."""

    title: str
    about: str
    panels: list[Panel] = field(factory=list)


def read_training(folder: Path, label: str) -> Training | None:
    """The training figures in a run's folder. None if they have no curves, or if no training ran in this folder."""
    lines, unreadable = read_lines(folder / "train" / METRICS)
    drawn = any(name not in _NOT_DRAWN for line in lines for name in line)
    return Training(label=label, lines=lines, unreadable=unreadable) if drawn else None


def groups(runs: Sequence[tuple[int, Training]]) -> list[Group]:
    """All panels of the runs, grouped by topic. No group is empty. Each run comes with its number in the report."""
    names = list(dict.fromkeys(name for _, run in runs for line in run.lines for name in line))
    slots = [name for name in names if _SLOT.fullmatch(name)]
    terms = [name for name in names if name.startswith("loss/")]
    drawn = [
        Group(
            title="Training: loss",
            about="Means over the steps between two lines. The loss is the sum of its terms times their coefficients.",
            panels=[
                _panel(runs, {"loss": "line"}, title="loss", y="loss"),
                *(_panel(runs, {name: "line"}, title=name.removeprefix("loss/"), y="loss term") for name in terms),
            ],
        ),
        Group(
            title="Training: accepted length",
            about="Tokens that a round commits. Solid: estimated from the draft's and the target's distributions. "
            "Dashed: estimated by greedy decoding. Points: real speculative decoding on held-out prompts.",
            panels=[
                _panel(
                    runs,
                    {"tau_probabilistic": "line", "tau_greedy": "dashed", HELD_OUT_LENGTH: "points"},
                    title="accepted length",
                    y="tokens a round",
                )
            ],
        ),
        Group(
            title="Training: acceptance by position",
            about="The first position has the strongest line. Accepted is the expected share of tokens that the "
            "target accepts. Accuracy is the share of labels that are the draft's likeliest token.",
            panels=[
                _of_slots([one], figure, slots, title=what if len(runs) == 1 else f"{what}: {one[1].label}")
                for figure, what in (("accept_rate", "accepted"), ("accuracy", "accuracy"))
                for one in runs
            ],
        ),
        Group(
            title="Training: optimizer",
            about="The gradient's norm is measured before it is clipped.",
            panels=[
                _panel(runs, {"lr": "line"}, title="learning rate", y="learning rate"),
                _panel(runs, {"grad_norm": "line"}, title="gradient norm", y="norm", unit="log"),
            ],
        ),
        Group(
            title="Training: speed and memory",
            about="They depend on the machine. Padding is the share of positions that hold no token of a sample.",
            panels=[
                _panel(
                    runs, {"tokens_per_second": "line"}, title="tokens a second", y="tokens a second", unit="amount"
                ),
                _panel(runs, {"step_seconds": "line"}, title="time of a step", y="seconds", unit="amount"),
                _panel(
                    runs,
                    {"slowest_rank_seconds": "line", "fastest_rank_seconds": "dashed"},
                    title="slowest and fastest rank",
                    y="own seconds a step",
                    unit="amount",
                ),
                _panel(runs, {"padding_share": "line"}, title="padding", y="of positions", unit="share"),
                _panel(
                    runs,
                    {"peak_memory_bytes": "line"},
                    title="peak memory",
                    y="GB",
                    unit="amount",
                    scale=lambda value: value / 1e9,
                ),
            ],
        ),
    ]
    known = {one.name for group in drawn for panel in group.panels for one in panel.series}
    others = [name for name in names if name not in known and name not in _NOT_DRAWN and name not in slots]
    drawn.append(
        Group(
            title="Training: other figures",
            about="As they are called in metrics.jsonl.",
            panels=[_panel(runs, {name: "line"}, title=name, y="") for name in others],
        )
    )
    filled = [
        evolve(group, panels=[panel for panel in group.panels if any(one.values for one in panel.series)])
        for group in drawn
    ]
    return [group for group in filled if group.panels]


HEADINGS: Final = (
    "run",
    "steps",
    "epochs",
    "loss",
    "accepted length, estimated",
    "best on held-out prompts",
    "tokens/s",
    "peak memory",
)


def summary(run: Training) -> list[str]:
    """The last figures of a run, under HEADINGS. For held-out prompts: the greatest accepted length and its step."""

    def last(name: str) -> float | None:
        return next((line[name] for line in reversed(run.lines) if name in line), None)

    def number(name: str, form: str) -> str:
        return "-" if (value := last(name)) is None else format(value, form)

    held_out = [(line[HELD_OUT_LENGTH], line["step"]) for line in run.lines if HELD_OUT_LENGTH in line]
    best = max(held_out, default=None)
    memory = last("peak_memory_bytes")
    return [
        run.label,
        f"{run.lines[-1]['step']:,.0f}",
        number("epoch", ".2f"),
        number("loss", ".4g"),
        number("tau_probabilistic", ".2f"),
        "-" if best is None else f"{best[0]:.2f} at step {best[1]:,.0f}",
        number("tokens_per_second", ",.0f"),
        "-" if memory is None else in_words(memory),
    ]


def _panel(
    runs: Sequence[tuple[int, Training]],
    names: Mapping[str, Kind],
    *,
    title: str,
    y: str,
    unit: str = "",
    scale: Callable[[float], float] = float,
) -> Panel:
    found = [_series(number, run, name, kind, scale) for number, run in runs for name, kind in names.items()]
    return Panel(title=title, y=y, series=[one for one in found if one.values], unit=unit)


def _of_slots(runs: Sequence[tuple[int, Training]], figure: str, names: Sequence[str], *, title: str) -> Panel:
    own = sorted(
        (name for name in names if name.startswith(f"{figure}@")), key=lambda name: int(name.partition("@")[2])
    )
    found = [
        evolve(_series(number, run, name, "line", float), shade=1.0 - 0.75 * place / max(1, len(own) - 1))
        for number, run in runs
        for place, name in enumerate(own)
    ]
    return Panel(title=title, y="share", series=[one for one in found if one.values], unit="share")


def _series(number: int, run: Training, name: str, kind: Kind, scale: Callable[[float], float]) -> Series:
    points = [(line["step"], scale(line[name])) for line in run.lines if name in line]
    size = -(-len(points) // MOST_POINTS) or 1
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    steps, values = ([sum(point[axis] for point in one) / len(one) for one in bins] for axis in (0, 1))
    noisy = kind != "points" and name not in _WITHOUT_NOISE and len(values) >= _FEWEST_TO_SMOOTH
    smooth = _smoothed(values) if noisy else None
    return Series(run=number, name=name, steps=steps, values=values, smooth=smooth, kind=kind)


def _smoothed(values: Sequence[float]) -> list[float]:
    """The moving average around each point. Near an end, it covers only the points that exist."""
    reach = max(1, len(values) // _SMOOTHED_OVER // 2)
    means = []
    for place in range(len(values)):
        window = values[max(0, place - reach) : place + reach + 1]
        means.append(sum(window) / len(window))
    return means
