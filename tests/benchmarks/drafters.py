"""Accepted length of the quickstart's drafters, side by side: equal data, steps and block size, several seeds.

    python tests/benchmarks/drafters.py --output runs/drafters [--seeds 42 43 44] [--only dflash eagle3]

For each seed the first configuration regenerates and caches; the others take its answers and features. A configuration
is a run file of examples/quickstart with overrides. Finished runs are kept, so an interrupted benchmark goes on where
it was. Writes drafters.json (every run's metrics.json, summarised) and prints the tables of RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
# Name -> (run file, overrides).
CONFIGURATIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "dflash": ("dflash.toml", ()),
    "dspark": ("dspark.toml", ('draft.confidence_gradient="through"',)),
    "dspark, confidence gradient stopped": ("dspark.toml", ('draft.confidence_gradient="stop"',)),
    "eagle3": ("eagle3.toml", ()),
    # Not the algorithm's loss: DFlash's, to tell the heads from the loss.
    "dspark, cross-entropy": (
        "dspark.toml",
        ('draft.confidence_gradient="stop"', "loss.terms={ce=1.0,confidence=1.0}"),
    ),
}
SHARED_STAGES = ("regenerate", "cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts each run is evaluated on")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="passed on to every run")
    options = parser.parse_args()
    runs = []
    for seed in options.seeds:
        first: Path | None = None
        for name in options.only:
            run_file, overrides = CONFIGURATIONS[name]
            folder = options.output.resolve() / f"{name.replace(', ', '-').replace(' ', '-')}-seed{seed}"
            if first is not None:
                share(first, folder)
            first = first or folder
            settings = [
                f'run.output="{folder}"',
                f"run.seed={seed}",
                f"run.threads={options.threads}",
                f"evaluate.limit={options.prompts}",
                *overrides,
                *options.overrides,
            ]
            run(QUICKSTART / run_file, settings)
            runs.append({"configuration": name, "seed": seed, **figures(folder)})
    out = options.output / "drafters.json"
    out.write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    print(tables(runs))


def share(source: Path, folder: Path, stages: Sequence[str] = SHARED_STAGES) -> None:
    """Give a run the answers and features of another, by hard links: the same files, each with its stage's record.

    A stage's folder appears only when all of it is there.
    """
    for stage in stages:
        if not (folder / stage).exists():
            partial = folder / f".{stage}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source / stage, partial, copy_function=os.link)
            partial.rename(folder / stage)


def run(run_file: Path, settings: list[str]) -> None:
    command = [sys.executable, "-m", "deepspec_core", "run", str(run_file)]
    done = subprocess.run([*command, *(word for setting in settings for word in ("--set", setting))], check=False)
    if done.returncode:
        sys.exit(done.returncode)  # it has said why


def figures(folder: Path) -> dict[str, Any]:
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    record = json.loads((folder / "train" / "stage.json").read_text(encoding="utf-8"))
    kept = ("temperature", "samples", "rounds", "acceptance_length", "acceptance_length_interval", "conditional")
    return {
        "steps": record["summary"]["steps"],
        "train_seconds": record["seconds"],
        "trainable_parameters": metrics["draft"]["trainable_parameters"],
        "machine": metrics["machine"],
        "results": [{key: result[key] for key in kept} for result in metrics["results"]],
    }


def tables(runs: list[dict[str, Any]]) -> str:
    """Accepted length per seed and their mean; conditional acceptance by position, mean over seeds."""
    lines = []
    for index, result in enumerate(runs[0]["results"]):
        lines += ["", f"Temperature {result['temperature']:g}:", ""]
        seeds = sorted({run["seed"] for run in runs})
        positions = len(result["conditional"])
        heads = [*(f"seed {seed}" for seed in seeds), "mean", *(f"position {k + 1}" for k in range(positions))]
        lines += [f"| drafter | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
        for name in dict.fromkeys(run["configuration"] for run in runs):
            found = [run["results"][index] for run in runs if run["configuration"] == name]
            lengths = [one["acceptance_length"] for one in found]
            by_position = [statistics.mean(one["conditional"][k] for one in found) for k in range(positions)]
            cells = [*(f"{value:.3f}" for value in (*lengths, statistics.mean(lengths)))]
            lines.append(f"| {name} | {' | '.join([*cells, *(f'{100 * rate:.1f} %' for rate in by_position)])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
