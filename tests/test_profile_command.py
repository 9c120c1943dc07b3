"""`deepspec profile`: the table of a real target, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from deepspec_core.cli.main import main
from deepspec_core.evaluation.cost_table import read_cost_table
from deepspec_core.locks import lock
from deepspec_core.pipeline import profiling

SMALL = ["--batch-size", "1", "--batch-size", "2", "--draft-tokens", "2", "--context", "8", "--repeats", "3"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_table_of_the_built_in_target(judged_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "builtin:tiny-qwen3", *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "wrote profile-tiny-qwen3.json" in shown
    assert "3 tokens each" in shown
    # The target of an evaluation is the same one.
    target = json.loads((judged_run / "metrics.json").read_text())["target"]
    table = read_cost_table(Path("profile-tiny-qwen3.json"), target=target)
    assert {(step.requests, step.tokens) for step in table.steps} == {(1, 1), (1, 2), (1, 3), (2, 2), (2, 4), (2, 6)}
    assert table.about["machine"]["threads"] >= 1
    assert table.about["settings"]["context"] == 8
    assert "deepspec-core" in table.about["machine"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--batch-size", "0"], "0 is not in the range"),
        (["--batch-size", "2"], "a batch size is given twice"),
        (["--repeats", "1"], "1 is not in the range"),
        (["--context", "9999999"], "longer than the target has positions"),
        (["--out", "/proc/table.json"], "cannot be written to this place"),
    ],
)
def test_nonsense_is_refused(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "builtin:tiny-qwen3", *SMALL, *arguments]) == 2
    assert says in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_no_target_and_no_file_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "./nowhere", *SMALL]) == 2
    assert "no such target directory" in capsys.readouterr().err
    Path("mine.json").write_text("mine")
    assert main(["profile", "builtin:tiny-qwen3", *SMALL, "--out", "mine.json"]) == 2
    assert "this file exists already" in capsys.readouterr().err
    assert Path("mine.json").read_text() == "mine"
    Path("table.sglang.json").write_text("mine")
    assert main(["profile", "builtin:tiny-qwen3", *SMALL, "--out", "table.json"]) == 2
    assert "table.sglang.json" in capsys.readouterr().err
    assert Path("table.sglang.json").read_text() == "mine"


def test_two_at_once_write_one_measurement(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["profile", "builtin:tiny-qwen3", *SMALL, "--out", "out/table.json"]
    with lock(Path("out"), name=".table.sglang.json.lock", problem="", fix=""):
        assert main(command) == 2
    assert "Another `deepspec profile` is measuring for this place" in capsys.readouterr().err
    assert not list(Path("out").glob("*.json"))
    taken, measure_steps = profiling.lock, profiling.measure_steps

    def late(folder: Path, **options: Any) -> Any:
        Path("out/table.json").write_text("mine")
        return taken(folder, **options)

    def no_measuring(*_: Any, **__: Any) -> Any:
        raise AssertionError("it is known before")

    # Another one finished after the first look.
    with monkeypatch.context() as patch:
        patch.setattr(profiling, "lock", late)
        patch.setattr(profiling, "measure_steps", no_measuring)
        assert main(command) == 2
    assert "this file exists already" in capsys.readouterr().err
    assert [path.name for path in Path("out").glob("*.json")] == ["table.json"]
    assert Path("out/table.json").read_text() == "mine"
    Path("out/table.json").unlink()

    # Something else came while it measured.
    def slow(*arguments: Any, **options: Any) -> Any:
        Path("out/table.sglang.json").write_text("mine")
        return measure_steps(*arguments, **options)

    monkeypatch.setattr(profiling, "measure_steps", slow)
    assert main(command) == 2
    assert [path.name for path in Path("out").glob("*.json")] == ["table.sglang.json"]
    assert Path("out/table.sglang.json").read_text() == "mine"
