"""Cells of Markdown tables are set literally: a name with a bar is in one column."""

import re

from deepspec_core.evaluation.comparison import Run, compare
from deepspec_core.evaluation.markdown_table import markdown_table
from deepspec_core.evaluation.server_report import server_lines


def columns(line: str) -> list[str]:
    """The cells as a reader of Markdown sees them."""
    cells = re.split(r"(?<!\\)\|", line)[1:-1]
    return [re.sub(r"\\(\W|_)", r"\1", cell.strip()) for cell in cells]


def test_bars_stars_and_new_lines_stay_in_their_cell() -> None:
    heading, rule, row = markdown_table(("task", "T"), [["a|b *c*\n.jsonl", "0"]])
    assert (heading, rule) == ("| task | T |", "|---|---|")
    assert columns(row) == ["a|b *c* .jsonl", "0"]


def test_what_markdown_or_html_would_read_is_escaped() -> None:
    name = r"a&b <b>_x_ `q` [a](b) ~~c~~ $d$ e\|f snake_case.jsonl"
    row = markdown_table(("task",), [[name]])[-1]
    assert row == r"| a\&b \<b>\_x\_ \`q\` \[a](b) \~\~c\~\~ \$d\$ e\\\|f snake_case.jsonl |"


def test_tables_of_reports_keep_their_columns() -> None:
    differing = [{"id": "p|1", "position": 3, "ours": 5, "theirs": None}]
    beside = {"by_position": [0.5], "acceptance_length": 1.5, "differing": differing}
    result = {
        "task": "a|b.jsonl", "temperature": 0.0, "batch_size": 1, "samples": 1, "acceptance_length": 1.5,
        "acceptance_length_interval": None, "marginal": [0.5], "conditional": [0.5], "against": beside,
    }  # fmt: skip
    report = {"server": {"engine": "vLLM"}, "results": [result]}
    rows = [columns(line) for line in server_lines(report) if line.startswith("|") and "---" not in line]
    assert [len(row) for row in rows] == [5, 5, 5, 6, 6]
    assert rows[1][0] == rows[-1][0] == "a|b.jsonl"
    whole = {**report, "draft": {"algorithm": None}, "target": {}, "settings": {}, "machine": {}}
    page = compare([Run(label="one", report=whole)]).markdown()
    heading, row = (columns(line) for line in page.splitlines() if line.startswith("|") and "---" not in line)
    assert len(row) == len(heading)
    assert row[1] == "a|b.jsonl"
