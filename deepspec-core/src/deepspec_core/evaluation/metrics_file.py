"""Writes metrics.json of a run, and reads it as a file that somebody may have edited, or that is half written.

This file knows the version of metrics.json, and what a file of an older version has at least. The meaning and the
values of each part are in metrics.schema.json beside this file. This file does not know what is made of the figures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from deepspec_core.errors import StageError
from deepspec_core.evaluation.schema_check import first_fault
from deepspec_core.evaluation.sealed_json import write_json
from deepspec_core.json_files import read_object

NAME: Final = "metrics.json"
VERSION: Final = 1
SCHEMA: Final = Path(__file__).with_name("metrics.schema.json")
_FIX: Final = "Evaluate again with --force evaluate."
_PARTS: Final = {"run": str, "draft": dict, "target": dict, "settings": dict, "machine": dict, "results": list}
_OF_A_RESULT: Final = (
    "task",
    "temperature",
    "samples",
    "acceptance_length",
    "acceptance_length_interval",
    "marginal",
    "conditional",
)


def schema() -> dict[str, Any]:
    """The JSON Schema of the files that are written."""
    loaded: dict[str, Any] = json.loads(SCHEMA.read_text(encoding="utf-8"))
    return loaded


def write_metrics(path: Path, report: Mapping[str, Any]) -> None:
    """Write the report, which has its version. The file appears only when all of it is written."""
    write_json(path, report)


def read_metrics(path: Path) -> dict[str, Any]:
    """The report in the file. A report from before there were versions is converted to the present form.

    Raises StageError if the file is damaged or has an unknown version, and FileNotFoundError if it is missing.
    """
    report = read_object(path, kind=StageError, strict=False, fix=_FIX)
    version = report.get("version", VERSION)
    if type(version) is not int or version != VERSION:
        raise StageError(
            f"{path.name} is of a version that this deepspec-core does not know",
            where=path,
            found=f"version {version!r}"[:80],
            expected=f"version {VERSION}, or none, as files had before",
            fix=f"Install the deepspec-core that wrote it, or: {_FIX}",
        )
    for part, kind in _PARTS.items():
        if not isinstance(report.get(part), kind):
            raise _damaged(path, f"{part} = {report.get(part)!r}"[:80])
    for index, result in enumerate(report["results"]):
        missing = [name for name in _OF_A_RESULT if not isinstance(result, dict) or name not in result]
        if missing:
            raise _damaged(path, f"results[{index}] without {missing[0]}")
    complete = "version" in report
    report = report if complete else _as_of_today(report)
    if (fault := first_fault(report, schema(), complete=complete)) is not None:
        raise _damaged(path, fault)
    return report


def results_of(path: Path, revision: str) -> list[dict[str, Any]]:
    """The results in the file if they belong to the draft with this fingerprint; else an empty list.

    Raises the same errors as read_metrics.
    """
    report = read_metrics(path)
    return list(report["results"]) if report["draft"].get("revision") == revision else []


def _as_of_today(report: dict[str, Any]) -> dict[str, Any]:
    """Convert a report from before there were versions to the present form.

    Such a report has one batch size, among its settings. For an output that differs from plain decoding's, it has the
    id alone.
    """
    settings = dict(report["settings"])
    size = {"batch_size": settings.pop("batch_size")} if "batch_size" in settings else {}
    results = [{**one, **size, "mismatches": _partings(one.get("mismatches", []))} for one in report["results"]]
    return {**report, "settings": settings, "results": results}


def _partings(mismatches: object) -> object:
    return [{"id": name} for name in mismatches] if isinstance(mismatches, list) else mismatches


def _damaged(path: Path, found: str) -> StageError:
    return StageError(
        f"{path.name} is damaged", where=path, found=found, expected="the report as it was written", fix=_FIX
    )
