"""The forms in which others publish conversations, and `columns` for the rest: read as meant, or refused by name."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deepspec_core.cli.main import main
from deepspec_core.config.load import load_run_file
from deepspec_core.config.schema import SourceOptions
from deepspec_core.data.bad_rows import BadRows
from deepspec_core.data.conversations import from_row
from deepspec_core.data.sources import check_sources, read_sources
from deepspec_core.errors import ConfigError, DataError
from deepspec_core.evaluation.tasks import load_task
from deepspec_core.pipeline.fingerprint import differences, flatten
from deepspec_core.pipeline.run import Run
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.registry import Registry


def _said(messages: Any) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


ALPACA = [
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, [("user", "Add.\n\n1 2"), ("assistant", "3")]),
    ({"instruction": "Say hi.", "input": "", "output": "Hi."}, [("user", "Say hi."), ("assistant", "Hi.")]),
    ({"instruction": "Say hi.", "input": None, "output": None}, [("user", "Say hi.")]),
    (
        {"instruction": "c", "output": "d", "system": "Be brief.", "history": [["a", "b"]]},
        [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
    ),
]


@pytest.mark.parametrize(("row", "says"), ALPACA)
def test_alpaca_rows_are_sources_and_tasks(tmp_path: Path, row: dict[str, Any], says: list[tuple[str, str]]) -> None:
    assert _said(from_row(row, "f:1").messages) == says
    (tmp_path / "task.jsonl").write_text(json.dumps(row))
    (prompt,) = load_task("task.jsonl", limit=None, seed=1, base=tmp_path, registry=Registry(), held_out=list)
    asked = next(index for index, (role, _) in enumerate(says) if role == "user")
    assert _said(prompt.messages) == says[: asked + 1]


def test_an_instruction_of_another_form_is_not_taken_for_alpaca() -> None:
    """Dolly's rows say half of the question in `context`."""
    with pytest.raises(DataError, match="no conversation"):
        from_row({"instruction": "Who is it about?", "context": "Ada wrote it.", "response": "Ada."}, "f:1")
    for broken in ({"history": [["a"]]}, {"history": "a"}, {"input": 3}, {"output": {"a": 1}}):
        with pytest.raises(DataError):
            from_row({"instruction": "x", "output": "y", **broken}, "f:1")


def test_a_call_of_sharegpt_is_a_tool_call() -> None:
    call = {"name": "weather", "arguments": {"city": "Paris"}}
    for value in (json.dumps(call), json.dumps([call])):
        row = {
            "conversations": [
                {"from": "human", "value": "Rain?"},
                {"from": "function_call", "value": value},
                {"from": "observation", "value": "no"},
                {"from": "gpt", "value": "No."},
            ]
        }
        asked, called, told, answered = from_row(row, "f:1").messages
        assert called == {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
        assert (asked["role"], told["role"], answered["role"]) == ("user", "tool", "assistant")
    with pytest.raises(DataError, match="Not JSON"):
        from_row({"conversations": [{"from": "function_call", "value": "weather(Paris)"}]}, "f:1")


def _read(
    folder: Path,
    rows: list[dict[str, Any]],
    columns: dict[str, str],
    name: str = "rows.jsonl",
    bad_rows: BadRows | None = None,
) -> list[Any]:
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    else:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceOptions(path=name, columns=columns)
    check_sources([source], base=folder, registry=Registry())
    return list(
        read_sources(
            [source],
            split="train",
            held_out=0.0,
            seed=1,
            base=folder,
            registry=Registry(),
            counts=Counter(),
            bad_rows=bad_rows,
        )
    )


MAPPED = [
    ({"messages": "dialog"}, {"dialog": [{"from": "human", "value": "a"}]}, [("user", "a")]),
    (
        {"messages": "dialog", "role": "speaker", "content": "text", "system": "rules"},
        {"dialog": [{"speaker": "user", "text": "a"}, {"speaker": "bot", "text": "b"}], "rules": "r"},
        [("system", "r"), ("user", "a"), ("assistant", "b")],
    ),
    (
        {"messages": "dialog", "system": "rules"},
        {"dialog": [{"role": "system", "content": "own"}, {"role": "user", "content": "a"}], "rules": "r"},
        [("system", "own"), ("user", "a")],
    ),
    ({"prompt": "query", "answer": "response"}, {"query": "a", "response": "b"}, [("user", "a"), ("assistant", "b")]),
    ({"prompt": "query"}, {"query": "a", "response": "b", "messages": [{"role": "x"}]}, [("user", "a")]),
    (
        {"prompt": "instruction", "input": "context", "answer": "response"},
        {"instruction": "Who?", "context": "Ada.", "response": "Ada"},
        [("user", "Who?\n\nAda."), ("assistant", "Ada")],
    ),
    (
        {"prompt": "chat", "answer": "chosen"},
        {"chat": [{"role": "user", "content": "a"}], "chosen": "b"},
        [("user", "a"), ("assistant", "b")],
    ),
    ({"turns": "questions"}, {"questions": ["a", "b"]}, [("user", "a"), ("user", "b")]),
]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("columns", "row", "says"), MAPPED)
def test_columns_say_which_is_which(
    tmp_path: Path, columns: dict[str, str], row: dict[str, Any], says: list[tuple[str, str]], ending: str
) -> None:
    (found,) = _read(tmp_path, [row], columns, f"rows{ending}")
    assert _said(found.messages) == says


