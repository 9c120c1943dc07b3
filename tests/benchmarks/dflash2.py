"""Accepted length of DFlash 2 on the quickstart, with and without each of its parts, beside DFlash and DSpark.

    pip install ./examples/plugins/deepspec-dflash2
    python tests/benchmarks/dflash2.py --output runs/dflash2-table [--seeds 42 43 44] [--only dflash dflash2]

Data, features, steps and tokens a round are the same within a seed, as in drafters.py: the first run of a seed
regenerates and caches, and the others take its answers and features. Finished runs are kept, and an interrupted one
goes on where it was, so the table may be made seed by seed: it has every run that is finished in the output folder.
Writes dflash2.json after each run, and prints the tables.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from drafters import QUICKSTART, figures, run, share, tables

DFLASH2 = Path(__file__).parents[2] / "examples" / "plugins" / "deepspec-dflash2" / "train.toml"
# Name -> (run file, overrides).
CONFIGURATIONS: dict[str, tuple[Path, tuple[str, ...]]] = {
    "dflash": (QUICKSTART / "dflash.toml", ()),
    "dspark": (QUICKSTART / "dspark.toml", ()),
    # DFlash's loss, to tell DSpark's heads from its loss.
    "dspark-cross-entropy": (
        QUICKSTART / "dspark.toml",
        ('draft.confidence_gradient="stop"', "loss.terms={ce=1.0,confidence=1.0}"),
    ),
    "dflash2": (DFLASH2, ()),
    "dflash2-without-conv": (DFLASH2, ("draft.conv_kernel_size=0",)),
    "dflash2-without-selector": (DFLASH2, ("draft.selector_top_k=0", "loss.terms={ce=1.0}")),
}
SEEDS = (42, 43, 44)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=100, help="held-out prompts each run is evaluated on")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="passed on to every run")
    options = parser.parse_args()
    output = options.output.resolve()
    for seed in options.seeds:
        for name in options.only:
            run_file, overrides = CONFIGURATIONS[name]
            shared = [folder for other in CONFIGURATIONS if is_cached(folder := folder_of(output, other, seed))]
            if shared and folder_of(output, name, seed) not in shared:
                share(shared[0], folder_of(output, name, seed))
            settings = [
                f'run.output="{folder_of(output, name, seed)}"',
                f"run.seed={seed}",
                f"run.threads={options.threads}",
                f"evaluate.limit={options.prompts}",
                "evaluate.plain=false",
            ]
            run(run_file, [*settings, *overrides, *options.overrides])
            runs = finished(output)
            (output / "dflash2.json").write_text(json.dumps({"runs": runs}, indent=1) + "\n", encoding="utf-8")
    print(tables(of_all_seeds(runs)))


def folder_of(output: Path, name: str, seed: int) -> Path:
    return output / f"{name}-seed{seed}"


def is_cached(folder: Path) -> bool:
    """Whether the stages that are shared have their records."""
    return all((folder / stage / "stage.json").is_file() for stage in ("regenerate", "cache"))


def finished(output: Path, names: Iterable[str] = CONFIGURATIONS) -> list[dict[str, Any]]:
    """Every finished run of the output folder, whichever call made it. `names`: of the configurations."""
    runs = [
        {"configuration": name, "seed": int(folder.name.rpartition("seed")[2]), **figures(folder)}
        for name in names
        for folder in sorted(output.glob(f"{name}-seed*"))
        if (folder / "metrics.json").is_file()
    ]
    if len({how_made(run) for run in runs}) > 1:
        sys.exit(f"{output} has runs of other steps, temperatures or numbers of prompts: choose another --output")
    return runs


def how_made(run: dict[str, Any]) -> tuple[Any, ...]:
    """What has to be equal for two runs to stand in one table."""
    return (run["steps"], *((result["temperature"], result["samples"]) for result in run["results"]))


def of_all_seeds(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of the configurations that have every seed; the others have no mean to compare yet."""
    seeds = {run["seed"] for run in runs}
    names = [run["configuration"] for run in runs]
    return [run for run in runs if names.count(run["configuration"]) == len(seeds)]


if __name__ == "__main__":
    main()
