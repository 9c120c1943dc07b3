"""Confidences in an evaluation's results: judged where a draft gives them, left out where it does not."""

import json
from pathlib import Path

from deepspec_core.cli.main import main


def test_a_draft_that_judges_its_tokens_is_judged(judged_run: Path) -> None:
    report = json.loads((judged_run / "metrics.json").read_text())
    for result in report["results"]:
        positions = result["confidence"]["positions"]
        assert positions[0]["rounds"] == result["rounds"] > 0
        assert [position["accepted"] for position in positions] == result["marginal"]
        assert result["confidence"]["ece_bins"] == 20
        assert 0 < result["confidence"]["ece"] < 1
    page = (judged_run / "report.md").read_text()
    assert "## Confidence beside acceptance" in page
    rows = [line for line in page.splitlines() if line.startswith("| task.jsonl |") or "/task.jsonl |" in line]
    assert sum("| all |" in row for row in rows) == 2


def test_a_cut_proposal_is_no_fair_sample(judged_copy: Path) -> None:
    config = judged_copy / "config.toml"
    text = config.read_text().replace("confidence_threshold = 0.0", "confidence_threshold = 0.2")
    text = text.replace(f'output = "{_output(text)}"', 'output = "cut"')
    Path("cut.toml").write_text(text)
    assert main(["run", "cut.toml"]) == 0
    report = json.loads(Path("cut/metrics.json").read_text())
    assert all("confidence" not in result for result in report["results"])
    assert "Not judged, because proposals were cut at a confidence of 0.2." in Path("cut/report.md").read_text()


def test_a_draft_without_confidence_has_no_figures(finished: Path) -> None:
    folder = finished.parent / "runs" / "quickstart-dflash-smoke"
    report = json.loads((folder / "metrics.json").read_text())
    assert all("confidence" not in result for result in report["results"])
    assert "Confidence" not in (folder / "report.md").read_text()


def _output(text: str) -> str:
    return next(line.split('"')[1] for line in text.splitlines() if line.startswith("output"))
