"""Rows that cannot be used: dropped, counted and kept with their places, within a budget that is checked first."""

import errno
import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from deepspec_core.cli.main import main
from deepspec_core.config.load import load_run_file
from deepspec_core.data.bad_rows import BadRow, BadRows
from deepspec_core.data.source_row import MOST_BYTES
from deepspec_core.errors import DataError
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.run_data import BAD_ROWS
from deepspec_core.plugins.discovery import load_plugins

GOOD = b'{"turns": ["Say %d"]}\n'
IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
# What dumps of the web hold: each bad line, the part of the reason that says so, and the name it is counted under.
BAD: list[tuple[str, bytes, str, str]] = [
    ("a torn line", b'{"turns": ["a"', "not JSON", "malformed"),
    ("no UTF-8", b'{"turns": ["\xff\xfe"]}', "not UTF-8", "malformed"),
    ("null bytes", b"\0" * 500, "not JSON", "malformed"),
    ("a null byte in a text", b'{"turns": ["a\0b"]}', "not JSON", "malformed"),
    ("10 MB", b'{"turns": ["' + b"x" * 10_000_000 + b'"]}', "too long", "malformed"),
    ("a list", b"[1, 2]", "not an object", "malformed"),
    ("another form", b'{"text": "a"}', "holds no conversation", "malformed"),
    ("brackets", b"[" * 100_000, "nested too deep", "malformed"),
    ("an image", json.dumps({"messages": [{"role": "user", "content": IMAGE}]}).encode(), "not text", "unusable"),
    ("an unknown role", b'{"messages": [{"role": "bing", "content": "a"}]}', "no known role", "unusable"),
    (
        "a call without a name",
        b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"arguments": {}}]}]}',
        "names no function",
        "malformed",
    ),
    (
        "a call whose arguments are no JSON",
        b'{"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]}',
        "not JSON",
        "malformed",
    ),
]


STAGES = ('run.stages=["regenerate", "train"]', 'features.mode="online"')


def _run(path: Path, *changes: str) -> Run:
    plugins = load_plugins()
    given = ['data.sources=[{path = "rows.jsonl"}]', "data.held_out=0.0", *STAGES, *changes]
    return Run(file=load_run_file(path, overrides=given, plugins=plugins), path=path, plugins=plugins)


