"""Charts as SVG, inline in a page or a file of their own: the one place that knows matplotlib.

A chart is drawn in placeholder colours, which become CSS variables: `--ink`, `--muted`, `--grid`, and `--c0` to `--c7`.
theme.css defines them for the light and the dark theme. This file does not know what is drawn.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from html import escape
from pathlib import Path
from typing import Any, Final

from attrs import frozen

from deepspec_core.errors import ConfigError

INK: Final = "#010101"
MUTED: Final = "#020202"
GRID: Final = "#030303"
COLOURS: Final = tuple(f"#04040{index}" for index in range(8))
# Series differ in their marks as well as in their colours.
MARKS: Final = ("o", "s", "^", "D", "v", "P", "X", "*")
THEME: Final = Path(__file__).with_name("theme.css")
_VARIABLES: Final = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    **{colour: f"--c{index}" for index, colour in enumerate(COLOURS)},
}
# Text stays text, in the page's font; a dollar sign in a name starts no formula; equal charts are equal bytes.
_SETTINGS: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "deepspec",
    "text.parse_math": False,
    "font.size": 10,
    "axes.unicode_minus": False,
}
_POINT: Final = 4 / 3  # CSS pixels


@frozen(kw_only=True)
class Chart:
    """A drawn chart: a title and a remark as text, and an SVG element."""

    title: str
    svg: str
    remark: str = ""


@frozen(kw_only=True, eq=False)
class Drawing:
    """A matplotlib figure with one pair of axes."""

    axes: Any
    _figure: Any

    def svg(self) -> str:
        """The chart as an SVG element."""
        written = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with warnings.catch_warnings():
            # Text stays text, so the reader's fonts draw what matplotlib's lack.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            self._figure.savefig(written, format="svg", transparent=True, metadata=nothing)
        return _inline(written.getvalue(), self._figure.get_figwidth() * 72 * _POINT)


@contextmanager
def drawing(*, width: float, height: float, x: str, y: str = "", names: bool = False) -> Iterator[Drawing]:
    """A figure of `width` by `height` inches with labelled axes. Raises ConfigError if matplotlib is missing.

    `names`: Whether rows have names of any length at the left. Margins are then measured. Otherwise they are fixed,
    which is twice as fast.
    """
    with matplotlib_settings():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height), layout="constrained" if names else None)
        if not names:
            left, bottom, end = 0.62 / width, 0.5 / height, 0.12
            figure.subplots_adjust(left=left, bottom=bottom, right=1 - end / width, top=1 - end / height)
        axes = figure.add_subplot()
        styled(axes, x=x, y=y)
        yield Drawing(axes=axes, figure=figure)


def matplotlib_settings() -> AbstractContextManager[Any]:
    """Context manager that sets how text and numbers are drawn. Raises ConfigError if matplotlib is missing."""
    settings: AbstractContextManager[Any] = _matplotlib().rc_context(_SETTINGS)
    return settings


def styled(axes: Any, *, x: str, y: str, muted: str = MUTED, grid: str = GRID) -> None:
    """Style axes: a grid behind the curves, two faint axis lines, and labels."""
    axes.set_axisbelow(True)
    axes.grid(color=grid, linewidth=0.8)
    axes.tick_params(which="both", colors=muted, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(grid)
    axes.set_xlabel(x, color=muted)
    axes.set_ylabel(y, color=muted)


def page_wide(charts: Sequence[Chart]) -> list[Chart]:
    """The charts with their SVG ids made unique on the page."""
    return [
        Chart(title=chart.title, remark=chart.remark, svg=_prefixed(chart.svg, f"chart{index}-"))
        for index, chart in enumerate(charts)
    ]


def alone(chart: Chart) -> str:
    """The chart as a file of its own, on a background that follows the reader's light or dark theme."""
    head, drawn = chart.svg.split(">", 1)
    head = head.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg" role="img"').replace(' aria-hidden="true"', "")
    style = "svg { background: var(--paper); } text { font-family: system-ui, sans-serif !important; }"
    theme = THEME.read_text(encoding="utf-8")
    return f"{head}>\n<title>{escape(chart.title)}</title>\n<style>\n{theme}{style}\n</style>{drawn}\n"


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "a page's charts are drawn by matplotlib, which is not installed",
            found=error,
            fix="Install it: pip install 'deepspec-core[report]'.",
        ) from None
    return matplotlib


def _inline(document: str, width: float) -> str:
    svg = document[document.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]+"', svg)
    assert box is not None
    svg = re.sub(r"<svg[^>]*>", f'<svg {box.group()} style="width: {width:.0f}px" aria-hidden="true">', svg, count=1)
    svg = svg.replace("xlink:href", "href")
    return re.sub(r"(fill|stroke): (#[0-9a-f]{6})", _themed, svg)


def _themed(found: re.Match[str]) -> str:
    variable = _VARIABLES.get(found.group(2))
    return found.group() if variable is None else f"{found.group(1)}: var({variable})"


def _prefixed(svg: str, prefix: str) -> str:
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    return svg.replace('href="#', f'href="#{prefix}').replace("url(#", f"url(#{prefix}")
