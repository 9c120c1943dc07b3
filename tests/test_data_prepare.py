"""`deepspec data prepare`: the run's conversations in a folder, which a run reads as it reads the sources."""

import json
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from deepspec_core.cli.main import main
from deepspec_core.config.load import load_run_file
from deepspec_core.data.conversations import Conversation, from_row
from deepspec_core.data.prepared import line_of
from deepspec_core.errors import DataError
from deepspec_core.pipeline.checking import check_before
from deepspec_core.pipeline.preparing import prepare
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.stages import plan
from deepspec_core.plugins.discovery import load_plugins

PREPARED = 'data.sources=[{path = "prepared"}]'


def _run(path: Path, *changes: str) -> Run:
    plugins = load_plugins()
    given = [
        'data.sources=[{path="rows.jsonl"}, {path="more.json", weight=2.0}]',
        "data.held_out=0.3",
        'data.duplicates="drop"',
        *changes,
    ]
    return Run(file=load_run_file(path, overrides=given, plugins=plugins), path=path, plugins=plugins)


@pytest.fixture
def sources(run_file: Path) -> Path:
    """A run file with two sources: every kind of row, doubles, names that clash, and a bad row."""
    call = {"id": "c", "function": {"name": "f", "arguments": '{"a": [1, null]}'}}
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"Say {number}"}, {"role": "assistant", "content": "So."}]}
        for number in range(40)
    ]
    rows += [
        {"id": "half", "turns": ["half \ud800 of a pair"]},
        {"id": "null", "turns": ["a\0b\u2028c"]},
        {"id": "tokens", "input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]},
        {"id": "answers", "turns": ["x"], "prompt_ids": [5], "output_ids": [6], "rewritten": [[[1], [2, 3]]]},
        {"id": "same", "turns": ["one"]},
        {
            "id": "calls",
            "tools": [{"name": "f"}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": None, "reasoning": "Hm.", "tool_calls": [call]},
                {"role": "tool", "content": "b", "name": "f", "tool_call_id": "c"},
            ],
        },
    ]
    lines = [json.dumps(row) for row in rows]
    (run_file.parent / "rows.jsonl").write_text("\n".join([*lines[:9], "{broken", *lines[9:]]) + "\n")
    more = [{"id": "same", "turns": ["two"]}, {"turns": [" SAY 7"]}, *({"turns": [f"More {i}"]} for i in range(20))]
    (run_file.parent / "more.json").write_text(json.dumps(more))
    return run_file


def _both(run: Run) -> tuple[list[Conversation], list[Conversation]]:
    return list(run.data.conversations("train")), list(run.data.conversations("held_out"))


def test_a_run_reads_the_same_conversations_from_either(sources: Path) -> None:
    run = _run(sources)
    done = prepare(run, sources.parent / "prepared")
    train, held_out = _both(run)
    assert len(train) + len(held_out) == 40 + 6 + 21
    assert min(len(train), len(held_out)) > 10
    assert _both(_run(sources, PREPARED)) == (train, held_out)
    # The split is the folder's, whatever another run's seed and share.
    other = _run(sources, PREPARED, "run.seed=7", "data.held_out=0.01")
    assert _both(other) == (train, held_out)
    assert other.data.split() == run.data.split()
    assert _run(sources, "run.seed=7").data.split() != run.data.split()
    # A cache of the folder says so, and another run can tell which prompts it holds out.
    cached = 'run.stages=["cache", "train"]'
    found = [_run(sources, cached, *changes).cache.header().split for changes in ((), (PREPARED, "run.seed=7"))]
    assert found[0] == found[1]
    # A limit caps what is trained on, as of any source.
    cut = _run(sources, 'data.sources=[{path = "prepared", limit = 3}]')
    assert _both(cut) == (train[:3], held_out)
    manifest = json.loads((done.folder / "manifest.json").read_text())
    assert manifest["files"]["train.jsonl"]["conversations"] == len(train)
    assert manifest["counts"]["train"]["conversations"] == len(train)
    assert manifest["counts"]["train"]["malformed"] == 1
    assert sum(counts.get("same_prompt", 0) for counts in manifest["counts"].values()) == 1
    assert [source["path"] for source in manifest["sources"]] == ["rows.jsonl", "more.json"]
    assert all(len(source["digest"]) == 32 for source in manifest["sources"])
    (bad,) = (done.folder / "bad-rows.jsonl").read_text().splitlines()
    assert json.loads(bad)["where"].endswith("rows.jsonl:10")


def test_every_conversation_is_read_again_as_it_was(sources: Path) -> None:
    for conversation in _run(sources).data.conversations("train"):
        line = line_of(conversation)
        assert line.count(b"\n") == 1
        assert from_row(json.loads(line), "f:1") == conversation


def test_the_split_that_a_plugin_ships_is_kept(run_file: Path) -> None:
    """It holds out more than 20,000 prompts, of which those are written that evaluation asks."""
    run = _run(run_file, 'data.sources=[{path = "builtin:tiny-dialogues", limit = 20}]', "evaluate.limit=30")
    prepare(run, run_file.parent / "prepared")
    train, held_out = _both(_run(run_file, PREPARED))
    assert train == list(run.data.conversations("train"))
    assert held_out == list(islice(run.data.conversations("held_out"), 30))


def _prepare(path: Path, *more: str) -> int:
    changes = ["data.held_out=0.3", 'data.sources=[{path="rows.jsonl"}, {path="more.json"}]']
    return main(["data", "prepare", str(path), *(word for text in changes for word in ("--set", text)), *more])


def _files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_ino) for path in sorted(folder.iterdir())}


