"""A checkpoint evaluated without a run file, and evaluations side by side: what agrees, what is refused or marked."""

import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from deepspec_core.cli.main import main
from deepspec_core.evaluation.comparison import Run, compare
from deepspec_core.evaluation.report import markdown

PARITY = Path(__file__).parent / "parity"
QUESTIONS = ("What is 2 + 3?", "Write a short story.", "Convert 3 km to m.")
Arguments = Callable[..., list[str]]


def results(finished: Path) -> Path:
    return finished.parent / "runs" / "quickstart-dflash-smoke"


@pytest.fixture(scope="module")
def evaluated(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a draft, a task, and the draft's evaluation on it, made once."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(results(finished) / "draft", folder / "mine")
    (folder / "task.jsonl").write_text("".join(json.dumps({"turns": [text]}) + "\n" for text in QUESTIONS))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(command()) == 0
    return folder


@pytest.fixture
def copy(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same to change, as the working directory."""
    shutil.copytree(evaluated, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def command(draft: str = "mine", target: str = "builtin:tiny-qwen3", *more: str) -> list[str]:
    small = ["--temperature", "0", "--max-new-tokens", "8", "--limit", "2", "--batch-size", "2"]
    return ["evaluate", "--draft", draft, "--target", target, "--task", "task.jsonl", *small, *more]


def test_the_result_is_what_a_run_leaves(evaluated: Path) -> None:
    folder = evaluated / "evaluation-mine"
    report = json.loads((folder / "metrics.json").read_text())
    assert report["draft"]["algorithm"] == "dflash"
    assert report["draft"]["checkpoint"] == "../mine"  # from its folder
    assert report["draft"]["taps"] == [2, 4, 6, 8, 10]
    (result,) = report["results"]
    assert (result["task"], result["temperature"], result["samples"]) == ("task.jsonl", 0.0, 2)
    assert result["mismatches"] == []
    assert "accepted length" in (folder / "report.md").read_text()
    assert main(["config", "check", str(folder / "config.toml")]) == 0


def test_again_does_nothing_and_an_interrupted_one_goes_on(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = copy / "evaluation-mine" / "evaluate" / "task-t0.jsonl"
    before = journal.read_bytes()
    assert main(command()) == 0
    assert "already complete" in capsys.readouterr().out
    record = journal.with_name("stage.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "complete": False}))
    (copy / "evaluation-mine" / "metrics.json").unlink()
    assert main(command()) == 0
    assert "resuming" in capsys.readouterr().out
    assert journal.read_bytes() == before
    assert (copy / "evaluation-mine" / "metrics.json").exists()


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *parts: str) -> None:
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in:\n{message}"


def test_results_are_never_mixed(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(
        capsys, command("mine", "builtin:tiny-qwen3", "--temperature", "1"), "evaluate.temperature", "--force evaluate"
    )
    # The same name, another draft.
    config = copy / "mine" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_anchors": 5}))
    refused(capsys, command(), "The draft changed", "--force evaluate")


def test_changed_weights_are_another_model(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = copy / "mine" / "model.safetensors"
    original = weights.read_bytes()
    changed = bytearray(original)
    changed[len(changed) // 2] ^= 1
    weights.write_bytes(changed)
    refused(capsys, command(), "The draft changed", "--force evaluate")
    weights.write_bytes(original)
    record = copy / "evaluation-mine" / "evaluate" / "stage.json"
    noted = json.loads(record.read_text())
    assert set(noted["content"]) >= {"the draft", "the target"}
    record.write_text(json.dumps({**noted, "content": {**noted["content"], "the target": "another"}}))
    refused(capsys, command(), "The target changed", "--force evaluate")
    record.write_text(json.dumps(noted))
    assert main(command()) == 0


def test_a_target_the_draft_was_not_made_for(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draft, target = str(PARITY / "qwen3-dflash" / "draft"), str(PARITY / "qwen3-target")
    refused(capsys, command("mine", target), "`hidden_size`", "`vocab_size`", "`num_target_layers`", "12", "expected")
    config = copy / "mine" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_target_layers": 13}))
    refused(capsys, command("mine"), "`num_target_layers` differs", "num_target_layers = 13", "num_target_layers = 12")
    refused(capsys, command(draft, "builtin:tiny-qwen3"), "`hidden_size`", "hidden_size = 32")
    assert [path.name for path in copy.iterdir() if path.name.startswith("evaluation-")] == ["evaluation-mine"]


def test_mistakes_on_the_command_line(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = [word if word != "task.jsonl" else "held-out" for word in command()]
    refused(capsys, held_out, "held-out", "run file")
    refused(capsys, command("yours/../mine2/x"), "no draft checkpoint in this directory")
    absent = [word if word != "task.jsonl" else "gsm9k" for word in command()]
    refused(capsys, [*absent, "--out", "other"], "gsm9k")
    twice = [*command(), "--task", "./task.jsonl", "--out", "other2"]
    refused(capsys, twice, "write the same file of results", "task.jsonl")
    threshold = [*command(), "--confidence-threshold", "0.5", "--out", "other3"]
    refused(capsys, threshold, "confidence")


def test_a_draft_of_the_hub(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By id, here and in a run file's [evaluate] draft; the downloader is a stub."""
    asked: list[str] = []

    def snapshot_download(repo_id: str, **_: Any) -> str:
        asked.append(repo_id)
        return str(copy / "mine")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert main(command("somebody/mine-on-the-hub")) == 0
    assert set(asked) == {"somebody/mine-on-the-hub"}
    mine, theirs = (
        json.loads((copy / f"evaluation-{name}" / "metrics.json").read_text()) for name in ("mine", "mine-on-the-hub")
    )
    assert theirs["draft"]["checkpoint"] == "somebody/mine-on-the-hub"
    assert theirs["results"][0]["acceptance_length"] == mine["results"][0]["acceptance_length"]
    asked.clear()
    # The saved run file says the same, from another folder.
    text = (copy / "evaluation-mine-on-the-hub" / "config.toml").read_text()
    (copy / "again.toml").write_text(text.replace('output = "evaluation-', 'output = "again-'))
    assert main(["run", "again.toml"]) == 0
    assert asked
    again = json.loads((copy / "again-mine-on-the-hub" / "metrics.json").read_text())
    assert again["results"][0]["acceptance_length"] == mine["results"][0]["acceptance_length"]


def run_of(evaluated: Path, label: str, **changes: Any) -> Run:
    """The evaluation as metrics.json has it, with some sections changed: target__model="other"."""
    report = json.loads((evaluated / "evaluation-mine" / "metrics.json").read_text())
    for place, value in changes.items():
        section, _, key = place.partition("__")
        report[section][0 if section == "results" else key] = value
    return Run(label=label, report=report)


def test_times_of_several_workers_are_said_to_be_of_one_beside_others(evaluated: Path) -> None:
    report = run_of(evaluated, "a").report
    (result,) = report["results"]
    assert result["workers"] == 1
    assert "workers decoded at the same time" not in markdown(report)
    shared = run_of(evaluated, "a", results__0={**result, "workers": 2}).report
    assert "Up to 2 workers decoded at the same time" in markdown(shared)


def test_equal_runs_are_compared_without_remarks(evaluated: Path) -> None:
    comparison = compare([run_of(evaluated, "a"), run_of(evaluated, "b")])
    assert comparison.differences == comparison.remarks == ()
    assert [row.run.label for row in comparison.rows] == ["a", "b"]
    assert "Not all" not in comparison.markdown()
    assert comparison.rows[0].cells()[1:] == comparison.rows[1].cells()[1:]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target__model": "another/target"}, "target.model differs: builtin:tiny-qwen3 in a, another/target in b"),
        ({"target__dtype": "bfloat16"}, "target.dtype differs: float32 in a, bfloat16 in b"),
        ({"settings__max_new_tokens": 9}, "settings.max_new_tokens differs: 8 in a, 9 in b"),
        ({"settings__thinking": True}, "settings.thinking differs: False in a, True in b"),
    ],
)
def test_other_targets_and_settings_are_marked(evaluated: Path, changes: dict[str, Any], said: str) -> None:
    comparison = compare([run_of(evaluated, "a"), run_of(evaluated, "b", **changes)])
    assert comparison.differences == (said,)
    assert [row.marked for row in comparison.rows] == [False, True]
    assert comparison.rows[1].cells()[0].endswith("*")
    assert said in comparison.markdown()
    assert [row["comparable"] for row in comparison.as_json()["rows"]] == [True, False]


