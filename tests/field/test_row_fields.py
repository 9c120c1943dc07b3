"""What rows say beside roles and texts: read as meant, or the row is dropped and counted. Never left out unsaid."""

import codecs
import copy
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from deepspec_core.data.answers import Supervision
from deepspec_core.data.conversations import Conversation, from_row
from deepspec_core.data.messages import UnusableRow
from deepspec_core.data.row_files import read_rows
from deepspec_core.data.tokenize import PLAIN, ChatTokenizer
from deepspec_core.data.tokenizing import tokenize_all
from deepspec_core.errors import DataError, PluginError
from deepspec_core.evaluation.tasks import load_task
from deepspec_core.plugins.registry import Registry

QWEN3 = Path(__file__).parents[2] / "deepspec-targets" / "tests" / "chat_templates" / "qwen3.jinja"
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}
PIRATE = [("system", "Be a pirate."), ("user", "Hi"), ("assistant", "Arr.")]


def _said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in conversation.messages]


SYSTEMS = [
    ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Arr."}]}),
    ("openai", {"messages": [USER, {**ANSWER, "content": "Arr."}]}),
    ("alpaca", {"instruction": "Hi", "output": "Arr."}),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in SYSTEMS])
def test_a_rows_system_prompt_stands_before_its_messages(row: dict[str, Any]) -> None:
    assert _said(from_row({"system": "Be a pirate.", **row}, "f:1")) == PIRATE
    assert _said(from_row({"system": "", **row}, "f:1")) == PIRATE[1:]


def test_messages_with_a_system_prompt_keep_their_own() -> None:
    own = [{"role": "system", "content": "Be brief."}, USER]
    assert _said(from_row({"system": "Be a pirate.", "messages": own}, "f:1")) == [("system", "Be brief."), PIRATE[1]]


def test_functions_are_tools() -> None:
    one = {"name": "weather", "parameters": {}}
    for functions in ([one], json.dumps([one])):
        read = from_row({"functions": functions, "messages": [USER]}, "f:1")
        assert read.tools == ({"type": "function", "function": one},)
    assert from_row({"functions": [one], "tools": [{"name": "f"}], "messages": [USER]}, "f:1").tools == ({"name": "f"},)
    assert from_row({"functions": None, "tools": "null", "messages": [USER]}, "f:1").tools == ()


CALLS = [
    ("OpenAI", {"function": {"name": "f", "arguments": '{"a": 1}'}}, {"a": 1}),
    ("Llama 3", {"name": "f", "parameters": {"a": 1}}, {"a": 1}),
    ("Anthropic", {"type": "tool_use", "name": "f", "input": {"a": 1}}, {"a": 1}),
    ("beside the function", {"function": {"name": "f"}, "arguments": {"a": 1}}, {"a": 1}),
    ("none", {"name": "f", "id": "c1", "status": "done"}, {}),
    *((f"nothing: {value!r}", {"name": "f", "arguments": value}, {}) for value in (None, "", {}, [], "null", "[]")),
    *((f"no object: {value!r}", {"name": "f", "arguments": value}, None) for value in (0, False, "0", "false", ["a"])),
    ("an unknown name", {"name": "f", "args": {"a": 1}}, None),
    ("an unknown name, as text", {"function": {"name": "f", "kwargs": '{"a": 1}'}}, None),
]


@pytest.mark.parametrize(("call", "arguments"), [pytest.param(call, given, id=name) for name, call, given in CALLS])
def test_a_calls_arguments(call: dict[str, Any], arguments: dict[str, Any] | None) -> None:
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    if arguments is None:
        with pytest.raises(DataError, match="A tool call's arguments"):
            from_row(row, "f:1")
    else:
        assert from_row(row, "f:1").messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": arguments}


@pytest.mark.parametrize(
    "field",
    [
        {"reasoning_content": "Hm."},
        {"reasoning": "Hm."},
        {"thinking": "Hm."},
        {"reasoning_details": [{"type": "reasoning.text", "text": "Hm."}]},
        {"reasoning": "Hm.", "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]},
    ],
)
def test_an_answers_thinking(field: dict[str, Any]) -> None:
    assert from_row({"messages": [USER, {**ANSWER, **field}]}, "f:1").messages[1]["reasoning_content"] == "Hm."


UNUSABLE = [
    ("thinking that cannot be read", {"messages": [USER, {**ANSWER, "reasoning_details": [{"data": "x"}]}]}),
    ("images of a message", {"messages": [{**USER, "images": ["a.png"]}, ANSWER]}),
    ("images of a row", {"images": ["a.png"], "messages": [USER, ANSWER]}),
    ("an image of a row, as LLaVA has it", {"image": "a.png", "conversations": [USER, ANSWER]}),
    ("audio of a row", {"audios": ["a.wav"], "messages": [USER, ANSWER]}),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=name) for name, row in UNUSABLE])
