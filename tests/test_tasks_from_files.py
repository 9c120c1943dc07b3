"""Registered tasks asked from local files: of conversations, and of the rows of the task's own dataset."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from deepspec_core.cli.main import main
from deepspec_core.errors import DataError, PluginError
from deepspec_core.evaluation.tasks import Prompt, load_task, task_digest, task_name
from deepspec_core.plugins.discovery import load_plugins

Write = Callable[[str, Sequence[Mapping[str, Any]]], str]
REGISTRY = load_plugins().registry


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(name, rows): a file of JSON lines."""

    def write_rows(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return name

    return write_rows


def _load(task: str, base: Path) -> list[Prompt]:
    return load_task(task, limit=None, seed=0, base=base, registry=REGISTRY, held_out=list)


def _asked(prompts: list[Prompt]) -> list[str]:
    return [prompt.messages[-1]["content"] for prompt in prompts]


def test_rows_of_the_dataset_and_conversations_ask_the_same(write: Write, tmp_path: Path) -> None:
    write("rows.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    asked = _asked(_load("gsm8k:rows.jsonl", tmp_path))
    write("turns.jsonl", [{"turns": asked}])
    assert asked[0].startswith("1 + 1?\nPlease reason")
    assert _asked(_load("gsm8k:turns.jsonl", tmp_path)) == asked
    assert _asked(_load("turns.jsonl", tmp_path)) == asked


def test_a_column_that_looks_like_a_conversation_is_the_tasks(write: Write, tmp_path: Path) -> None:
    write("rows.jsonl", [{"prompt": "def f():\n", "task_id": "HumanEval/0"}])
    assert _asked(_load("humaneval:rows.jsonl", tmp_path))[0].startswith("Write a solution")


def test_names_and_digests(write: Write, tmp_path: Path) -> None:
    write("rows.jsonl", [{"question": "?"}])
    assert task_name("gsm8k:rows.jsonl") == task_name("gsm8k") == "gsm8k"
    assert task_name("./a:rows.jsonl") == "a:rows"  # a path, since no task is called "./a"
    assert task_digest("gsm8k:rows.jsonl", base=tmp_path) == task_digest("rows.jsonl", base=tmp_path)
    assert task_digest("gsm8k", base=tmp_path) is None


def test_faults_name_the_row(write: Write, tmp_path: Path) -> None:
    write("rows.jsonl", [{"question": "?"}, {"text": "?"}])
    with pytest.raises(DataError, match=r"rows\.jsonl:2") as caught:
        _load("gsm8k:rows.jsonl", tmp_path)
    assert "openai/gsm8k" in str(caught.value)
    with pytest.raises(PluginError, match="gsm8k"):
        _load("gsm8:rows.jsonl", tmp_path)
    with pytest.raises(DataError, match="missing"):
        _load("gsm8k:rose.jsonl", tmp_path)


def test_the_same_task_twice_is_refused(
    finished: Path, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("rows.jsonl", [{"question": "?"}])
    draft = str(next(finished.parent.glob("runs/*/draft")))
    command = ["evaluate", "--draft", draft, "--target", "builtin:tiny-qwen3", "--out", str(tmp_path / "out")]
    assert main([*command, "--task", f"gsm8k:{tmp_path}/rows.jsonl", "--task", "gsm8k"]) == 2
    assert "Two tasks would write the same file of results" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluate_asks_every_task(
    finished: Path, write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`all` stands for the tasks that are not named beside it; each of the nine is given a file here."""
    write("rows.jsonl", [{"turns": ["What is two and two?"]}])
    draft = str(next(finished.parent.glob("runs/*/draft")))
    command = ["evaluate", "--draft", draft, "--target", "builtin:tiny-qwen3", "--out", str(tmp_path / "out")]
    tasks = [f"{name}:{tmp_path}/rows.jsonl" for name in REGISTRY.names("task")]
    assert len(tasks) >= 9
    options = [part for task in tasks for part in ("--task", task)]
    assert main([*command, "--task", "all", *options, "--temperature", "0", "--max-new-tokens", "4"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [result["task"] for result in metrics["results"]] == REGISTRY.names("task")