def test_ids_and_tools_stand_under_our_names_or_others(tmp_path: Path) -> None:
    tools = json.dumps([{"name": "f"}])
    rows = [{"id": 1, "key": "k", "q": "a", "tools": None, "functions": tools}]
    (plain,) = _read(tmp_path, rows, {"prompt": "q"})
    assert (plain.id, plain.tools) == ("1", ())
    (named,) = _read(tmp_path, rows, {"prompt": "q", "id": "key", "tools": "functions"})
    assert (named.id, named.tools) == ("k", ({"name": "f"},))


def test_a_column_that_is_not_there_is_named(tmp_path: Path) -> None:
    row = {"query": "a", "response": "b"}
    with pytest.raises(DataError, match="'query' meant"):
        _read(tmp_path, [row], {"prompt": "qury"})
    # Rows of JSON may leave out what is empty. A column that none of them has is a mistake.
    rows = [row, {**row, "system": "Be brief."}]
    assert len(_read(tmp_path, rows, {"prompt": "query", "system": "system"})) == 2
    with pytest.raises(DataError, match="No row has a column") as problem:
        _read(tmp_path, rows, {"prompt": "query", "system": "sytem"})
    assert "rows.jsonl" in str(problem.value.where)
    # The one that rows have is not blamed for the other.
    with pytest.raises(DataError, match="No row has a column") as problem:
        _read(tmp_path, rows, {"prompt": "quest", "answer": "response"}, bad_rows=BadRows())
    assert problem.value.found == "'quest'"
    # A table says its columns before a row is read.
    pq.write_table(pa.Table.from_pylist(rows[::-1]), tmp_path / "rows.parquet")
    source = SourceOptions(path="rows.parquet", columns={"prompt": "query", "system": "sytem"})
    with pytest.raises(DataError, match="'system' meant"):
        check_sources([source], base=tmp_path, registry=Registry())
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([row]).save_to_disk(str(tmp_path / "saved"))
    source = SourceOptions(path="saved", columns={"prompt": "quest"})
    with pytest.raises(DataError, match="lacks the column"):
        check_sources([source], base=tmp_path, registry=Registry())


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ('{promt = "query"}', "is `prompt` meant?"),
        ('{answer = "response"}', "one of messages, turns, prompt"),
        ('{prompt = "a", messages = "b"}', "messages and prompt"),
        ('{messages = "a", answer = "b"}', "with `prompt` only"),
        ('{turns = "a", role = "b"}', "with `messages` only"),
        ("{prompt = 3}", "text in quotes"),
    ],
)
def test_columns_are_checked_with_the_run_file(
    run_file: Path, capsys: pytest.CaptureFixture[str], columns: str, says: str
) -> None:
    given = f'data.sources=[{{path = "rows.jsonl", columns = {columns}}}]'
    assert main(["config", "check", str(run_file), "--set", given]) == 2
    message = capsys.readouterr().err
    assert says in message
    assert "data.sources[0].columns" in message


def test_a_builtin_has_no_columns_to_name(run_file: Path) -> None:
    given = 'data.sources=[{path = "builtin:tiny-dialogues", columns = {prompt = "q"}}]'
    with pytest.raises(ConfigError, match="cannot be used with a builtin source"):
        load_run_file(run_file, overrides=[given], plugins=load_plugins())


def test_columns_are_part_of_what_results_depend_on(run_file: Path) -> None:
    def flat(columns: str) -> dict[str, Any]:
        given = [f'data.sources=[{{path = "rows.jsonl"{columns}}}]']
        return flatten(load_run_file(run_file, overrides=given, plugins=load_plugins()))

    one, other = flat(', columns = {prompt = "a"}'), flat(', columns = {prompt = "b"}')
    assert [key for key, _, _ in differences(one, other)] == ["data.sources"]
    # Results that were made before there were columns stay valid.
    assert "columns" not in flat("")["data.sources"][0]


def test_a_cache_knows_the_columns_it_was_made_with(run_file: Path) -> None:
    (run_file.parent / "rows.jsonl").write_text('{"a": "x", "b": "y"}\n')
    plugins, seen = load_plugins(), set()
    for columns in ('{prompt = "a"}', '{prompt = "b"}', '{prompt = "a", answer = "b"}', "{}"):
        changes = [f'data.sources=[{{path = "rows.jsonl", columns = {columns}}}]', 'run.stages=["cache", "train"]']
        file = load_run_file(run_file, overrides=changes, plugins=plugins)
        seen.add(Run(file=file, path=run_file, plugins=plugins).cache.header().source)
    assert len(seen) == 4
