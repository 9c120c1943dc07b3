"""JSON lines, JSON arrays and Parquet hold the same rows, are read lazily, and tell each bad row by its place."""

import gzip
import json
import os
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepspec_core.data import json_array
from deepspec_core.data.row_files import read_rows
from deepspec_core.data.source_row import MOST_BYTES
from deepspec_core.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": 'a "quoted" \\ [bracket], {brace}'}]},
    {"messages": [{"role": "user", "content": "Grüße\n\u2028\U0001f600"}]},
    {"messages": [{"role": "user", "content": "x" * 5000}]},
]


def _values(path: Path, **more: Any) -> list[Any]:
    return [row.content() for row in read_rows(path, **more)]


def _problems(path: Path) -> list[str]:
    return [f"{row.where}|{row.error.problem}|{row.error.found}" for row in read_rows(path) if row.error is not None]


def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "lines.json").write_bytes(lines)
    (tmp_path / "array.json").write_text(json.dumps(ROWS, ensure_ascii=False))
    (tmp_path / "pretty.json").write_bytes(b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=2).encode())
    (tmp_path / "array.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=2)
    for name in ("a.jsonl", "lines.json", "array.json", "pretty.json", "array.json.gz", "a.parquet"):
        assert _values(tmp_path / name) == ROWS, name


@settings(deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(), st.text() | st.lists(st.text() | st.integers())), max_size=5),
    chunk=st.integers(1, 40),
    indent=st.none() | st.integers(0, 2),
    plain=st.booleans(),
)
def test_an_array_is_cut_where_its_elements_end(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], chunk: int, indent: int | None, plain: bool
) -> None:
    """Wherever chunks of the file begin."""
    path = tmp_path_factory.getbasetemp() / "array-of-rows.json"  # a folder for each example takes longer than the rest
    path.write_bytes(json.dumps(rows, ensure_ascii=plain, indent=indent).encode("utf-8", "surrogatepass"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "_CHUNK_BYTES", chunk)
        assert _values(path) == rows


def test_a_bad_element_hides_none_of_the_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    long = b'{"text": "' + b"y" * (MOST_BYTES + 10) + b'"}'
    path.write_bytes(b'[{"a": 1}, {"b": nope}, {"c": "\xff"}, ' + long + b', "\x00", {"d": "\\u0000"}]')
    rows = list(read_rows(path))
    assert [row.value for row in rows if row.error is None] == [{"a": 1}, {"d": "\0"}]
    assert [row.where for row in rows if row.error is not None] == [f"{path}: row {number}" for number in (2, 3, 4, 5)]
    assert rows[1].text.strip() == '{"b": nope}'
    assert rows[2].text.strip() == '{"c": "\\xff"}'
    assert len(rows[3].text) <= MOST_BYTES
    assert "too long" in str(rows[3].error)


_BREAKS = {
    "no closing bracket": ("}]}", "}}"),
    "one too many": ("}]}", "}]]}"),
    "no closing brace": ("}]}", "}]"),
    "no opening bracket": (": [{", ": {"),
    "no opening brace": (": [{", ": ["),
    "no closing quote": ('"messages"', '"messages'),
    "no closing quote at its end": ('[y"', "[y"),
    "no opening quote": ('"messages"', 'messages"'),
}


@pytest.mark.parametrize("separator", [", ", ",\n  "])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
@pytest.mark.parametrize("how", _BREAKS)
def test_broken_brackets_and_quotes_hide_no_other_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, chunk: int, separator: str
) -> None:
    """Two broken rows, whose faults may cancel out, with good ones before, between and after them."""
    monkeypatch.setattr(json_array, "_CHUNK_BYTES", chunk)
    rows = [
        {
            "id": f"c{i}",
            "messages": [{"role": "user", "content": 'x}, {"id": '}, {"role": "assistant", "content": "[y"}],
        }
        for i in range(40)
    ]
    texts = [json.dumps(row) for row in rows]
    old, new = _BREAKS[how]
    for first, second in ((3, 30), (0, 39)):
        opposite = {"no closing bracket": "one too many", "one too many": "no closing bracket"}.get(how, how)
        broken = list(texts)
        broken[first] = texts[first].replace(old, new)
        broken[second] = texts[second].replace(*_BREAKS[opposite])
        path = tmp_path / "rows.json"
        path.write_text(f"[{separator.join(broken)}]\n")
        if how == "no closing quote at its end" and second == 39:
            # Then the array itself does not end, which is an error.
            with pytest.raises(DataError, match=r"row 40\n"):
                list(read_rows(path))
            broken[second] = texts[second]
            path.write_text(f"[{separator.join(broken)}]\n")
        read = list(read_rows(path))
        good = [row.value for row in read if row.error is None]
        assert good == [row for row, text in zip(rows, broken, strict=True) if text == json.dumps(row)]
        assert f"{path}: row {first + 1}|A row's brackets or quotes do not match|" in _problems(path)[0]


