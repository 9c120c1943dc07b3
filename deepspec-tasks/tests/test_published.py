"""What each task asks about a row of its dataset, and how rows are fetched. The Hub is stood in for."""

import json
import logging
import random

import datasets
import huggingface_hub
import pytest

import deepspec_tasks.plugin
from deepspec_core.errors import DataError
from deepspec_core.evaluation.tasks import load_task
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.testing import TaskSuite, broken_by
from deepspec_tasks import published

REASON = "\nPlease reason step by step, and put your final answer within \\boxed{}."
LCB = (
    "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
    "correct Python program that matches the specification and passes all tests. You will NOT return anything except "
    "for the program\n\n### Question:\n"
)
ANSWER = "\n\n### Answer: (use the provided format with backticks)"
REGISTRY = load_plugins().registry

# One row of each dataset's layout, shortened, and what is asked about it.
ROWS = {
    "gsm8k": (
        {"question": "A robe takes 2 bolts of blue fiber.  How many bolts?", "answer": "It takes 2.\n#### 2"},
        ["A robe takes 2 bolts of blue fiber.  How many bolts?" + REASON],
    ),
    "math500": (
        {
            "problem": "Convert the point $(0,3)$.",
            "solution": "We have",
            "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
            "subject": "Precalculus",
            "level": 2,
            "unique_id": "test/precalculus/807.json",
        },
        ["Convert the point $(0,3)$." + REASON],
    ),
    "aime25": (
        {"problem_idx": 1, "problem": "Find the sum of all $b>9$.", "answer": 70, "problem_type": ["Number Theory"]},
        ["Find the sum of all $b>9$." + REASON],
    ),
    "humaneval": (
        {
            "task_id": "HumanEval/50",
            "prompt": 'def f(s: str):\n    """\n    doc\n    """\n',
            "canonical_solution": "    return s\n",
            "test": "def check(candidate): pass",
            "entry_point": "f",
        },
        [
            "Write a solution to the following problem and make sure that it passes the tests:\n```python\n"
            'def f(s: str):\n    """\n    doc\n    """\n\n```'
        ],
    ),
    "mbpp": (
        {
            "source_file": "Benchmark Questions Verification V2.ipynb",
            "task_id": 602,
            "prompt": "Write a python function to find the first repeated character.",
            "code": "def f(): pass",
            "test_imports": [],
            "test_list": ["assert f() is None"],
        },
        ["Write a python function to find the first repeated character."],
    ),
    "livecodebench": (
        {
            "question_title": "A. Short Sort",
            "question_content": "There are three cards.",
            "platform": "codeforces",
            "question_id": "1873_A",
            "contest_id": "1873",
            "contest_date": "2023-08-21T00:00:00",
            "starter_code": "",
            "difficulty": "easy",
            "public_test_cases": "[]",
            "private_test_cases": "",
            "metadata": "{}",
        },
        [
            LCB + "There are three cards.\n\n### Format: Write your code in the following format:\n"
            "```python\n# YOUR CODE HERE\n```" + ANSWER
        ],
    ),
    "mt-bench": (
        {"prompt": ["Compose a post.", "Rewrite it."], "reference": [], "category": "writing", "prompt_id": 81},
        ["Compose a post.", "Rewrite it."],
    ),
    "alpaca": (
        {"instruction": "Name the odd one out.", "input": "Twitter, Instagram", "output": "...", "text": "..."},
        ["Name the odd one out.\n\nInput:\nTwitter, Instagram"],
    ),
    "arena-hard-v2": (
        {"uid": "0748d1", "category": "hard_prompt", "subcategory": "coding", "prompt": "Write me a zig program."},
        ["Write me a zig program."],
    ),
}


def _task(name: str) -> published.PublishedTask:
    task = REGISTRY.load("task", name)
    assert isinstance(task, published.PublishedTask)
    return task


