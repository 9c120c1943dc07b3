"""Tables for LaTeX, with the rules of the package booktabs. This file does not know what the text means."""

from __future__ import annotations

from collections.abc import Sequence

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{mark: f"\\{mark}" for mark in "&%$#_{}"},
}


def escaped(text: str) -> str:
    """The text on one line, escaped so that LaTeX prints it literally."""
    return "".join(_SPECIAL.get(mark, mark) for mark in " ".join(text.split()))


def latex_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str], notes: Sequence[str] = ()
) -> str:
    """A `tabular`, then the notes, one paragraph each. The columns in `left` hold words; the others hold numbers."""
    columns = "".join("l" if heading in left else "r" for heading in headings)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _row(headings), r"\midrule", *map(_row, rows)]
    lines += [r"\bottomrule", r"\end{tabular}"]
    for note in notes:
        lines += ["", escaped(note)]
    return "\n".join(["% Needs \\usepackage{booktabs}.", *lines, ""])


def _row(cells: Sequence[str]) -> str:
    return " & ".join(map(escaped, cells)) + r" \\"