def test_other_content_is_not_replaced_without_force(sources: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = _run(sources).folder / "prepared"
    assert _prepare(sources) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"written: {out}\n")
    assert "1 rows that are damaged or hold no conversation" in said
    assert f"listed in {out / 'bad-rows.jsonl'}" in said
    before = _files(out)
    assert _prepare(sources) == 0
    assert capsys.readouterr().out.startswith("unchanged: ")
    assert _files(out) == before
    assert _prepare(sources, "--set", "run.seed=7") == 2
    message = capsys.readouterr().err
    assert "The folder holds other prepared conversations" in message
    assert "split" in message
    assert "--force" in message
    assert _files(out) == before
    assert _prepare(sources, "--set", "run.seed=7", "--force") == 0
    assert capsys.readouterr().out.startswith("replaced: ")
    assert _files(out)["train.jsonl"][0] != before["train.jsonl"][0]
    assert [path.name for path in out.parent.iterdir()] == ["prepared"]
    # A file that somebody edited is not what the manifest says; the same content is put back only if asked.
    with (out / "train.jsonl").open("a") as file:
        file.write("\n")
    assert _prepare(sources, "--set", "run.seed=7") == 2
    assert "differ from manifest.json" in capsys.readouterr().err
    assert _prepare(sources, "--set", "run.seed=7", "--force") == 0


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_what_is_no_prepared_folder_is_never_replaced(
    sources: Path, capsys: pytest.CaptureFixture[str], force: list[str]
) -> None:
    (sources.parent / "mine").mkdir()
    (sources.parent / "mine" / "manifest.json").write_text('{"format": "another"}')
    (sources.parent / "file").write_text("x")
    (sources.parent / "link").symlink_to(sources.parent / "nowhere")
    for name in ("mine", "file", "link"):
        assert _prepare(sources, "--out", str(sources.parent / name), *force) == 2
        assert "cannot be written to this folder" in capsys.readouterr().err
    assert _files(sources.parent / "mine").keys() == {"manifest.json"}
    (sources.parent / "empty").mkdir()
    assert _prepare(sources, "--out", str(sources.parent / "empty")) == 0


def test_an_interrupted_preparation_leaves_nothing(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_conversation: Conversation) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr("deepspec_core.pipeline.preparing.line_of", interrupted)
    before = sorted(sources.parent.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        prepare(_run(sources), sources.parent / "prepared")
    assert sorted(sources.parent.rglob("*")) == before


def test_a_source_that_changes_meanwhile_is_refused(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def edited(conversation: Conversation) -> bytes:
        with (sources.parent / "rows.jsonl").open("a") as file:
            file.write("\n")
        return line_of(conversation)

    monkeypatch.setattr("deepspec_core.pipeline.preparing.line_of", edited)
    with pytest.raises(DataError, match="changed while it was read"):
        prepare(_run(sources), sources.parent / "prepared")
    assert not (sources.parent / "prepared").exists()


def _truncate(folder: Path) -> None:
    os.truncate(folder / "train.jsonl", 100)


def _remove(folder: Path) -> None:
    (folder / "held-out.jsonl").unlink()


def _tear(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 300)


def _age(folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_truncate, "has changed since it was written"),
        (_remove, "no such file"),
        (_tear, "cannot be read"),
        (_age, "of another version"),
    ],
)
def test_a_damaged_folder_is_refused_before_the_first_stage(
    sources: Path, damage: Callable[[Path], None], says: str
) -> None:
    prepare(_run(sources), sources.parent / "prepared")
    damage(sources.parent / "prepared")
    run = _run(sources, PREPARED)
    with pytest.raises(DataError, match=says) as problem:
        check_before(run, plan(run))
    assert "data prepare" in str(problem.value.fix)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ('{path = "prepared"}, {path = "rows.jsonl"}', "must be the only source"),
        ('{path = "prepared", columns = {prompt = "messages"}}', "needs no `columns`"),
        ('{path = "prepared", split = "train"}', "needs no `split`"),
    ],
)
def test_a_prepared_folder_is_read_as_it_is(sources: Path, entries: str, says: str) -> None:
    prepare(_run(sources), sources.parent / "prepared")
    run = _run(sources, f"data.sources=[{entries}]")
    with pytest.raises(DataError, match=says):
        check_before(run, plan(run))
    with pytest.raises(DataError, match=says):
        list(run.data.conversations("train"))


def test_a_folder_with_another_manifest_is_a_dataset(run_file: Path) -> None:
    pytest.importorskip("datasets")
    folder = run_file.parent / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"turns": ["one"]}\n')
    (folder / "manifest.json").write_text("not even JSON")
    run = _run(run_file, 'data.sources=[{path = "data"}]', "data.held_out=0.01")
    assert [one.messages[0]["content"] for one in run.data.conversations("train")] == ["one"]
