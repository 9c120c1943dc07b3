"""`deepspec simulate`: what it writes of a real evaluation and a real cost table, and what it refuses."""

import json
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from deepspec_core.cli.main import main
from deepspec_core.evaluation.sealed_json import write_sealed

PROFILE = ["--batch-size", "1", "--batch-size", "2", "--draft-tokens", "7", "--context", "8", "--repeats", "3"]


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("profile") / "table.json"
    assert main(["profile", "builtin:tiny-qwen3", *PROFILE, "--out", str(path)]) == 0
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *parts: str) -> None:
    capsys.readouterr()
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for part in parts:
        assert part in message, f"{part!r} is not in:\n{message}"
    assert not Path("run/simulation.json").exists()


def test_every_policy_at_every_profiled_load(
    judged_copy: Path, profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "run", "--profile", profile]) == 0
    shown = capsys.readouterr().out
    assert "The draft's time is not counted" in shown
    assert "asynchronous" in shown
    found = json.loads((judged_copy / "simulation.json").read_text())
    tokens = json.loads((judged_copy / "metrics.json").read_text())["draft"]["max_tokens"]
    names = ["none", *(f"fixed {k}" for k in range(1, tokens + 1)), "threshold 0.3", "threshold 0.5", "threshold 0.7"]
    names += ["scheduler", "asynchronous", "oracle"]
    assert [(one["requests"], one["policy"]) for one in found["results"]] == [
        (load, name) for load in (1, 2) for name in names
    ]
    assert all(
        one["tokens_per_second"] == pytest.approx(one["requests"] * one["tokens_per_second_per_user"])
        for one in found["results"]
    )
    assert found["rounds"]["temperature"] == 1
    assert found["cost_table"]["settings"]["context"] == 8
    assert found["version"] == 1


def test_the_picture_has_a_curve_for_each_kind_of_policy(
    judged_copy: Path, profile: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["simulate", "run", "--profile", profile]
    assert main(command) == 0
    assert "wrote run/simulation.svg" in capsys.readouterr().out
    text = Path("run/simulation.svg").read_text()
    name = "{http://www.w3.org/2000/svg}"
    whole = ElementTree.fromstring(text)
    words = [one.text for one in whole.iter(f"{name}text")]
    kinds = ["none", "fixed (the best)", "threshold (the best)", "scheduler", "asynchronous", "oracle"]
    assert [one for one in words if one in kinds] == kinds
    assert {"tokens per second of one user", "tokens per second of all requests", "1", "2"} <= set(words)
    # A mark for each of two loads and in the legend, none outside the axes.
    marks = [one for one in whole.iter(f"{name}use") if "tick" not in str(one.get("href"))]
    assert sum("stroke: var(--c" in str(one.get("style")) for one in marks) == len(kinds) * 3
    # Nothing is fetched, and every colour follows the reader's theme.
    assert text.count("http") == 1
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"(fill|stroke): #", text)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(command) == 0
    assert "no picture is drawn: a page's charts are drawn by matplotlib" in capsys.readouterr().err
    assert not Path("run/simulation.svg").exists()


