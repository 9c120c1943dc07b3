"""`deepspec diagnose` on a finished smoke run: what it writes and prints, and what it refuses."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from counting_server import counting

import deepspec_core
from deepspec_core.cli.main import main
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.interface.models import Target
from deepspec_core.pipeline.diagnosed_run import run_of
from deepspec_core.pipeline.diagnosed_texts import asked_prompts
from deepspec_core.plugins.discovery import load_plugins

SMALL = ["--samples", "6", "--prompts", "4", "--rounds", "4", "--max-new-tokens", "12"]


def test_a_smoke_run_is_measured_at_every_stage_and_not_accused(
    finished_copy: Path, target: Target, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = finished_copy.parent / "runs" / "quickstart-dflash-smoke", tmp_path / "diagnosis.json"
    # A crash of the machine left a damaged line, and a last one that is half written.
    with (folder / "train" / "metrics.jsonl").open("a") as file:
        file.write('\0\0\0\n{"step": 99, "lo')
    proposer = deepspec_core.load_draft(folder / "draft", target).proposer()
    tokenizer, stop_ids = ChatTokenizer(target.tokenizer), target.architecture.stop_token_ids
    with counting(target.model, tokenizer, stop_ids, "vllm", proposer) as server:
        server.model = "builtin:tiny-qwen3"
        command = ["diagnose", str(folder), *SMALL, "--server", server.address, "--out", str(out), "--json"]
        capsys.readouterr()
        assert main(command) == 0
    found = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == found
    names = [stage["name"] for stage in found["stages"]]
    assert names == ["recorded", "replayed", "live", "held-out", "prompts", "engine", "served"]
    assert found["first_drop"] is None
    # The server has the run's own draft and target: the very same rounds. It counts the last one of each answer too.
    engine, served = found["stages"][-2:]
    assert 0 < served["blocks"] - engine["blocks"] <= 4
    assert served["difference"]["later"] == pytest.approx(served["difference"]["earlier"])
    assert found["findings"] == []
    assert found["not_measured"].keys() == {"lines of metrics.jsonl", "precision"}
    assert found["not_measured"]["lines of metrics.jsonl"] == "1 of them cannot be read"
    # The cache is in bf16, so its features agree, and not to the bit.
    assert all(tap["cosine"] > 0.999 and tap["fits"] == tap["tap"] for tap in found["facts"]["features"])
    assert any(tap["largest"] > 0 for tap in found["facts"]["features"])
    assert {one["kind"] for one in found["facts"]["prompts"]} == {"same"}


def test_the_prompts_that_are_asked_are_of_every_task_in_turn(
    new_run_file: Callable[[Path], Path], tmp_path: Path
) -> None:
    path, tasks = new_run_file(tmp_path), {"few": 2, "many": 9, "more": 9}
    for name, count in tasks.items():
        rows = (json.dumps({"turns": [f"{name} {index}"]}) for index in range(count))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    run = run_of(path, overrides=(), tasks=[f"{name}.jsonl" for name in tasks], plugins=load_plugins())
    asked = asked_prompts(run, 8)
    of_task = [next(name for name in tasks if name in one.id) for one in asked]
    assert of_task == ["few", "many", "more", "few", "many", "more", "many", "more"]
    assert len({one.id for one in asked}) == 8


@pytest.mark.parametrize("output", ["{folder}", "/" + "a/" * 40, "a/" * 40 + "run"])
@pytest.mark.parametrize("command", ["diagnose", "export"])
def test_a_folder_that_does_not_say_where_its_run_file_lay_is_refused(
    command: str, output: str, finished_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished_copy.parent / "runs" / "quickstart-dflash-smoke"
    saved = folder / "config.toml"
    text = saved.read_text()
    assert 'output = "runs/quickstart-dflash-smoke"' in text
    text = text.replace("runs/quickstart-dflash-smoke", output.format(folder=folder))
    saved.write_text(text.replace("[target]\n", '[target]\nchat_template = "own.jinja"\n', 1))
    more = ["--to", "deepspec", "--draft-vocab", "150"] if command == "export" else []
    assert main([command, str(folder), *more]) == 2
    said = capsys.readouterr().err
    assert "target.chat_template = own.jinja" in said
    assert "Name the run file in place of the folder" in said


def test_a_folder_none_of_whose_paths_is_relative_says_enough(finished_copy: Path) -> None:
    """Wherever the run file lay. Its results are those of the folder, also where that was renamed."""
    folder = finished_copy.parent / "runs" / "quickstart-dflash-smoke"
    saved = folder / "config.toml"
    for output in (str(folder), "/elsewhere/run", "runs/renamed"):
        text = saved.read_text()
        saved.write_text(re.sub('^output = ".*"', f'output = "{output}"', text, count=1, flags=re.M))
        run = run_of(folder, overrides=(), tasks=(), plugins=load_plugins())
        assert run.folder == folder.resolve()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nowhere.toml"], ("no such", "nowhere.toml")),
        (["."], ("There is no run in this folder", "config.toml")),
        (["draft", "--target", "builtin:tiny-qwen3"], ("give --task",)),
        (["run.toml", "--served", "a.json", "--server", "http://localhost:1"], ("give only one of them",)),
        (
            ["./draft", "--target", "builtin:tiny-qwen3", "--task", "t.jsonl"],
            ("no draft checkpoint in this directory",),
        ),
    ],
)
def test_what_cannot_be_diagnosed_is_one_message(
    arguments: list[str],
    parts: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["diagnose", *arguments]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for part in parts:
        assert part in message
