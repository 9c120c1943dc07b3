"""Rows as users of other tools have them: read as what they mean, dropped and counted, or refused. Never misread."""

import codecs
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from deepspec_core.config.schema import SourceOptions
from deepspec_core.data.bad_rows import BadRow, BadRows
from deepspec_core.data.conversations import Conversation, from_row
from deepspec_core.data.messages import UnusableRow
from deepspec_core.data.sources import read_sources
from deepspec_core.errors import DataError
from deepspec_core.evaluation.tasks import Prompt, load_task
from deepspec_core.plugins.registry import Registry

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def _source(folder: Path, name: str, counts: Counter[str] | None = None, **more: Any) -> list[Conversation]:
    sources = [SourceOptions(path=name)]
    return list(
        read_sources(
            sources, split="train", held_out=0.0, seed=1, base=folder, registry=Registry(), counts=counts, **more
        )
    )


def _task(folder: Path, name: str) -> list[Prompt]:
    return load_task(name, limit=None, seed=1, base=folder, registry=Registry(), held_out=list)


def _write(folder: Path, *rows: dict[str, Any]) -> str:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "rows.jsonl"


READ = [
    ("parts of content", {"messages": [{**USER, "content": [{"type": "text", "text": "Hi"}]}]}, [("user", "Hi")]),
    (
        "parts of the Responses interface",
        {"messages": [{**USER, "content": [{"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]}]},
        [("user", "a\nb")],
    ),
    ("bare texts as parts", {"messages": [{**USER, "content": ["a", "b"]}]}, [("user", "a\nb")]),
    (
        "developer",
        {"messages": [{"role": "developer", "content": "Be brief."}, USER]},
        [("system", "Be brief."), ("user", "Hi")],
    ),
    (
        "roles in capitals",
        {"conversations": [{"from": "Human", "value": "Hi"}, {"from": "GPT", "value": "Hello"}]},
        [("user", "Hi"), ("assistant", "Hello")],
    ),
    ("USER", {"messages": [{"role": "USER", "content": "Hi"}]}, [("user", "Hi")]),
    ("a prompt alone", {"prompt": "Hi"}, [("user", "Hi")]),
    ("a question alone", {"question": "Hi", "answer": "42"}, [("user", "Hi")]),
    ("a prompt of messages", {"prompt": [USER]}, [("user", "Hi")]),
    ("columns of a table, most of them null", {"messages": None, "turns": ["Hi"], "prompt": None}, [("user", "Hi")]),
    ("messages before turns", {"turns": ["Other"], "messages": [USER]}, [("user", "Hi")]),
]


@pytest.mark.parametrize(("row", "says"), [pytest.param(row, says, id=name) for name, row, says in READ])
def test_sources_and_tasks_read_alike(tmp_path: Path, row: dict[str, Any], says: list[tuple[str, str]]) -> None:
    name = _write(tmp_path, row)
    (conversation,), (prompt,) = _source(tmp_path, name), _task(tmp_path, name)
    assert [(message["role"], message["content"]) for message in conversation.messages] == says
    asked = [pair for pair in says if pair[0] != "assistant"]
    assert [(message["role"], message["content"]) for message in prompt.messages] == asked


UNUSABLE = [
    ("an image", {"messages": [{**USER, "content": [{"type": "text", "text": "What is it?"}, IMAGE]}]}, "image_url"),
    *(
        (role, {"messages": [USER, {"role": role, "content": "Hello"}]}, role)
        for role in ("bing", "bard", "claude", "narrator")
    ),
    ("an answer of null", {"messages": [USER, {"role": "assistant", "content": None}]}, "null, without a tool call"),
    ("an answer that is missing", {"messages": [USER, {"role": "assistant"}]}, "null, without a tool call"),
]


@pytest.mark.parametrize(("row", "reason"), [pytest.param(row, reason, id=name) for name, row, reason in UNUSABLE])
def test_what_no_conversation_can_hold_is_dropped_counted_and_refused_as_a_task(
    tmp_path: Path, row: dict[str, Any], reason: str
) -> None:
    name = _write(tmp_path, {"turns": ["one"]}, row, {"turns": ["two"]})
    counts: Counter[str] = Counter()
    dropped: list[BadRow] = []
    read = _source(tmp_path, name, counts, bad_rows=BadRows(tell=dropped.append))
    assert [conversation.messages[0]["content"] for conversation in read] == ["one", "two"]
    assert (counts["unusable"], counts["conversations"]) == (1, 2)
    (bad,) = dropped
    assert "rows.jsonl:2" in bad.where
    assert reason in bad.reason
    with pytest.raises(UnusableRow, match=r"rows\.jsonl:2"):
        _task(tmp_path, name)


def test_a_call_may_stand_where_content_is_null() -> None:
    for calls in (
        {"tool_calls": [{"name": "f", "arguments": {}}]},
        {"function_call": {"name": "f", "arguments": "{}"}},
    ):
        messages = from_row({"messages": [USER, {"role": "assistant", "content": None, **calls}]}, "f:1").messages
        assert messages[1]["content"] == ""
        assert messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]


@pytest.mark.parametrize("identity", [True, False, 1.5, ["a"], {"a": 1}])
def test_an_id_that_identifies_nothing_is_refused(tmp_path: Path, identity: Any) -> None:
    name = _write(tmp_path, {"id": identity, "turns": ["Hi"]})
    for read in (_source, _task):
        with pytest.raises(DataError, match="id is neither text nor a whole number"):
            read(tmp_path, name)


@pytest.mark.parametrize("read", [_source, _task])
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_byte_order_mark_and_compressed_files_are_read(tmp_path: Path, ending: str, read: Any) -> None:
    content = codecs.BOM_UTF8 + json.dumps({"turns": ["Grüße"]}, ensure_ascii=False).encode() + b"\n"
    path = tmp_path / f"rows{ending}"
    if ending.endswith(".gz"):
        path.write_bytes(gzip.compress(content))
    elif ending.endswith(".zst"):
        with pa.output_stream(path, compression="zstd") as file:
            file.write(content)
    else:
        path.write_bytes(content)
    (found,) = read(tmp_path, path.name)
    assert found.messages[0]["content"] == "Grüße"
    if ending != ".jsonl":
        path.write_bytes(path.read_bytes()[:-3])
        with pytest.raises(DataError, match="cannot be read"):
            read(tmp_path, path.name)


def test_a_suggestion_could_fit() -> None:
    dolly = {"instruction": "Add.", "context": "1 2", "response": "3"}
    for row, fix in (
        (dolly, None),
        ({"mesages": [USER]}, "'messages'"),
        ({"conversation": [USER]}, "'conversations'"),
    ):
        with pytest.raises(DataError, match="no conversation") as problem:
            from_row(row, "f:1")
        assert (fix in str(problem.value.fix)) if fix else problem.value.fix is None
