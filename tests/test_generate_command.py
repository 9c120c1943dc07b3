"""`deepspec generate`, built on the Python interface: what it prints, how it colours, how it stops."""

import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import deepspec_core
from deepspec_core.cli.generate import _coloured, _Stream
from deepspec_core.cli.main import main
from deepspec_core.interface.generating import Streamed

PARITY = Path(__file__).parent / "parity"
PAGE = Path(__file__).parents[1] / "docs" / "notebook.md"
TINY = "builtin:tiny-qwen3"
QUESTIONS = ["What is 17 + 25?", "Count from 3 to 9.", "Tell me a story about a fox."]


def test_the_command_streams_the_same_text(
    target: Any, drafts: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", "--target", TINY, "--max-new-tokens", "24", QUESTIONS[0]]
    [expected] = deepspec_core.generate(target, None, QUESTIONS[0], max_new_tokens=24)
    for more in ([], ["--draft", str(drafts["dspark"])]):
        assert main([*arguments, *more]) == 0
        seen = capfd.readouterr()
        assert seen.out == expected.text + "\n"
        assert "tokens/s" in seen.err
    assert "accepted length" in seen.err
    assert "the two outputs are equal, token for token" in seen.err
    assert main([*arguments, "--json", "--draft", str(drafts["dspark"])]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["ids"] == list(expected.ids)
    assert report["plain"]["same_ids"] is True
    assert sum(one["committed"] for one in report["rounds"]) >= len(report["ids"]) - 1


def test_accepted_tokens_are_coloured_by_round(capsys: pytest.CaptureFixture[str]) -> None:
    rounds = [(("a", "b"), 1), (("", "c", "d"), 2), (("e",), 1)]
    parts = [Streamed(prompt=0, ids=(0,) * len(pieces), pieces=pieces, accepted=count) for pieces, count in rounds]
    stream = _Stream(coloured=True)
    for part in parts:
        stream(part)
    green, cyan, end = "\x1b[32m", "\x1b[36m", "\x1b[0m"
    assert capsys.readouterr().out == f"{green}a{end}b{cyan}c{end}d{green}e{end}"
    stream = _Stream(coloured=False)
    for part in parts:
        stream(part)
    assert capsys.readouterr().out == "abcde"


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert not _coloured()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert _coloured()
    monkeypatch.setitem(os.environ, "NO_COLOR", "1")
    assert not _coloured()


def test_ctrl_c_ends_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_Stream, "__call__", interrupted)
    assert main(["generate", "--target", TINY, "x"]) == 130
    assert capsys.readouterr().err.endswith("Interrupted.\n")


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "the prompt is empty"), (b" \n\n", "the prompt is empty"), (b"\xff", "in UTF-8")]
)
def test_standard_input_that_is_no_prompt(
    content: bytes, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    assert main(["generate", "--target", "nobody/opens-this"]) == 2
    message = capsys.readouterr().err
    assert says in message
    assert "standard input" in message


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([""], "the prompt is empty"),
        (["word " * 5000], "no room to answer"),
        (["x", "--max-new-tokens", "0"], "max-new-tokens"),
        (["x", "--draft", "./nothing"], "no draft checkpoint in this directory"),
        (["x", "--dtype", "int4"], "dtype"),
    ],
)
def test_the_command_s_mistakes(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--target", TINY, *arguments]) == 2
    message = capsys.readouterr().err
    assert says in message
    assert "Traceback" not in message


def test_a_confidence_threshold_concerns_the_draft_alone(
    drafts: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The plain comparison has no draft, and a threshold is refused without one."""
    arguments = ["generate", "--target", TINY, "--max-new-tokens", "6", "--confidence-threshold", "0.9", "Hello"]
    assert main([*arguments, "--draft", str(drafts["dspark"])]) == 0
    assert "plain decoding" in "".join(capsys.readouterr())
    assert main(arguments) == 2
    assert "a confidence threshold needs a draft" in capsys.readouterr().err