def _write(path: Path, good: int, *bad: bytes) -> None:
    rows = [GOOD % number for number in range(good)]
    path.write_bytes(b"".join(rows[: good // 2]) + b"".join(line + b"\n" for line in bad) + b"".join(rows[good // 2 :]))


@pytest.mark.parametrize(
    ("line", "reason", "count"), [pytest.param(line, reason, count, id=name) for name, line, reason, count in BAD]
)
def test_a_bad_row_does_not_end_the_run(run_file: Path, line: bytes, reason: str, count: str) -> None:
    _write(run_file.parent / "rows.jsonl", 40, line)
    run, counts = _run(run_file), Counter[str]()
    assert len(list(run.data.conversations("train", counts, keep=True))) == 40
    assert +counts == {"conversations": 40, count: 1}
    (kept,) = [json.loads(text) for text in (run.folder / BAD_ROWS).read_text().splitlines()]
    assert kept["where"].startswith(f"{run_file.parent / 'rows.jsonl'}:21")
    assert reason in kept["reason"]
    whole = line.decode("utf-8", "backslashreplace")
    assert whole.startswith(kept["row"]) or json.loads(whole) == json.loads(kept["row"])
    assert len(kept["row"]) <= 2**14


def test_text_with_an_escaped_null_byte_and_calls_are_read(run_file: Path) -> None:
    call = {"function": {"name": "f", "arguments": json.dumps({"a": 1})}}
    rows = [
        {"id": "null", "messages": [{"role": "user", "content": "a\0b"}, {"role": "assistant", "content": "c " * 30}]},
        {"id": "call", "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]},
    ]
    (run_file.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = _run(run_file, 'run.stages=["train"]', "data.min_supervised_tokens=1")
    assert [one.id for one in run.data.conversations("train")] == ["null", "call"]
    samples = run.data.training_samples()
    assert "a\0b" in run.target.tokenizer.decode(samples[0].input_ids)


def test_too_many_bad_rows_are_one_error_before_the_first_stage(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [json.dumps({"messages": [{"role": "user", "content": IMAGE}]}).encode()] * 6
    _write(run_file.parent / "rows.jsonl", 80, *images, b"{", b"{", b'{"text": "a"}', b'{"turns": [3]}')
    given = ["run", str(run_file), "--set", 'data.sources=[{path = "rows.jsonl"}]']
    assert main([*given, "--dry-run"]) == 2
    assert "kept" not in capsys.readouterr().err
    run = _run(run_file)
    assert not run.folder.exists()
    assert main(given) == 2
    seen = capsys.readouterr()
    assert "starting" not in seen.out
    assert seen.err.count("where:") == 1
    for part in (
        "Too many rows of a source cannot be used",
        "10 of 90 rows. 6: A part of a message is not text; 2: A line is not JSON; 1: ",
        "at most a share of 0.05 (data.max_bad_rows)",
        f"{run.folder / BAD_ROWS} lists all of them with their reasons",
    ):
        assert part in seen.err, part
    kept = [json.loads(line) for line in (run.folder / BAD_ROWS).read_text().splitlines()]
    assert [entry["where"].rpartition(":")[2].split()[0] for entry in kept] == [str(number) for number in range(41, 51)]
    assert list(run.folder.iterdir()) == [run.folder / BAD_ROWS]


def _usable(run_file: Path, good: int, bad: int, share: float, limit: int | None = None) -> int:
    _write(run_file.parent / "rows.jsonl", good, *[b"{"] * bad)
    cut = "" if limit is None else f", limit = {limit}"
    run = _run(run_file, f"data.max_bad_rows={share}", f'data.sources=[{{path = "rows.jsonl"{cut}}}]')
    return len(list(run.data.conversations("train")))


def test_the_budget_is_a_share_of_the_rows_and_one_row_in_any_case(run_file: Path) -> None:
    assert _usable(run_file, 95, 5, 0.05) == 95
    assert _usable(run_file, 3, 1, 0.05) == 3
    assert _usable(run_file, 0, 9, 1.0) == 0
    for good, bad, share in ((94, 6, 0.05), (3, 2, 0.05), (99, 1, 0.0)):
        with pytest.raises(DataError, match=f"{bad} of {good + bad} rows"):
            _usable(run_file, good, bad, share)


def test_rows_after_the_last_that_is_read_do_not_count(run_file: Path) -> None:
    """The bad ones stand after the half of the good ones."""
    assert _usable(run_file, 40, 30, 0.05, limit=20) == 20
    with pytest.raises(DataError, match="30 of 51 rows"):
        _usable(run_file, 40, 30, 0.05, limit=21)


def test_each_source_has_a_budget_of_its_own(run_file: Path) -> None:
    """A source that cannot be read at all is a mistake, however small it is beside the others."""
    _write(run_file.parent / "rows.jsonl", 500)
    _write(run_file.parent / "more.jsonl", 0, b"{", b"{")
    run = _run(run_file, 'data.sources=[{path = "rows.jsonl"}, {path = "more.jsonl"}]')
    with pytest.raises(DataError, match="2 of 2 rows") as problem:
        list(run.data.conversations("train"))
    assert "more.jsonl" in str(problem.value.where)


def test_the_file_is_that_of_the_last_reading(run_file: Path) -> None:
    _write(run_file.parent / "rows.jsonl", 40, b"{")
    run = _run(run_file)
    # A reading that stops on its way, and one that only looks, leave no file.
    next(iter(run.data.conversations("train", keep=True)))
    list(run.data.conversations("train"))
    list(run.data.conversations("held_out", keep=False))
    assert not (run.folder / BAD_ROWS).exists()
    list(run.data.conversations("train", keep=True))
    assert (run.folder / BAD_ROWS).exists()
    _write(run_file.parent / "rows.jsonl", 40)
    list(_run(run_file).data.conversations("train", keep=True))
    assert list(run.folder.iterdir()) == []


def test_rows_that_are_kept_of_too_many_are_bounded(tmp_path: Path) -> None:
    from deepspec_core.data.bad_rows import OfOneSource
    from deepspec_core.data.source_row import SourceRow

    told: list[BadRow] = []
    bad, source = BadRows(most=0.1, keep_in=tmp_path / "bad", most_kept=3, tell=told.append), OfOneSource("rows")
    for number in range(7):
        source.rows += 1
        bad.add(SourceRow(f"rows:{number}", {"x": "y" * MOST_BYTES}), DataError("It is bad"), source)
    with pytest.raises(DataError, match="lists the first 3 with their reasons"):
        bad.check(source)
    kept: list[dict[str, Any]] = [json.loads(line) for line in (tmp_path / "bad").read_text().splitlines()]
    assert [entry["where"] for entry in kept] == ["rows:0", "rows:1", "rows:2"]
    assert int(kept[0]["row_characters"]) > MOST_BYTES > len(kept[0]["row"])
    assert len(told) == 7


def test_a_full_temporary_folder_is_one_error_that_names_it(
    run_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad rows wait there until it is known how many there are."""

    made = tempfile.TemporaryFile

    def full(**where: Any) -> Any:
        if where:
            return made(**where)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    _write(run_file.parent / "rows.jsonl", 4, b"{")
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    told = ["--set", 'data.sources=[{path="rows.jsonl"}]']
    for command in (["run", str(run_file), "--smoke"], ["data", "prepare", str(run_file)]):
        assert main([*command, *told]) == 2
        said = capsys.readouterr().err
        assert "There is no room to write" in said
        assert f"where:    {tempfile.gettempdir()}\n" in said
        assert "start the same command again" in said


def test_prompts_without_the_stage_that_answers_them_are_told_with_the_stage(run_file: Path) -> None:
    _write(run_file.parent / "rows.jsonl", 40)
    with pytest.raises(DataError, match=r"no_answer 40(.|\n)*Add the stage regenerate"):
        _run(run_file, 'run.stages=["train"]').data.training_samples()
