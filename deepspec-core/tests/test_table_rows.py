"""Rows of tables say what JSON lines of the same rows say: mixed values, members that other rows have, odd values."""

import datetime
import decimal
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepspec_core.config.schema import SourceOptions
from deepspec_core.data import source_rows
from deepspec_core.data.bad_rows import BadRows
from deepspec_core.data.columns import ColumnMap
from deepspec_core.data.conversations import Conversation, from_row
from deepspec_core.data.sources import read_sources
from deepspec_core.errors import DataError
from deepspec_core.plugins.registry import Registry


def _read(base: Path, path: str, counts: Counter[str] | None = None, **columns: str) -> list[Conversation]:
    """Without `counts`, a bad row is an error."""
    source = SourceOptions(path=path, columns=columns)
    bad_rows = None if counts is None else BadRows()
    options: dict[str, Any] = {"held_out": 0.0, "seed": 1, "base": base, "registry": Registry()}
    return list(read_sources([source], split="train", counts=counts, bad_rows=bad_rows, **options))


def _calls(name: str, number: int, **arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    said = [{"role": "user", "content": f"Call {name} {number}"}, {"role": "assistant", "tool_calls": [call]}]
    properties = {key: {"type": "string"} for key in arguments}
    tool = {"name": name, "parameters": {"type": "object", "properties": properties}}
    return {"messages": said, "tools": [{"type": "function", "function": tool}]}


# Arguments of one type each, which a table merges into one struct, and of two, which `datasets` stores as JSON text.
ALIKE = [_calls("search", 0, query="cats"), _calls("weather", 1, city="Paris", days=["Monday"])]
MIXED = [_calls("search", 0, query="cats", limit=3, page=None), _calls("search", 1, query={"all": ["cats"]}, limit="3")]
# JSON text below structs.
PARTLY = [
    {"prompt": name, "tools": [{"name": name, "parameters": {"type": "object", "properties": {"query": of}}}]}
    for name, of in (("search", {"type": "string"}), ("find", "string"))
]


@pytest.mark.parametrize("rows", [ALIKE, MIXED, PARTLY], ids=["alike", "mixed", "partly mixed"])
def test_tables_say_what_lines_of_the_same_rows_say(
    tmp_path: Path, rows: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = _read(tmp_path, lines.name)
    dataset = datasets.load_dataset("json", data_files=str(lines), split="train", cache_dir=str(tmp_path / "cache"))
    (tmp_path / "folder").mkdir()
    dataset.to_parquet(str(tmp_path / "folder" / "train.parquet"))
    dataset.save_to_disk(str(tmp_path / "saved"))
    assert _read(tmp_path, "folder/train.parquet") == expected
    assert _read(tmp_path, "folder") == expected
    assert _read(tmp_path, "saved") == expected
    for on_hub in (dataset, datasets.load_dataset("json", data_files=str(lines), split="train", streaming=True)):
        monkeypatch.setattr(source_rows, "_open_dataset", lambda *_, rows=on_hub: rows)
        assert _read(tmp_path, "organisation/rows") == expected


def test_members_that_other_rows_have_are_not_said(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ALIKE), tmp_path / "rows.parquet")
    search, weather = (
        one.messages[1]["tool_calls"][0]["function"]["arguments"] for one in _read(tmp_path, "rows.parquet")
    )
    assert (search, weather) == ({"query": "cats"}, {"city": "Paris", "days": ["Monday"]})
    # In JSON text, null is what the row says.
    datasets.Dataset.from_list(MIXED, on_mixed_types="use_json").to_parquet(str(tmp_path / "rows.parquet"))
    first = _read(tmp_path, "rows.parquet")[0]
    assert first.messages[1]["tool_calls"][0]["function"]["arguments"]["page"] is None


def test_columns_that_nobody_reads_may_hold_anything(tmp_path: Path) -> None:
    odd = {
        "created": pa.array([1, 10**12], pa.timestamp("s")),
        "place": pa.array([1, 2], pa.timestamp("s", tz="Mars/Base")),
        "text": pa.array([b"\xff", b"a"], pa.binary()).view(pa.string()),
    }
    pq.write_table(pa.table({"prompt": ["a", "b"], **odd}), tmp_path / "rows.parquet")
    datasets.Dataset(pa.table({"prompt": ["a", "b"], "created": odd["created"]})).save_to_disk(str(tmp_path / "saved"))
    for name in ("rows.parquet", "saved"):
        assert [one.messages[0]["content"] for one in _read(tmp_path, name)] == ["a", "b"]
    # Messages still name them.
    pq.write_table(pa.table({"mesages": ["a", "b"], **odd}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="'messages' meant") as problem:
        _read(tmp_path, "rows.parquet")
    assert problem.value.found == "fields created, mesages, place, text"
    # Under another name it is read.
    counts = Counter[str]()
    assert [one.messages[0]["content"] for one in _read(tmp_path, "rows.parquet", counts, prompt="text")] == ["a"]
    assert counts["malformed"] == 1


ODD = {
    "a date": datetime.datetime(2020, 1, 1),
    "a decimal": decimal.Decimal("1.5"),
    "bytes": b"abc",
    "a date that Python has not": pa.scalar(10**12, pa.timestamp("s")),
}


@pytest.mark.parametrize("value", ODD.values(), ids=list(ODD))
@pytest.mark.parametrize("part", ["arguments", "tools"])
def test_a_value_that_is_no_json_is_a_bad_row(tmp_path: Path, value: Any, part: str) -> None:
    kind = value.type if isinstance(value, pa.Scalar) else pa.scalar(value).type
    user = {"role": "user", "content": "Hi"}
    if part == "tools":
        column, rows = pa.list_(pa.struct({"name": pa.string(), "when": kind})), [[{"name": "f", "when": value}], None]
        table = pa.table({"messages": [[user], [user]], "tools": pa.array(rows, column)})
    else:
        call = pa.struct({"name": pa.string(), "arguments": pa.struct({"when": kind})})
        message = pa.struct({"role": pa.string(), "content": pa.string(), "tool_calls": pa.list_(call)})
        answer = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"when": value}}]}
        table = pa.table({"messages": pa.array([[user, answer], [user]], pa.list_(message))})
    pq.write_table(table, tmp_path / "rows.parquet")
    counts = Counter[str]()
    assert [len(one.messages) for one in _read(tmp_path, "rows.parquet", counts)] == [1]
    assert counts["malformed"] == 1


class Noting(Mapping[str, Any]):
    """A row that remembers which fields it was asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values_, self.asked = values, set[str]()

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return self.values_[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


def test_every_field_that_a_row_is_asked_for_is_read_of_tables() -> None:
    ids = {"prompt_ids": [1], "output_ids": [2], "prompt_answers": [], "rewritten": []}
    asked: set[str] = set()
    for values in (
        {"prompt": "a", "functions": [{"name": "f"}], **ids},
        {"instruction": "a", "output": "b", "input_ids": [1], "loss_mask": [1]},
    ):
        row = Noting(values)
        from_row(row, "rows:1")
        asked |= row.asked
    assert asked == ColumnMap({}, "columns").read