def test_a_broken_row_that_may_hide_others_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    good, other = '{"id": 1, "turns": ["a"]}', '{"turns": ["a"], "id": 2}'
    path.write_text(f'[{good}, {{"id": 1, "turns": ["a"}}, {", ".join([other] * 9)}, {good}]')
    with pytest.raises(DataError, match="may contain other rows") as raised:
        _values(path)
    assert f"{path}: row 2" in str(raised.value)
    # However short they are beside the rows before.
    long = json.dumps({"id": 1, "turns": ["a" * 4000]})
    path.write_text(f'[{long}, {{"id": 1, "turns": ["a" b]}}, {other}, {good}]')
    with pytest.raises(DataError, match='objects after it that begin with "turns"'):
        _values(path)
    # An object within the row begins as rows do.
    path.write_text('[{"id": 1, "calls": [{"id": 2}}, {"id": 3}, {"id": 4}], "x": 1}, {"id": 5}]')
    with pytest.raises(DataError, match="may contain other rows"):
        _problems(path)


def test_a_missing_comma_between_rows_loses_none(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"a": 1}\n{"a": 2}, {"a": 3}]')
    assert _values(tmp_path / "rows.json") == [{"a": 1}, {"a": 2}, {"a": 3}]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'[{"a": 1}, {"b": ', "does not end"),
        (b'[{"a": 1}', "does not end"),
        (b'[{"a": 1}] {"b": 2}', "text after a JSON array"),
        (b'{\n "data": [1]\n}', "neither a JSON array nor JSON lines"),
        (b"rows", "neither a JSON array nor JSON lines"),
    ],
)
def test_a_file_that_is_no_array_is_one_error(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=says):
        _values(path)


@pytest.mark.parametrize("content", [b"[]", b" [ \n] \n", b""])
def test_an_array_of_nothing_holds_no_row(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "rows.json").write_bytes(content)
    assert _values(tmp_path / "rows.json") == []


def test_a_long_line_is_passed_over_in_little_memory(tmp_path: Path) -> None:
    """The line is longer than what may be read at once; it comes through a pipe, so that nothing could look ahead."""
    path = tmp_path / "rows.jsonl"
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb") as file:
            file.write(b'{"turns": ["one"]}\n{"turns": ["')
            for _ in range(10):
                file.write(b"z" * 2**20)
            file.write(b'"]}\n{"turns": ["two"]}\n')

    writer = threading.Thread(target=write)
    writer.start()
    rows = list(read_rows(path))
    writer.join()
    assert [row.value for row in rows] == [{"turns": ["one"]}, None, {"turns": ["two"]}]
    assert "A row is too long" in str(rows[1].error)
    assert "found:    10.5 MB" in str(rows[1].error)
    assert "rows.jsonl:2" in str(rows[1].error)
    assert len(rows[1].text) <= MOST_BYTES + 1
    # What the project wrote itself may have any length.
    (tmp_path / "own.jsonl").write_text(json.dumps({"turns": ["z" * 10**7]}) + "\n")
    assert len(_values(tmp_path / "own.jsonl", most_bytes=None)[0]["turns"][0]) == 10**7


def test_bad_rows_of_parquet_are_told_by_their_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    texts = pa.array([b"one", b"\xff\xfe", b"w" * (MOST_BYTES + 1), b"two"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": texts}), path)
    rows = list(read_rows(path))
    assert [row.value for row in rows] == [{"prompt": "one"}, None, None, {"prompt": "two"}]
    assert [problem.partition("|")[0] for problem in _problems(path)] == [f"{path}: row 2", f"{path}: row 3"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="Parquet file cannot be read"):
        list(read_rows(path))


def test_parquet_is_not_read_whole(tmp_path: Path) -> None:
    """The first rows of a file come long before its end is read."""
    path = tmp_path / "rows.parquet"
    table = pa.table({"prompt": [f"{number} " + os.urandom(2000).hex() for number in range(8000)]})
    pq.write_table(table, path, row_group_size=8000, compression="none", use_dictionary=False)
    del table
    before = pa.total_allocated_bytes()
    rows = iter(read_rows(path))
    next(rows)
    held = pa.total_allocated_bytes() - before
    assert path.stat().st_size > 30_000_000
    assert held < 8_000_000, held
