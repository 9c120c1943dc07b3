"""The nine tasks: which dataset of the Hub, at which commit, and what is asked about each of its rows.

The questions are worded as in the published evaluation of DSpark, so that accepted lengths can be compared. Does not
know how rows are fetched (deepspec_core.data.hub_rows), chosen, rendered or decoded.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from attrs import frozen

from deepspec_core.data.hub_rows import hub_rows
from deepspec_core.errors import DataError

Row = Mapping[str, Any]


@frozen(kw_only=True)
class PublishedTask:
    """A task: `task(limit, seed)` yields its rows as `turns`, all of them; core chooses as many as are asked.

    dataset, config, split, revision, files: What hub_rows reads.
    columns: The columns that the questions are made of. Each is a text that is not empty.
    listed: Those of them that are lists of such texts.
    optional: Those of them whose text may be empty. A null is read as an empty text.
    turns: The user's turns, from a row.
    """

    dataset: str
    revision: str
    split: str = "test"
    config: str | None = None
    files: tuple[str, ...] = ()
    columns: tuple[str, ...]
    listed: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    turns: Callable[[Row], list[str]]

    def __call__(self, limit: int | None, seed: int) -> Iterator[dict[str, Any]]:
        """Every row of the dataset, from the Hub or its local copy. DataError where neither is there."""
        rows = hub_rows(self.dataset, config=self.config, split=self.split, revision=self.revision, files=self.files)
        return (self.from_row(row) for row in rows)

    def from_row(self, row: Row) -> dict[str, Any]:
        """One row of the dataset, as `turns`. DataError where a column is missing, or is not what its name promises."""
        missing = [name for name in self.columns if name not in row]
        if missing:
            raise DataError(
                f"A row is not one of {self.dataset}",
                found=f"columns {', '.join(sorted(map(str, row)))}",
                expected=f"{', '.join(self.columns)} (or a conversation: messages or turns)",
            )
        return {"turns": self.turns({name: self._checked(name, row[name]) for name in self.columns})}

    def _checked(self, name: str, value: Any) -> Any:
        if name in self.optional and value is None:
            return ""
        if name in self.listed:
            expected = "a list of texts, none of them empty"
            fits = isinstance(value, Sequence) and not isinstance(value, str) and value and all(map(_is_text, value))
        elif name in self.optional:
            expected, fits = "a text, which may be empty", isinstance(value, str)
        else:
            expected, fits = "a text that is not empty", _is_text(value)
        if not fits:
            raise DataError(
                f"Column `{name}` of a row is not that of {self.dataset}",
                found=f"`{name}` = {reprlib.repr(value)}",
                expected=expected,
                fix="Correct or remove that row.",
            )
        return value


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _reasoned(column: str) -> Callable[[Row], list[str]]:
    """A problem of mathematics, with the request to reason and to mark the answer."""
    return lambda row: [f"{row[column]}\nPlease reason step by step, and put your final answer within \\boxed{{}}."]


def _completed(row: Row) -> list[str]:
    task = "Write a solution to the following problem and make sure that it passes the tests:"
    return [f"{task}\n```python\n{row['prompt']}\n```"]


def _contest(row: Row) -> list[str]:
    starter = row["starter_code"]
    asked, code = (
        ("Use the following code structure:", starter)
        if starter
        else ("Write your code in the following format:", "# YOUR CODE HERE")
    )
    return [
        "You are an expert Python programmer. You will be given a question (problem specification) and will generate a "
        "correct Python program that matches the specification and passes all tests. You will NOT return anything "
        f"except for the program\n\n### Question:\n{row['question_content']}\n\n### Format: {asked}\n"
        f"```python\n{code}\n```\n\n### Answer: (use the provided format with backticks)"
    ]


def _instructed(row: Row) -> list[str]:
    given = row["input"]
    return [f"{row['instruction']}\n\nInput:\n{given}" if given else row["instruction"]]


gsm8k = PublishedTask(
    dataset="openai/gsm8k",
    config="main",
    revision="740312add88f781978c0658806c59bc2815b9866",
    columns=("question",),
    turns=_reasoned("question"),
)
math500 = PublishedTask(
    dataset="HuggingFaceH4/MATH-500",
    revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
    columns=("problem",),
    turns=_reasoned("problem"),
)
aime25 = PublishedTask(
    dataset="MathArena/aime_2025",
    split="train",
    revision="c94da77eb22bbd6439e62a323bec18493a421302",
    columns=("problem",),
    turns=_reasoned("problem"),
)
humaneval = PublishedTask(
    dataset="openai/openai_humaneval",
    revision="7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
    columns=("prompt",),
    turns=_completed,
)
mbpp = PublishedTask(
    dataset="google-research-datasets/mbpp",
    config="sanitized",
    revision="4bb6404fdc6cacfda99d4ac4205087b89d32030c",
    columns=("prompt",),
    turns=lambda row: [row["prompt"]],
)
livecodebench = PublishedTask(
    dataset="livecodebench/code_generation_lite",
    files=("test.jsonl", *(f"test{number}.jsonl" for number in range(2, 7))),
    revision="0fe84c3912ea0c4d4a78037083943e8f0c4dd505",
    columns=("question_content", "starter_code"),
    optional=("starter_code",),
    turns=_contest,
)
mt_bench = PublishedTask(
    dataset="HuggingFaceH4/mt_bench_prompts",
    split="train",
    revision="e3a795c5e9a82ee40611c416b8a7786c73198991",
    columns=("prompt",),
    listed=("prompt",),
    turns=lambda row: list(row["prompt"]),
)
alpaca = PublishedTask(
    dataset="tatsu-lab/alpaca",
    split="train",
    revision="dce01c9b08f87459cf36a430d809084718273017",
    columns=("instruction", "input"),
    optional=("input",),
    turns=_instructed,
)
arena_hard_v2 = PublishedTask(
    dataset="lmarena-ai/arena-hard-auto",
    files=("data/arena-hard-v2.0/question.jsonl",),
    revision="15f3746e21432264ce9b453999bde4f3c946d2e6",
    columns=("prompt",),
    turns=lambda row: [row["prompt"]],
)
