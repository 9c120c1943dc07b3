"""metrics.json: its JSON Schema is documented, old files are read, unknown versions are refused by every reader."""

import json
import shutil
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from deepspec_core.cli.main import main
from deepspec_core.evaluation.metrics_file import VERSION, schema
from deepspec_core.evaluation.metrics_reference import markdown
from deepspec_core.evaluation.schema_check import first_fault

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


# Each of the key it is put in place of; None of a key that has to be there is refused too.
WRONG: tuple[Any, ...] = ("x", -5, 2.5, [2.0, "a"], True, None)


def places(node: Any, *keys: Any) -> Iterator[tuple[Any, ...]]:
    """The path of every key; of lists the first element's."""
    pairs = node.items() if isinstance(node, dict) else list(enumerate(node))[:1] if isinstance(node, list) else []
    for key, inner in pairs:
        yield (*keys, key)
        yield from places(inner, *keys, key)


def shortened(node: Any) -> Any:
    """The same with one element of each list of tables."""
    if isinstance(node, dict):
        return {key: shortened(inner) for key, inner in node.items()}
    return [shortened(node[0])] if isinstance(node, list) and node and isinstance(node[0], dict) else node


def test_what_the_schema_refuses_is_refused(judged_run: Path) -> None:
    report = shortened(json.loads((judged_run / "metrics.json").read_text()))
    whole = schema()
    validator = Draft202012Validator(whole)
    assert first_fault(report, whole) is None
    seen = 0
    for *above, key in list(places(report)):
        parent = reduce(getitem, above, report)
        was = parent[key]
        for value in WRONG:
            parent[key] = value
            assert (first_fault(report, whole) is None) == validator.is_valid(report), (*above, key, value)
            seen += 1
        parent[key] = was
        if isinstance(key, str):
            del parent[key]
            assert (first_fault(report, whole) is None) == validator.is_valid(report), (*above, key)
            parent[key] = was
    assert seen > 500


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("acceptance_length", "x"),
        ("temperature", "0"),
        ("speculative", 5),
        ("samples", "x"),
        ("confidence", 5),
        ("by_context", 7),
        ("mismatches", [1]),
        ("failures", 3),
        ("marginal", [2.0, "a"]),
    ],
)
@pytest.mark.parametrize("version", [VERSION, None])
def test_a_damaged_figure_is_told(
    judged_copy: Path, name: str, value: Any, version: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads((judged_copy / "metrics.json").read_text())
    report["results"][0][name] = value
    changed(judged_copy, version=version, results=report["results"])
    assert main(["report", "run"]) == 2
    seen = capsys.readouterr().err
    assert "metrics.json is damaged" in seen
    assert f"results[0].{name}" in seen
    assert "Traceback" not in seen
