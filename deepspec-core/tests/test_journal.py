"""The journal: entries survive, a torn last line does not, a damaged one is named."""

import json
from pathlib import Path

import pytest

from deepspec_core.errors import DataError
from deepspec_core.journal import Journal


def test_entries_are_there_again_and_a_torn_line_is_done_again(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "log.jsonl"
    journal = Journal(path)
    journal.append({"a": 1})
    journal.append({"b": "é\n"})
    journal.close()
    with path.open("ab") as file:
        file.write(b'{"c": 3')
    again = Journal(path)
    assert again.entries == [{"a": 1}, {"b": "é\n"}]
    again.append({"c": 3})
    again.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}, {"b": "é\n"}, {"c": 3}]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\nnonsense\n')
    with pytest.raises(DataError, match=r"log.jsonl:2"):
        Journal(path)
