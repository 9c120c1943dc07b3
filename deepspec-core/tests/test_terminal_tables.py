"""Tables and progress on the terminal show names as they are, whatever terminal libraries would read in them."""

import io

import pytest
from rich.console import Console

import deepspec_core.progress as progress_module
from deepspec_core.evaluation.report import table
from deepspec_core.progress import Progress

NAMES = ("bench[en].jsonl", "d[/e]/b.jsonl", "[red]x", ":smile:.jsonl", "a\\")


def shown(*things: object) -> str:
    out = io.StringIO()
    console = Console(file=out, width=200)
    for thing in things:
        console.print(thing)
    return out.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_brackets_is_no_markup(name: str) -> None:
    seen = shown(table(f"title {name}", ("task", f"of {name}"), [[name, "1"]], left=("task",)))
    assert f"title {name}" in seen
    assert f"of {name}" in seen
    assert seen.count(name) == 3


@pytest.mark.parametrize("name", NAMES)
def test_progress_on_a_terminal_shows_the_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    seen = Terminal()
    monkeypatch.setattr("sys.stderr", seen)
    monkeypatch.setattr(progress_module, "Console", lambda stderr: Console(file=seen, force_terminal=True, width=200))
    with Progress(2, f"evaluate {name}", "prompts") as progress:
        progress.advance(2, said=f"in {name}")
    assert f"evaluate {name}" in seen.getvalue()
    assert f"in {name}" in seen.getvalue()
