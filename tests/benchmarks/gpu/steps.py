"""The steps of an item: commands, each run once, one after another, within the minutes that are left.

A step that has passed is not run again: its record and its output stand in the output folder, NAME.json and NAME.log.
A step that would begin after the time is used up is left for the next call; one that outlasts its own limit is ended.
Knows commands and records. Does not know what they measure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from attrs import asdict, frozen

REPOSITORY = Path(__file__).parents[3]
# A try on a CPU may share it with much else.
_PATIENCE = 10
BENCHMARKS = REPOSITORY / "tests" / "benchmarks"


@frozen(kw_only=True)
class Step:
    """`arguments` of Python, run in the repository. `limit`: seconds. `figures`: reads what it wrote, for the table."""

    name: str
    arguments: Sequence[str]
    limit: float
    figures: Callable[[], dict[str, Any]] = dict


@frozen(kw_only=True)
class Options:
    """What every item's script takes."""

    output: Path
    tiny: bool
    minutes: float
    device: str


def options_of(description: str | None, arguments: Sequence[str] | None = None) -> Options:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="for records and logs; finished steps are kept")
    parser.add_argument("--minutes", type=float, default=10.0, help="no step begins after them")
    parser.add_argument("--tiny", action="store_true", help="sizes for a try on a CPU: figures mean nothing")
    parser.add_argument("--device", default=None, help="default: cuda, or cpu with --tiny")
    found = parser.parse_args(arguments)
    found.output.mkdir(parents=True, exist_ok=True)
    device = found.device or ("cpu" if found.tiny else "cuda")
    return Options(output=found.output.resolve(), tiny=found.tiny, minutes=found.minutes, device=device)


def run(steps: Sequence[Step], options: Options) -> int:
    """Run the steps that are missing, print a table of all, and return how many have not passed."""
    deadline = time.monotonic() + 60 * options.minutes
    records = [_record(step, options, deadline) for step in steps]
    print(table(records))
    return sum(record["outcome"] != "passed" for record in records)


def _record(step: Step, options: Options, deadline: float) -> dict[str, Any]:
    path, log = options.output / f"{step.name}.json", options.output / f"{step.name}.log"
    known = asdict(step, filter=lambda attribute, _value: attribute.name in ("name", "arguments"))
    known["arguments"] = list(step.arguments)
    if path.is_file():
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if record["outcome"] == "passed" and all(record.get(name) == value for name, value in known.items()):
            return record
    left = deadline - time.monotonic()
    if left <= 0:
        return {**known, "outcome": "no time left", "seconds": 0.0, "figures": {}}
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                [sys.executable, *step.arguments],
                cwd=REPOSITORY,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=step.limit * (_PATIENCE if options.tiny else 1),
                check=False,
            ).returncode
            outcome = "passed" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            outcome = "ended at its limit"
    seconds = time.monotonic() - start
    figures = step.figures() if outcome == "passed" else {}
    record = {**known, "outcome": outcome, "seconds": round(seconds, 1), "figures": figures}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{step.name}: {outcome} after {seconds:.0f} s; {log}", flush=True)
    return record


def table(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a step, its figures in words."""
    lines = ["| step | outcome | seconds | figures |", "|---|---|---|---|"]
    for record in records:
        figures = ", ".join(f"{name} {_short(value)}" for name, value in record["figures"].items())
        lines.append(f"| {record['name']} | {record['outcome']} | {record['seconds']:g} | {figures} |")
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