def test_every_published_task_is_offered() -> None:
    assert set(ROWS) == {name for name in REGISTRY.names("task") if REGISTRY.provider("task", name) == "deepspec-tasks"}
    assert all(len(_task(name).revision) == 40 for name in ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_rows_become_the_published_questions(name: str) -> None:
    row, turns = ROWS[name]
    assert _task(name).from_row(row) == {"turns": turns}


def test_starter_code_and_instructions_without_input() -> None:
    row = ROWS["livecodebench"][0] | {"starter_code": "class Solution:\n    def f(self) -> int:\n        "}
    assert (
        _task("livecodebench")
        .from_row(row)["turns"][0]
        .endswith(
            "\n\n### Format: Use the following code structure:\n```python\nclass Solution:\n    def f(self) -> int:\n"
            "        \n```" + ANSWER
        )
    )
    assert _task("alpaca").from_row({"instruction": "Say hello.", "input": ""}) == {"turns": ["Say hello."]}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_something_else_is_refused(name: str) -> None:
    with pytest.raises(DataError, match="columns id"):
        _task(name).from_row({"id": 1})


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("gsm8k", {"question": ["q"]}),
        ("gsm8k", {"question": ""}),
        ("math500", {"problem": None}),
        ("humaneval", {"prompt": 5}),
        ("mt-bench", {"prompt": "abc"}),
        ("mt-bench", {"prompt": ["a", ""]}),
        ("mt-bench", {"prompt": []}),
        ("mt-bench", {"prompt": [["a"]]}),
        ("alpaca", {"instruction": 5}),
        ("alpaca", {"input": ["x"]}),
        ("livecodebench", {"starter_code": 0}),
    ],
)
def test_a_column_of_another_kind_is_refused_by_name(name: str, changed: dict[str, object]) -> None:
    with pytest.raises(DataError, match=f"Column `{next(iter(changed))}`"):
        _task(name).from_row(ROWS[name][0] | changed)


def test_a_null_where_a_text_may_be_empty_is_an_empty_text() -> None:
    assert _task("alpaca").from_row({"instruction": "Say hello.", "input": None}) == {"turns": ["Say hello."]}
    row = ROWS["livecodebench"][0]
    assert _task("livecodebench").from_row(row | {"starter_code": None}) == _task("livecodebench").from_row(row)


@pytest.mark.parametrize("name", ROWS)
def test_what_is_fetched(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """The dataset, the split and the commit that are asked for; and the prompts that core makes of the rows."""
    row, turns = ROWS[name]
    asked = {}

    def load_dataset(dataset, config=None, *, split, revision=None, data_files=None):
        asked.update(dataset=dataset, config=config, split=split, revision=revision, files=data_files)
        return [row]

    def download(dataset, file, *, repo_type, revision):
        assert (repo_type, revision) == ("dataset", _task(name).revision)
        return f"/hub/{dataset}/{file}"

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr("deepspec_core.data.hub_rows.why_unreachable", lambda: None)
    (prompt,) = load_task(name, limit=None, seed=0, base=tmp_path, registry=REGISTRY, held_out=list)
    assert prompt.messages == ({"role": "user", "content": turns[0]},)
    task = _task(name)
    if task.files:
        assert asked["files"] == [f"/hub/{task.dataset}/{file}" for file in task.files]
    else:
        assert (asked["dataset"], asked["config"], asked["split"], asked["revision"]) == (
            task.dataset,
            task.config,
            task.split,
            task.revision,
        )


@pytest.mark.parametrize("name", ROWS)
def test_what_every_task_keeps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two rows of the dataset's layout."""
    row = ROWS[name][0]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_given, **_options: [row, dict(row)])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_given, **_options: "/hub/file")
    monkeypatch.setattr("deepspec_core.data.hub_rows.why_unreachable", lambda: None)

    class Task(TaskSuite):
        component = name
        plugin = deepspec_tasks.plugin
        rows = (row,)

    assert broken_by(Task) == {}


@pytest.mark.parametrize(("name", "quota"), [("mbpp", 256), ("gsm8k", 500)])
def test_as_many_rows_as_published_are_asked(name: str, quota: int, tmp_path, caplog) -> None:
    """Shuffled by the seed where there are more; a limit of one's own wins."""
    (column,) = _task(name).columns
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({column: f"{row}."}) + "\n" for row in range(quota + 1)))

    def asked(limit: int | None) -> list[str]:
        prompts = load_task(
            f"{name}:rows.jsonl", limit=limit, seed=980406, base=tmp_path, registry=REGISTRY, held_out=list
        )
        return [prompt.messages[0]["content"].partition(".")[0] for prompt in prompts]

    rows = [str(row) for row in range(quota + 1)]
    random.Random(980406).shuffle(rows)
    with caplog.at_level(logging.INFO, "deepspec"):
        assert asked(None) == rows[:quota]
    assert f"{quota} of {quota + 1} rows" in caplog.text
    assert asked(3) == rows[:3]
    assert asked(1000) == [str(row) for row in range(quota + 1)]


@pytest.mark.parametrize("name", ["gsm8k", "arena-hard-v2"])
def test_an_unreachable_hub_is_one_message(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def unreachable(*_args, **_options):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    monkeypatch.setattr("deepspec_core.data.hub_rows.why_unreachable", lambda: "the Hub cannot be reached (no answer)")
    with pytest.raises(DataError) as caught:
        load_task(name, limit=1, seed=0, base=tmp_path, registry=REGISTRY, held_out=list)
    text = str(caught.value)
    assert "the Hub cannot be reached (no answer)" in text
    assert _task(name).dataset in text
    assert "NAME:FILE" in text
