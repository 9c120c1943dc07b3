"""[regenerate] answers: several answers to a prompt, each drawn by itself, kept apart, and resumed like one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from deepspec_core.cli.main import main
from deepspec_core.data.conversations import Conversation
from deepspec_core.data.several_answers import several


def _named(*names: str) -> list[Conversation]:
    return [Conversation(id=name, messages=({"role": "user", "content": "?"},)) for name in names]


def test_ids_are_distinct_whatever_a_source_calls_its_own() -> None:
    assert [one.id for one in several(_named("a", "b"), 1)] == ["a", "b"]
    assert [one.id for one in several(_named("a", "b"), 2)] == ["a", "a (answer 2)", "b", "b (answer 2)"]
    # Such as the answers of a run before, read as a source.
    twice = [one.id for one in several(_named("a", "a (answer 2)", "a (answer 2) (again)"), 2)]
    assert len(set(twice)) == 6
    assert twice[:3] == ["a", "a (answer 2)", "a (answer 2) (again)"]
    assert [one.id for one in several(_named("a", "a (answer 2)", "a (answer 2) (again)"), 2)] == twice


@pytest.mark.slow
def test_each_answer_is_drawn_by_itself_and_an_interrupted_run_repeats_none(
    finished: Path, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_file.parent / "runs" / "quickstart-dflash-smoke" / "regenerate"
    command = ["run", str(run_file), "--smoke", "--stages", "regenerate,cache", "--set", "run.threads=1"]
    three = [*command, "--set", "regenerate.answers=3"]
    assert main(three) == 0
    one = _lines(finished.parent / "runs" / "quickstart-dflash-smoke" / "regenerate" / "conversations.jsonl")
    found = _lines(folder / "conversations.jsonl")
    assert [line["id"] for line in found[::3]] == [line["id"] for line in one]
    assert found[::3] == one, "the first answer is the one that there was before"
    for first, second, third in zip(found[::3], found[1::3], found[2::3], strict=True):
        assert first["prompt_ids"] == second["prompt_ids"] == third["prompt_ids"]
    different = sum(a["output_ids"] != b["output_ids"] for a, b in zip(found[1::3], found[2::3], strict=True))
    assert different > len(one) // 2
    said = capsys.readouterr().out
    assert f"conversations {3 * len(one)}" in said
    assert re.search(rf"samples {3 * len(one)}\b", said)
    # Killed after a few answers, it makes the others.
    whole = (folder / "conversations.jsonl").read_text()
    record = json.loads((folder / "stage.json").read_text())
    (folder / "conversations.jsonl").unlink()
    (folder / "conversations.jsonl.partial").write_text("".join(whole.splitlines(keepends=True)[:7]))
    (folder / "stage.json").write_text(json.dumps({**record, "complete": False}))
    shutil.rmtree(folder.parent / "cache")
    assert main([*three[:4], "regenerate", *three[5:]]) == 0
    assert (folder / "conversations.jsonl").read_text() == whole
    capsys.readouterr()
    assert main([*command, "--set", "regenerate.answers=2"]) == 2
    assert "regenerate.answers" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["temperature=0.0", "top_k=1", "min_p=1.0"])
def test_several_greedy_answers_are_refused(setting: str, run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("regenerate.answers", "evaluate.samples"):
        greedy = ["--set", f"{key}=2", "--set", f"{key.partition('.')[0]}.{setting}"]
        assert main(["config", "check", str(run_file), *greedy]) == 2
        said = capsys.readouterr().err
        assert "greedy answers to one prompt are all the same" in said
        assert key in said
    one = ["--set", f"regenerate.{setting}", "--set", f"evaluate.{setting}"]
    assert main(["config", "check", str(run_file), *one]) == 0


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