def test_a_calibration_under_a_threshold_is_told(evaluated: Path) -> None:
    """It moves where proposals end. Where nothing is cut by confidence it changes no accepted length."""
    names = {"draft__calibration": "ab" * 16, "settings__confidence_threshold": 0.1}
    plain = run_of(evaluated, "a", settings__confidence_threshold=0.1)
    comparison = compare([plain, run_of(evaluated, "b", **names)])
    assert comparison.differences == ("draft.calibration differs: None in a, abababababab... in b",)
    assert [row.marked for row in comparison.rows] == [False, True]
    # Another draft has a calibration of its own.
    third = run_of(evaluated, "c", **names | {"draft__calibration": "cd" * 16, "draft__revision": "other"})
    assert compare([run_of(evaluated, "b", **names), third]).differences == ()
    assert len(compare([plain, third]).differences) == 1
    uncut = compare([run_of(evaluated, "a"), run_of(evaluated, "b", draft__calibration="ab" * 16)])
    assert uncut.differences == ()
    assert uncut.remarks[0].endswith("draft.calibration differs: None in a, abababababab... in b")
    assert "calibration: abab" in markdown(run_of(evaluated, "b", **names).report)


def test_a_setting_that_is_not_written_has_its_default(evaluated: Path) -> None:
    changes = {"settings__samples": 2, "settings__top_p": 1.0, "settings__stop": []}
    comparison = compare([run_of(evaluated, "a"), run_of(evaluated, "b", **changes)])
    assert comparison.differences == ("settings.samples differs: 1 in a, 2 in b",)