def test_calibrated_confidences_are_used(judged_copy: Path, profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    # One threshold that unscaled and scaled confidences pass differently.
    command = ["simulate", "run", "--profile", profile, "--requests", "1", "--threshold", "0.4"]
    assert main(["calibrate", "run"]) == 0
    assert main([*command, "--out", "raw.json"]) == 0
    assert "was fitted on" not in capsys.readouterr().err
    assert main([*command, "--calibration", "run/calibration.json", "--out", "scaled.json"]) == 0
    assert "was fitted on the prompts of these rounds" in capsys.readouterr().err
    raw, scaled = (json.loads(Path(name).read_text()) for name in ("raw.json", "scaled.json"))
    assert raw["calibration"] is None
    assert (raw["calibration_fitted_here"], scaled["calibration_fitted_here"]) == (False, True)
    assert scaled["calibration"]
    at = next(index for index, one in enumerate(raw["results"]) if one["policy"].startswith("threshold"))
    assert raw["results"][at]["verified_per_step"] != scaled["results"][at]["verified_per_step"]
    assert raw["results"][:2] == scaled["results"][:2]


def test_a_noisy_cost_table_is_told(
    judged_copy: Path, profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = json.loads(Path(profile).read_text())
    for one in table["steps"]:
        one["seconds"] = 0.5 if (one["requests"], one["tokens"]) == (1, 2) else 0.1 * one["tokens"]
    content = {key: value for key, value in table.items() if key not in ("format", "version", "digest")}
    write_sealed(tmp_path / "noisy.json", content, form="deepspec-cost-table", version=1)
    command = ["simulate", "run", "--profile", str(tmp_path / "noisy.json"), "--requests"]
    assert main([*command, "1"]) == 0
    assert "1 of the steps took less time than a step of fewer tokens" in capsys.readouterr().err
    assert main([*command, "2"]) == 0
    assert "fewer tokens" not in capsys.readouterr().err


def test_a_cost_table_of_another_target_is_refused(
    judged_copy: Path, profile: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = judged_copy / "metrics.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps({**report, "target": {**report["target"], "revision": "another"}}))
    refused(capsys, ["simulate", "run", "--profile", profile], "is of another target", "another", "deepspec profile")
    path.write_text(json.dumps({**report, "target": {**report["target"], "dtype": "bfloat16"}}))
    refused(capsys, ["simulate", "run", "--profile", profile], "another number format", "bfloat16")


def test_other_mistakes(judged_copy: Path, profile: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["simulate", "run", "--profile", profile]
    refused(capsys, ["simulate", "run", "--profile", "none.json"], "the cost table is missing")
    refused(capsys, [*command, "--requests", "3"], "no step of so many requests", "1, 2")
    refused(capsys, [*command, "--threshold", "1.5"], "--threshold")
    for option in ("--threshold", "--draft-ms", "--temperature"):
        refused(capsys, [*command, option, "nan"], option, "nan is no finite number")
    refused(capsys, [*command, "--draft-ms", "inf"], "--draft-ms")
    refused(capsys, [*command, "--temperature", "inf"], "inf is no finite number")
    refused(capsys, [*command, "--calibration", "none.json"], "the calibration is missing")
    refused(capsys, [*command, "--out", "/proc/x/y.json"], "cannot be written to this place")
    evaluated = Path("run/metrics.json").read_text()
    refused(
        capsys,
        [*command, "--out", "run/metrics.json"],
        "is not the result of a simulation",
        "run/metrics.json",
    )
    assert Path("run/metrics.json").read_text() == evaluated
    Path("mine.svg").write_text("mine")
    refused(capsys, [*command, "--out", "mine.json"], "the file exists already", "mine.svg")
    assert Path("mine.svg").read_text() == "mine"
    refused(capsys, [*command, "--out", "new.svg"], "the picture of the result has this name")
    short = ["--batch-size", "1", "--draft-tokens", "1", "--context", "8", "--repeats", "3", "--out", "short.json"]
    assert main(["profile", "builtin:tiny-qwen3", *short]) == 0
    refused(capsys, ["simulate", "run", "--profile", "short.json"], "no step of so many tokens", "--draft-tokens")
    path = judged_copy / "metrics.json"
    report = json.loads(path.read_text())
    path.write_text(json.dumps({**report, "settings": {**report["settings"], "confidence_threshold": 0.2}}))
    refused(capsys, command, "were changed or cut by other settings", "confidence_threshold = 0.2")


def test_a_draft_without_confidences_has_fewer_policies(
    finished: Path, profile: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished.parent / "runs" / "quickstart-dflash-smoke"
    out = tmp_path / "result.json"
    assert main(["simulate", str(run), "--profile", profile, "--out", str(out)]) == 0
    assert "thresholds and schedulers are left out" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert not found["confidences"]
    assert {one["policy"].split()[0] for one in found["results"]} == {"none", "fixed", "oracle"}
