"""metrics.json: its JSON Schema is documented, old files are read, unknown versions are refused by every reader."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from deepspec_core.cli.main import main
from deepspec_core.evaluation.metrics_file import VERSION, schema
from deepspec_core.evaluation.metrics_reference import markdown

PAGE = Path(__file__).parents[1] / "docs" / "metrics-file.md"


def changed(folder: Path, **values: Any) -> None:
    """Put these values into metrics.json; None removes the key."""
    path = folder / "metrics.json"
    report = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in report.items() if value is not None}))


def test_the_page_has_every_key() -> None:
    assert PAGE.read_text(encoding="utf-8") == markdown(), "make docs/metrics-file.md again from metrics_reference.py"


def test_the_schema_is_one_and_takes_what_is_written(judged_run: Path) -> None:
    Draft202012Validator.check_schema(schema())
    report = json.loads((judged_run / "metrics.json").read_text())
    validator = Draft202012Validator(schema())
    assert report["version"] == VERSION
    assert list(validator.iter_errors(report)) == []
    assert list(validator.iter_errors({**report, "extra": 1})) != []
    assert list(validator.iter_errors({**report, "version": VERSION + 1})) != []
    report["results"][0]["acceptance_length"] = "long"
    assert list(validator.iter_errors(report)) != []


@pytest.mark.parametrize(
    "command", [["report", "run"], ["simulate", "run", "--profile", "none.json"], ["calibrate", "run"]]
)
@pytest.mark.parametrize("version", [VERSION + 1, "1", True])
def test_readers_refuse_an_unknown_version(
    judged_copy: Path, command: list[str], version: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(judged_copy, version=version)
    assert main(command) == 2
    seen = capsys.readouterr().err
    for part in (
        "metrics.json is of a version",
        f"version {version!r}",
        f"expected: version {VERSION}",
        "--force evaluate",
    ):
        assert part in seen, seen
    assert "Traceback" not in seen


def test_files_of_before_there_were_versions_are_read(judged_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They have one batch size, among the settings, and are compared with those of today."""
    shutil.copytree(judged_copy, "today")
    report = json.loads((judged_copy / "metrics.json").read_text())
    size = {one.pop("batch_size") for one in report["results"]}.pop()
    changed(judged_copy, version=None, settings={**report["settings"], "batch_size": size}, results=report["results"])
    assert main(["report", "today", "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differences"] == []
    assert [row["batch_size"] for row in found["rows"]] == [3] * 4
    assert main(["calibrate", "run"]) == 0