def test_what_is_not_text_makes_a_row_unusable(row: dict[str, Any]) -> None:
    with pytest.raises(UnusableRow):
        from_row(row, "f:1")
    # Tables have every column in every row.
    emptied = {"images": [], "image": None, "messages": [{**USER, "images": None}, ANSWER]}
    assert len(from_row(emptied, "f:1").messages) == 2


def _supervised(
    target: Any, *rows: dict[str, Any], template: Path | None = None, supervision: Supervision = PLAIN
) -> tuple[list[str], Counter[str]]:
    """The supervised text of each sample, answers joined by |, and the counts."""
    own = copy.deepcopy(target.tokenizer)
    if template is not None:
        own.chat_template = template.read_text()
    tokenizer, counts = ChatTokenizer(own), Counter[str]()
    read = [from_row(row, f"f:{number}") for number, row in enumerate(rows)]
    samples = tokenize_all(
        read, tokenizer, target.adapter.conversation_format(), system_prompt=None, max_length=900,
        min_supervised_tokens=1, supervision=supervision, counts=counts,
    )  # fmt: skip
    texts = [tokenizer.decode(sample.input_ids[sample.loss_mask].tolist()) for sample in samples]
    return [text.removesuffix("<|im_end|>").replace("<|im_end|>", "|") for text in texts], counts


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_answers_that_are_not_to_be_learned_are_read_only(target: Any, mark: dict[str, Any]) -> None:
    bad, good = {"role": "assistant", "content": "Bad."}, {"role": "assistant", "content": "Good."}
    last = Supervision(last_only=True)
    for template in (None, QWEN3):
        for messages, learned in (
            ([USER, {**bad, **mark}, USER, good], ["Good."]),
            ([USER, good, USER, {**bad, **mark}], ["Good."]),
            ([USER, {**good, "weight": 1, "train": True}, USER, {**ANSWER, "weight": None}], ["Good.|Hello."]),
        ):
            assert _supervised(target, {"messages": messages}, template=template)[0] == learned
        texts, counts = _supervised(target, {"messages": [USER, {**bad, **mark}]}, template=template)
        assert (texts, counts["no_answer"]) == ([], 1)
        marked_last = {"messages": [USER, good, USER, {**bad, **mark}]}
        assert _supervised(target, marked_last, template=template, supervision=last)[0] == []


@pytest.mark.parametrize("field", [{"weight": 0.5}, {"weight": "0"}, {"train": "no"}])
def test_weights_between_are_refused(field: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="cannot be used"):
        from_row({"messages": [USER, {**ANSWER, **field}]}, "f:1")


@pytest.mark.parametrize("tool", [{"type": "web_search"}, {"type": "function", "function": "weather"}, {"name": "f"}])
def test_a_tool_without_a_name_is_not_left_out_unsaid(target: Any, tool: dict[str, Any]) -> None:
    row = {"messages": [USER, ANSWER], "tools": [tool]}
    assert _supervised(target, row)[1]["refused"] == 1
    assert _supervised(target, row, template=QWEN3)[0] == ["Hello."]


def test_numbers_of_calls_and_marks_within_a_file(tmp_path: Path) -> None:
    told = {"role": "tool", "content": "x", "name": "f", "tool_call_id": 7}
    assert from_row({"messages": [USER, ANSWER, told]}, "f:1").messages[2]["tool_call_id"] == "7"
    line = codecs.BOM_UTF8 + b'{"turns": ["Hi"]}\n'
    (tmp_path / "joined.jsonl").write_bytes(line + line)
    (tmp_path / "joined.jsonl.gz").write_bytes(gzip.compress(line) + gzip.compress(line))
    for path in tmp_path.iterdir():
        assert [row.content() for row in read_rows(path)] == [{"turns": ["Hi"]}] * 2


@pytest.mark.parametrize(
    ("row", "found", "fix"),
    [({"mesages": [USER]}, "mesages", "'messages'"), ({"text": "Hi"}, "text", None), ({}, "no fields", None)],
)
def test_a_tasks_row_is_told_by_its_own_fields(
    tmp_path: Path, row: dict[str, Any], found: str, fix: str | None
) -> None:
    (tmp_path / "task.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match="no conversation") as problem:
        load_task("task.jsonl", limit=None, seed=1, base=tmp_path, registry=Registry(), held_out=list)
    assert found in str(problem.value.found)
    assert fix is None or fix in str(problem.value.fix)


@pytest.mark.parametrize("name", ["Q.JSONL", "q.txt", "q.ndjson", "q.jsonl.bz2", "folder/q", "gsm8k:q.csv"])
def test_a_tasks_file_of_another_ending(registry: Registry, name: str) -> None:
    with pytest.raises(PluginError, match=r"has to end in \.jsonl or") as problem:
        registry.get("task", name)
    assert "install" not in str(problem.value.fix)
