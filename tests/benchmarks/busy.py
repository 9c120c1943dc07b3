"""A run on a busy machine: how much longer than idle it takes beside busy processes, and beside a second run.

    python tests/benchmarks/busy.py --output runs/busy [--repeats 3] [--set data.sources=...] [--deepspec COMMAND]

Each turn times the same run file three ways, one after the other: idle; beside one process per core that computes
without a pause; beside a second run of the same file. Give two or more `--deepspec` commands (of two environments) to
compare versions: they take turns. Writes busy.json (seconds of every run and stage) and prints medians and ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "dflash.toml"
STAGES = ("regenerate", "cache", "train", "evaluate")
WAYS = ("idle", "busy", "pair")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--run-file", type=Path, default=QUICKSTART)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--deepspec", action="append", help="default: deepspec-run")
    parser.add_argument(
        "--limit-seconds", type=float, default=1800, help="a run that takes longer is ended and counted"
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="passed on to every run")
    options = parser.parse_args()
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    times: list[dict[str, Any]] = []
    for _ in range(options.repeats):
        for way in options.ways:
            for command in options.deepspec or ["deepspec-run"]:
                times.append({"deepspec": command, "way": way, **timed(command, way, options, output)})
                report = {"machine": machine(), "overrides": options.overrides, "runs": times}
                (output / "busy.json").write_text(json.dumps(report, indent=1) + "\n")
                print(times[-1], flush=True)
    for command in options.deepspec or ["deepspec-run"]:
        print(command)
        medians = {way: median(times, command, way) for way in options.ways}
        for way, seconds in medians.items():
            against = f", {seconds / medians['idle']:.2f} of idle" if "idle" in medians else ""
            print(f"  {way}: {seconds:.0f} s{against}")


def timed(command: str, way: str, options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Seconds of one run (of a pair, the later one) and of its stages; `ended` where it took too long."""
    folders = [output / f"run-{number}" for number in range(2 if way == "pair" else 1)]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    overrides = [part for text in options.overrides for part in ("--set", text)]
    with busy_processes(len(os.sched_getaffinity(0)) if way == "busy" else 0):
        start = time.monotonic()
        runs = [
            subprocess.Popen(
                [command, str(options.run_file), "--set", f'run.output="{folder}"', *overrides],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for folder in folders
        ]
        ended = False
        for run in runs:
            try:
                code = run.wait(max(0.0, start + options.limit_seconds - time.monotonic()))
            except subprocess.TimeoutExpired:
                run.kill()
                ended = True
            else:
                if code != 0:
                    raise SystemExit(f"{command} ended with {code}")
        seconds = time.monotonic() - start
    stages = {name: record["seconds"] for name in STAGES if (record := stage_record(folders[-1] / name)) is not None}
    return {"seconds": seconds, "ended": ended, "stages": stages}


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """`count` processes that compute without a pause."""
    processes = [subprocess.Popen(["sh", "-c", "while :; do :; done"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def stage_record(folder: Path) -> Any:
    path = folder / "stage.json"
    return json.loads(path.read_text()) if path.exists() else None


def median(times: list[dict[str, Any]], command: str, way: str) -> float:
    return statistics.median(row["seconds"] for row in times if (row["deepspec"], row["way"]) == (command, way))


def machine() -> dict[str, Any]:
    return {"system": platform.platform(), "processor": platform.processor(), "cores": len(os.sched_getaffinity(0))}


if __name__ == "__main__":
    main()
