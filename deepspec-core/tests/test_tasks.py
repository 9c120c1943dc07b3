"""Evaluation prompts: from files and held-out rows, cut as published, refused where results could not be told apart."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepspec_core.errors import DataError
from deepspec_core.evaluation.tasks import Prompt, load_task, task_digest, task_name
from deepspec_core.evaluation.turns import prompt_of, sample_id
from deepspec_core.plugins.registry import Registry


def _load(folder: Path, rows: list[dict[str, Any]], limit: int | None = None) -> list[Prompt]:
    (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_task("task.jsonl", limit=limit, seed=7, base=folder, registry=Registry(), held_out=list)


def test_the_first_turn_is_asked(tmp_path: Path) -> None:
    rows = [
        {"turns": ["One?", "And two?"]},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "More"},
            ]
        },
    ]
    first, second = _load(tmp_path, rows)
    assert first.messages == ({"role": "user", "content": "One?"},)
    assert [message["content"] for message in second.messages] == ["Be brief.", "Hi"]
    assert (first.id, second.id) == ("task-0", "task-1")


def test_a_quota_shuffles_with_its_seed_and_renumbers(tmp_path: Path) -> None:
    rows = [{"turns": [str(number)]} for number in range(20)]
    expected = list(range(20))
    random.Random(7).shuffle(expected)
    found = _load(tmp_path, rows, limit=5)
    assert [prompt.messages[0]["content"] for prompt in found] == [str(number) for number in expected[:5]]
    assert [prompt.index for prompt in found] == [0, 1, 2, 3, 4]
    # As many as asked for: the order of the file stands.
    assert [prompt.messages[0]["content"] for prompt in _load(tmp_path, rows, limit=20)] == list(map(str, range(20)))


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"id": "a", "turns": ["x"]}, {"id": "a", "turns": ["y"]}], "share an id"),
        ([{"text": "x"}], "task.jsonl:1"),
        ([], "no prompts"),
        ([{"messages": [{"content": "x"}]}], "no known role"),
        ([{"messages": "hello"}], "messages is not a list"),
        ([{"turns": "hello"}], "turns is not a list"),
        ([{"turns": [3]}], "content is not text"),
        ([{"turns": [" "]}], "question is empty"),
        ([{"turns": ["x", ""]}], "user turn 2 of 2"),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], "begin with a user's question"),
        (
            [{"messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]}],
            "begin with a user",
        ),
        ([{"turns": ["x"], "tools": "{"}], "Not JSON"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(DataError, match=said):
        _load(tmp_path, rows)


@pytest.mark.parametrize("ending", [".json", ".parquet", ".json.gz"])
def test_a_task_may_be_any_file_of_rows(tmp_path: Path, ending: str) -> None:
    rows = [{"id": "a", "turns": ["one"]}, {"id": None, "turns": ["two"]}]
    path = tmp_path / f"questions{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        content = json.dumps(rows).encode()
        path.write_bytes(gzip.compress(content) if ending == ".json.gz" else content)
    found = load_task(path.name, limit=None, seed=7, base=tmp_path, registry=Registry(), held_out=list)
    assert [(prompt.id, prompt.messages[0]["content"]) for prompt in found] == [("a", "one"), ("questions-1", "two")]
    assert found[1].where == f"{path}: row 2"
    assert task_name(path.name) == "questions"
    assert task_digest(path.name, base=tmp_path) is not None


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    (tmp_path / "task.jsonl").write_bytes('{"turns": ["one\u2028two\x85three four"]}\n\n{"turns": ["five"]}'.encode())
    prompts = load_task("task.jsonl", limit=None, seed=7, base=tmp_path, registry=Registry(), held_out=list)
    assert [prompt.messages[0]["content"] for prompt in prompts] == ["one\u2028two\x85three four", "five"]


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"turns": ["\xff"]}', b"{", b"7"])
def test_a_line_that_is_no_row_is_told_by_its_number(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "task.jsonl").write_bytes(b'{"turns": ["x"]}\n' + line + b"\n")
    with pytest.raises(DataError, match=r"task\.jsonl:2"):
        load_task("task.jsonl", limit=None, seed=7, base=tmp_path, registry=Registry(), held_out=list)


BENCHMARKS = Path(__file__).parents[3] / "shared" / "eval_datasets"


@pytest.mark.skipif(not BENCHMARKS.is_dir(), reason="the benchmark prompts lie beside the project, not in it")
def test_every_benchmark_file_loads_whole() -> None:
    files = sorted(BENCHMARKS.glob("*.jsonl"))
    assert files
    for file in files:
        prompts = load_task(str(file), limit=None, seed=7, base=Path(), registry=Registry(), held_out=list)
        assert len(prompts) == sum(bool(line.strip()) for line in file.read_bytes().split(b"\n")), file.name


@pytest.mark.parametrize("named", ["q (sample 2)", "q (turn 3)"])
def test_no_prompt_is_named_as_a_sample_or_a_turn_is(tmp_path: Path, named: str) -> None:
    """Answers are told apart by the names of samples and turns."""
    prompts = _load(tmp_path, [{"id": name, "turns": ["Why?"]} for name in ("q", named)])
    assert [prompt.id for prompt in prompts] == ["q", f"{named}."]
    assert [prompt_of(prompt.id) for prompt in prompts] == ["q", f"{named}."]
    assert prompt_of(sample_id(f"{named}.", 2)) == f"{named}."
