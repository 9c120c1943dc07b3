"""Half of a surrogate pair, which JSON can write and no tokenizer takes: such rows are refused, with the reason."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from deepspec_core.data.conversations import from_row
from deepspec_core.data.tokenize import ChatTokenizer, Dropped, TemplateRefusal
from deepspec_core.data.tokenizing import tokenize_all
from deepspec_core.data.unicode_text import not_unicode
from deepspec_core.errors import DataError
from deepspec_core.evaluation.tasks import load_task
from deepspec_core.plugins.registry import Registry
from deepspec_core.testing.tiny_tokenizer import tiny_format, tiny_tokenizer

HALF = "half of a surrogate pair, '\\ud800'"
CALL = {"function": {"name": "f", "arguments": {"\ud800": 1}}}
ASKED = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
BAD: dict[str, dict[str, Any]] = {
    "question": {"id": "question", "messages": [{"role": "user", "content": "a\ud800"}, ANSWER]},
    "answer": {"id": "answer", "messages": [ASKED, {"role": "assistant", "content": "\ud800"}]},
    "second": {"id": "second", "messages": [ASKED, ANSWER, {"role": "user", "content": "\ud800"}, ANSWER]},
    "call": {"id": "call", "messages": [ASKED, {**ANSWER, "tool_calls": [CALL]}]},
    "tool": {"id": "tool", "messages": [ASKED, ANSWER], "tools": [{"name": "\ud800"}]},
    "id\\ud800": {"id": "id\ud800", "messages": [ASKED, ANSWER]},
    "given\\ud800": {"id": "given\ud800", "input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]},
}


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(tiny_tokenizer())


def test_what_is_no_unicode_is_told() -> None:
    assert not_unicode("id", ({"role": "user", "content": "naïve 😀"},), ()) is None
    assert not_unicode({"a": ["\ud800"]}) == not_unicode({"\ud800": 1}) == HALF


def test_training_refuses_such_conversations(tokenizer: ChatTokenizer) -> None:
    counts: Counter[str] = Counter()
    dropped: list[Dropped] = []
    conversations = [from_row(row, "test") for row in (*BAD.values(), {"id": "good", "messages": [ASKED, ANSWER]})]
    kept = tokenize_all(
        conversations, tokenizer, tiny_format(), system_prompt=None, max_length=64, min_supervised_tokens=1,
        counts=counts, on_drop=dropped.append,
    )  # fmt: skip
    assert [sample.id for sample in kept] == ["good"]
    assert counts["refused"] == len(BAD)
    assert {drop.id for drop in dropped} == BAD.keys()
    assert all(HALF in drop.reason for drop in dropped)


def test_prompts_are_refused(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(TemplateRefusal, match="surrogate"):
        tokenizer.render_prompt([{"role": "user", "content": "\ud800"}])


@pytest.mark.parametrize(
    "row",
    [{"id": "\ud800", "turns": ["x"]}, {"turns": ["\ud800"]}, {"turns": ["x"], "tools": [{"name": "\ud800"}]}],
)
def test_a_row_of_a_task_is_told_by_file_and_line(tmp_path: Path, row: dict[str, Any]) -> None:
    (tmp_path / "task.jsonl").write_text('{"turns": ["one"]}\n' + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"(?s)not valid Unicode.*task\.jsonl:2.*surrogate"):
        load_task("task.jsonl", limit=None, seed=7, base=tmp_path, registry=Registry(), held_out=list)
