"""`deepspec calibrate`: what it writes, what it refuses, and that no output changes by it."""

import json
import shutil
from pathlib import Path

import pytest

from deepspec_core.cli.main import main
from deepspec_core.evaluation.calibration_file import read_calibration
from deepspec_core.evaluation.evaluator import recorded
from deepspec_core.locks import lock
from deepspec_core.pipeline.calibrating import LOCK


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *parts: str) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in:\n{message}"


def draft_of(run: Path) -> str:
    """A copy of the evaluated draft that a test may change, and metrics.json naming it."""
    path = run / "metrics.json"
    report = json.loads(path.read_text())
    shutil.copytree(report["draft"]["checkpoint"], "mine")
    report["draft"]["checkpoint"] = "mine"
    path.write_text(json.dumps(report))
    return "mine"


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_both_files_are_written(judged_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "run"]) == 0
    shown = capsys.readouterr().out
    assert "samples at temperature 1" in shown
    report = json.loads((judged_copy / "metrics.json").read_text())
    (result,) = (one for one in report["results"] if one["temperature"] == 1)
    own = json.loads((judged_copy / "calibration.json").read_text())
    assert own["version"] == 1
    assert own["draft"]["revision"] == report["draft"]["revision"]
    assert own["before"] == result["confidence"]
    assert own["fitted_on"]["rounds"] == result["rounds"]
    assert own["fitted_on"]["tasks"][0]["prompts_digest"] == result["prompts_digest"]
    assert len(own["temperatures"]) == report["draft"]["max_tokens"]
    # As SGLang reads it: one temperature above 0 for each draft token, and lists of errors.
    served = json.loads((judged_copy / "calibration.sglang.json").read_text())
    assert set(served) == {"temperatures", "dataset", "num_samples", "ece_before", "ece_after", "draft"}
    assert served["temperatures"] == own["temperatures"]
    assert served["draft"] == own["draft"]["revision"]
    assert served["ece_before"] == [position["ece"] for position in own["before"]["positions"]]
    assert not list(judged_copy.glob("*.partial"))


def test_the_two_files_are_never_of_two_fits(judged_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lock(judged_copy, name=LOCK, problem="", fix=""):
        refused(capsys, ["calibrate", "run"], "Another `deepspec calibrate` is writing here")
    assert not list(judged_copy.glob("calibration*"))
    assert main(["calibrate", "run"]) == 0


def test_rounds_are_chosen_by_task_and_temperature(judged_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "run", "--task", "task", "--temperature", "0"]) == 0
    assert "at temperature 0" in capsys.readouterr().out
    refused(capsys, ["calibrate", "run", "--task", "tusk"], "'tusk' was not evaluated", "task.jsonl")
    refused(capsys, ["calibrate", "run", "--temperature", "0.7"], "not evaluated", "0.7", "0, 1")


def test_what_cannot_be_calibrated_is_refused(judged_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["calibrate", "nowhere"], "There is no evaluation in this folder", "nowhere")
    journal = next((judged_copy / "evaluate").glob("*-t1.jsonl"))
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:-1]))
    refused(capsys, ["calibrate", "run"], "does not belong to metrics.json", "--force evaluate")
    journal.write_text(lines[0] + "".join(lines[1:]).replace('"confidence": [', '"confidence": ["x", '))
    refused(capsys, ["calibrate", "run"], "damaged", f"{journal.name}:2")
    edited = json.loads(lines[1])
    del edited["digest"]
    edited["completions"][0]["rounds"][0].update(accepted_draft_length=99, acceptance_length=100)
    journal.write_text("".join([lines[0], json.dumps(edited) + "\n", *lines[2:]]))
    for command in (["calibrate", "run"], ["simulate", "run", "--profile", "none.json"]):
        refused(capsys, command, "A line of a journal is damaged", f"{journal.name}:2", "99 of")
    assert not (judged_copy / "calibration.json").exists()