def test_trees_are_compared_with_chains(evaluated: Path) -> None:
    """How a draft proposes is what is compared. It is told, and marks no row."""
    comparison = compare([run_of(evaluated, "a"), run_of(evaluated, "b", settings__tree_nodes=8)])
    assert comparison.differences == ()
    assert not any(row.marked for row in comparison.rows)
    assert comparison.remarks[0].endswith("settings.tree_nodes differs: None in a, 8 in b")


def test_a_task_is_the_same_from_any_path(evaluated: Path) -> None:
    first = run_of(evaluated, "a")
    result = deepcopy(first.report["results"][0]) | {"task": "../data/task.jsonl"}
    comparison = compare([first, run_of(evaluated, "b", results__0=result)])
    assert comparison.differences == ()
    assert [row.cells()[1] for row in comparison.rows] == ["task.jsonl", "task.jsonl"]
    other = run_of(evaluated, "b", results__0=result | {"prompts_digest": "0" * 64})
    assert "../data/task.jsonl at T=0 was not evaluated in a" in compare([first, other]).differences


def test_other_prompts_under_the_same_name_are_marked(evaluated: Path) -> None:
    first = run_of(evaluated, "a")
    result = deepcopy(first.report["results"][0])
    other = run_of(evaluated, "b", results__0={**result, "prompts_digest": "0" * 64})
    comparison = compare([first, other])
    assert comparison.differences == ("task.jsonl at T=0 asked other prompts: 2 in a, 2 in b",)
    assert [row.marked for row in comparison.rows] == [False, True]


def test_failed_samples_are_not_other_prompts(evaluated: Path) -> None:
    run, other = run_of(evaluated, "one"), run_of(evaluated, "other")
    (result,) = other.report["results"]
    result.update(samples=1, prompts=1, failures=[{"id": "task-1", "reason": "IndexError"}])
    found = compare([run, other])
    assert found.differences == (
        "task.jsonl at T=0 has not as many answers to the same prompts: 2 in one, 1 (1 failed) in other",
    )
    assert [row.marked for row in found.rows] == [False, True]


def test_a_task_only_some_runs_have_is_said(evaluated: Path) -> None:
    first = run_of(evaluated, "a")
    result = deepcopy(first.report["results"][0])
    comparison = compare([first, run_of(evaluated, "b", results__0={**result, "temperature": 1.0})])
    assert comparison.differences == (
        "task.jsonl at T=0 was not evaluated in b",
        "task.jsonl at T=1 was not evaluated in a",
    )
    assert len(comparison.rows) == 2


def test_another_machine_concerns_speed_alone(evaluated: Path) -> None:
    comparison = compare([run_of(evaluated, "a"), run_of(evaluated, "b", machine__device="a GPU")])
    assert comparison.differences == ()
    assert comparison.remarks[0].startswith("speed-ups are of different machines: machine.device differs")
    assert not any(row.marked for row in comparison.rows)


def test_the_report_command(copy: Path, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, smoke = str(copy / "evaluation-mine"), str(results(finished))
    assert main(["report", mine, smoke]) == 0
    shown = capsys.readouterr().out
    assert "mine (dflash)" in shown
    assert "quickstart-dflash (dflash) *" in shown
    assert "held-out at T=0, batch 1 was not evaluated in mine" in shown
    assert main(["report", mine, smoke, "--output", "table.md"]) == 0
    page = (copy / "table.md").read_text()
    assert "**Not all rows are comparable**" in page
    capsys.readouterr()
    assert main(["report", mine, mine, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["run"] for row in rows] == [mine, mine]
    # By run file: its folder is where the file says.
    run_file = copy / "run.toml"
    text = finished.read_text().replace('output = "runs/quickstart-dflash"', f'output = "{results(finished)}"')
    run_file.write_text(text)
    assert main(["report", str(run_file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["run"] == "quickstart-dflash"
    refused(capsys, ["report", "nowhere"], "There is nothing to report", "nowhere", "evaluate stage")