def test_cut_or_scaled_rounds_are_refused(judged_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = judged_copy / "metrics.json"
    report = json.loads(path.read_text())
    edit(path, settings={**report["settings"], "confidence_threshold": 0.3})
    refused(capsys, ["calibrate", "run"], "were changed or cut by other settings", "confidence_threshold = 0.3")
    edit(path, settings=report["settings"], draft={**report["draft"], "calibration": "abc"})
    refused(capsys, ["calibrate", "run"], "were changed or cut by other settings", "calibration = abc")


def test_a_draft_without_a_confidence_head_is_one_message(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished.parent / "runs" / "quickstart-dflash-smoke"
    refused(capsys, ["calibrate", str(run)], "gives no confidence to calibrate", "a draft with a confidence head")
    assert not (run / "calibration.json").exists()


def test_a_draft_that_changed_is_refused(judged_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Path(draft_of(judged_copy)) / "config.json"
    assert main(["calibrate", "run"]) == 0
    edit(config, num_anchors=5)
    refused(capsys, ["calibrate", "run"], "The draft changed since its evaluation", "--force evaluate")
    evaluate = ["evaluate", "--draft", "mine", "--target", "builtin:tiny-qwen3", "--task", "t.jsonl"]
    Path("t.jsonl").write_text(json.dumps({"turns": ["Hello?"]}) + "\n")
    calibrated = [*evaluate, "--out", "other", "--calibration", "run/calibration.json"]
    refused(capsys, calibrated, "of another draft, or the draft changed since", "deepspec calibrate")
    refused(capsys, [*evaluate, "--out", "other", "--calibration", "none.json"], "the calibration is missing")
    assert not Path("other").exists()


def test_a_draft_that_the_run_file_names_is_found_from_anywhere(
    judged_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path is one from the run file's folder, wherever a command starts later."""
    shutil.copytree(json.loads((judged_copy / "metrics.json").read_text())["draft"]["checkpoint"], "mine")
    (tmp_path / "conf").mkdir()
    shutil.copy(judged_copy / "config.toml", "conf/one.toml")
    changed = {"run.output": '"../results"', "evaluate.draft": '"../mine"', "evaluate.temperature": "[1.0]"}
    assert (
        main(["run", "conf/one.toml", *(word for key in changed for word in ("--set", f"{key}={changed[key]}"))]) == 0
    )
    assert json.loads(Path("results/metrics.json").read_text())["draft"]["checkpoint"] == "../mine"
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    for place in ("conf", "elsewhere/deep"):
        monkeypatch.chdir(tmp_path / place)
        assert main(["calibrate", str(tmp_path / "results")]) == 0


def test_an_edited_or_foreign_file_is_refused(judged_copy: Path) -> None:
    assert main(["calibrate", "run"]) == 0
    path = judged_copy / "calibration.json"
    good = path.read_text()
    revision = json.loads(good)["draft"]["revision"]
    positions = len(json.loads(good)["temperatures"])
    assert len(read_calibration(path, draft_revision=revision, positions=positions).temperatures) == positions
    for changes, says in (
        ({"temperatures": [2.0] * positions}, "edited"),
        ({"version": 2}, "of another kind"),
        ({"format": "something"}, "of another kind"),
        ({"digest": None}, "edited"),
    ):
        path.write_text(good)
        edit(path, **changes)
        with pytest.raises(Exception, match=says):
            read_calibration(path, draft_revision=revision, positions=positions)
    path.write_text(good)
    with pytest.raises(Exception, match="does not fit"):
        read_calibration(path, draft_revision=revision, positions=positions + 1)


def test_no_output_changes_by_a_calibration(judged_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same tokens at both temperatures; only the confidences are other ones, and metrics.json says so."""
    assert main(["calibrate", "run"]) == 0
    text = (judged_copy / "config.toml").read_text()
    output = next(line for line in text.splitlines() if line.startswith("output"))
    text = text.replace(output, 'output = "scaled"').replace(
        "[evaluate]\n", '[evaluate]\ncalibration = "run/calibration.json"\n'
    )
    Path("scaled.toml").write_text(text)
    assert main(["run", "scaled.toml"]) == 0
    for name in ("t0", "t1"):
        (before,), (after,) = (list(Path(folder).glob(f"evaluate/*-{name}.jsonl")) for folder in ("run", "scaled"))
        old, new = (
            [completion for group in recorded(path)[1] for completion in group.completions] for path in (before, after)
        )
        assert [one.output_ids for one in old] == [one.output_ids for one in new]
        assert [one.rounds for one in old] != [one.rounds for one in new]
    report = json.loads(Path("scaled/metrics.json").read_text())
    assert report["draft"]["calibration"]
    (result,) = (one for one in report["results"] if one["temperature"] == 1)
    after = json.loads((judged_copy / "calibration.json").read_text())["after"]
    assert result["confidence"]["ece"] == pytest.approx(after["ece"], abs=1e-4)
    # It was fitted on these prompts, and that is no measure of it.
    assert "fitted on these same prompts" in capsys.readouterr().err
    assert result["calibration_fitted_here"] is True
    assert "fitted on these prompts" in Path("scaled/report.md").read_text()
    # Another calibration under finished results is noticed.
    assert main(["calibrate", "run", "--temperature", "0"]) == 0
    assert main(["run", "scaled.toml"]) == 2
