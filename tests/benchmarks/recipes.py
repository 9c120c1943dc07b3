"""Recipes side by side at equal training compute: what each lever gives in accepted length, and for what draft time.

    python tests/benchmarks/recipes.py --output runs/recipes [--seeds 42 43 44] [--only dspark dspark+ce] [--plan]

A row is a published run file of examples/quickstart with levers (recipe_levers.py). One optimizer step of a row takes
what `deepspec estimate` counts for samples of --tokens tokens: the target's forward pass, the draft's both passes, the
loss's products and the optimizer's. A row has as many steps as make its total that of the row `--reference` with
--steps. Anchors count as drawn, so a row with more of them than a sample has room for is charged too much.

Within a seed all rows have the same prompts, the same held-out prompts and, unless a lever changes the answers or the
taps, the same answers and features. Each row is compared with its drafter as published, or with the row --against,
prompt by prompt, with a 95% interval of the difference. Beside it stands the draft's own time a round, and the tokens
committed per second of it.

Finished runs are kept, and an interrupted one goes on where it was, so the table may be made row by row, and by several
calls at once if they make different rows; recipes.json and the tables have every finished run of the output folder.
Before anything runs, each of these must have the settings that its row has now; otherwise the call ends.

With --run-files DIR the published recipes are DIR/dspark.toml and so on, for a target and data of your own, as
`deepspec init --recipe published` writes them. Give --tokens, the average length of your samples, and --steps. Levers
set the same values there as for the quickstart, so take those whose values fit. --set changes the recipe that all rows
start from; a lever overrules it.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import asdict
from drafters import run, share
from recipe_levers import QUICKSTART, parts, predicted, rows, run_file, settings
from recipe_tables import tables, where

from deepspec_core.config.load import load_run_file
from deepspec_core.errors import DeepSpecError
from deepspec_core.evaluation.paired import NoDifference, paired_difference
from deepspec_core.pipeline.estimating import estimate
from deepspec_core.pipeline.recorded_rounds import recorded_rounds
from deepspec_core.pipeline.run import Run
from deepspec_core.plugins.discovery import Plugins, load_plugins

STAGES = ("regenerate", "cache")
OWN_KEYS = (
    "run.output", "run.seed", "run.threads", "train.max_steps", "train.epochs", "evaluate.limit", "evaluate.plain",
)  # fmt: skip
# What is shared only by rows that have the same settings of these beginnings. Answers do not depend on the taps, but
# the record of their stage has them, so a row with other taps makes the same answers again.
NOT_SHARED = ("regenerate.", "data.", "target.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--against", metavar="ROW", help="what rows are compared with; default: as published")
    parser.add_argument("--run-files", type=Path, default=QUICKSTART, metavar="DIR", help="the published recipes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--only", nargs="+", default=rows(), metavar="ROW", help="drafter+lever+..., default: all")
    parser.add_argument("--reference", default="dspark", metavar="ROW", help="the row that has --steps steps")
    parser.add_argument("--steps", type=positive, default=942)
    parser.add_argument("--tokens", type=positive, default=79, help="tokens of a sample, on average; the quickstart's")
    parser.add_argument("--prompts", type=positive, default=100, help="held-out prompts each run is evaluated on")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="of the recipe of every row")
    parser.add_argument("--plan", action="store_true", help="print what each row would take, and run nothing")
    options = parser.parse_args(arguments)
    plugins = load_plugins()
    for one in options.overrides:
        if (key := one.partition("=")[0].strip()) in OWN_KEYS:
            sys.exit(f"--set {key}: the comparison sets it itself; see --help")
    for row in (options.reference, *options.only, *filter(None, [options.against])):
        changes_something(row, options.run_files.resolve(), options.overrides, plugins)
    ruler = Ruler(plugins, options)
    if options.plan:
        print(plan(ruler, options.only))
        return
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    begin(output / "recipes.json", ruler)
    made = {(one["row"], one["seed"]) for one in finished(output, ruler)}
    missing = [seed for seed in options.seeds if (options.against, seed) not in made]
    if options.against is not None and options.against not in options.only and missing:
        sys.exit(
            f"--against {options.against}: there is no finished run of seed {missing[0]}; name the row in --only too"
        )
    for seed in options.seeds:
        for row in options.only:
            folder = output / f"{row}-seed{seed}"
            share_stages(output, row, seed)
            run(ruler.run_file(row), ruler.settings(row, folder, seed))
            found, differing = write(output, ruler)
    print(tables(found, differing))


def positive(text: str) -> int:
    """A number above 0."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def write(output: Path, ruler: Ruler) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Write recipes.json with every run that is finished now. One call at a time looks and writes."""
    with (output / ".recipes.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = finished(output, ruler)
        differing = differences(output, found, ruler.options.against)
        written = {"ruler": ruler.as_json(), "runs": found, "differences": differing}
        replace(output / "recipes.json", json.dumps(written, indent=1) + "\n")
    return found, differing


def changes_something(row: str, folder: Path, overrides: Sequence[str], plugins: Plugins) -> None:
    """Exits for a run file of another draft type, and where a lever changes nothing, as of a recommended recipe."""
    drafter, levers = parts(row)
    path = run_file(row, folder)
    published = load_run_file(path, overrides=overrides, plugins=plugins)
    if published.draft.type != drafter:
        sys.exit(f"{path} is of the draft type {published.draft.type}, not {drafter}")
    for lever in levers:
        changed = (*overrides, *settings(f"{drafter}+{lever}", 942))
        if load_run_file(path, overrides=changed, plugins=plugins) == published:
            sys.exit(
                f"{path}: {lever} changes nothing; start from the published recipe (deepspec init --recipe published)"
            )


class Ruler:
    """Equal compute: what a step of a row takes, and how many steps it therefore has."""

    def __init__(self, plugins: Plugins, options: argparse.Namespace) -> None:
        self.plugins, self.options = plugins, options
        self._flops: dict[str, dict[str, int]] = {}
        self.budget = sum(self.flops(options.reference).values()) * options.steps

    def run_file(self, row: str) -> Path:
        """The published recipe that a row starts from."""
        return run_file(row, self.options.run_files.resolve())

    def flops(self, row: str) -> dict[str, int]:
        """Of one optimizer step, by part. The target counts as run in every step, although the quickstart caches it."""
        if row not in self._flops:
            path, opt = self.run_file(row), self.options
            online = ('features.mode="online"', 'run.stages=["train"]', f"data.max_length={opt.tokens}")
            # No lever's cost depends on the number of steps.
            changed = (*opt.overrides, *settings(row, opt.steps), *online)
            file = load_run_file(path, overrides=changed, plugins=self.plugins)
            self._flops[row] = dict(estimate(Run(file=file, path=path, plugins=self.plugins)).flops)
        return self._flops[row]

    def steps(self, row: str) -> int:
        """As many as come nearest to the budget."""
        return max(1, round(self.budget / sum(self.flops(row).values())))

    def settings(self, row: str, folder: Path, seed: int) -> list[str]:
        """Everything that a row's run changes of its run file."""
        steps = self.steps(row)
        return [
            f"run.output={json.dumps(str(folder))}",
            f"run.seed={seed}",
            f"run.threads={self.options.threads}",
            f"train.max_steps={steps}",
            "train.epochs=100000",
            f"evaluate.limit={self.options.prompts}",
            "evaluate.plain=false",
            *self.options.overrides,
            *settings(row, steps),
        ]

    def require_same(self, row: str, folder: Path, seed: int) -> None:
        """Exits where the run of `folder` was made with other settings than the row has now."""
        made = load_run_file(
            folder / "config.toml", overrides=[f"run.output={json.dumps(str(folder))}"], plugins=self.plugins
        )
        now = load_run_file(self.run_file(row), overrides=self.settings(row, folder, seed), plugins=self.plugins)
        differing = [key for key in asdict(now, recurse=False) if getattr(made, key) != getattr(now, key)]
        if differing:
            steps = f" ({made.train.max_steps} steps, now {now.train.max_steps})" if "train" in differing else ""
            sections = ", ".join(f"[{key}]" for key in differing)
            sys.exit(f"{folder} was made with other settings in {sections}{steps}: choose another --output")

    def as_json(self) -> dict[str, Any]:
        opt = self.options
        names = ("reference", "steps", "tokens", "prompts", "overrides")
        own = opt.run_files.resolve() != QUICKSTART
        files = {path.name: self._digests(path) for path in sorted(opt.run_files.glob("*.toml"))} if own else {}
        return {"flops": self.budget, **{name: getattr(opt, name) for name in names}, "run_files": files}

    def _digests(self, path: Path) -> list[str | None]:
        """Of a run file, and of the data that it names. None for data on the Hub."""
        file = load_run_file(path, overrides=self.options.overrides, plugins=self.plugins)
        data = Run(file=file, path=path, plugins=self.plugins).data
        of_data = [data.source_digest(index, ask_hub=False) for index in range(len(data.options.sources))]
        return [hashlib.sha256(path.read_bytes()).hexdigest()[:16], *of_data]


def read(path: Path) -> dict[str, Any]:
    """A JSON object of this folder. Exits where it is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        sys.exit(f"{path} is damaged: remove it, or of a row its folder, and make it again")
    return found


def replace(path: Path, text: str) -> None:
    """Write a file whole: another call may read or write it at the same time."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def begin(path: Path, ruler: Ruler) -> None:
    """Write down the ruler of a new folder. Exits where there is another one, also of a call that began just now."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"ruler": ruler.as_json(), "runs": [], "differences": []}), encoding="utf-8")
    try:
        os.link(partial, path)
    except FileExistsError:
        same_ruler(path, ruler)
    finally:
        partial.unlink()


def same_ruler(path: Path, ruler: Ruler) -> None:
    """Exits where the folder's runs were measured otherwise."""
    now = json.loads(json.dumps(ruler.as_json()))
    before = read(path).get("ruler", {})
    if before != now:
        differing = ", ".join(f"{key} {before.get(key)} and {now[key]}" for key in now if before.get(key) != now[key])
        sys.exit(f"{path.parent} has runs with another ruler ({differing}): choose another --output")


def share_stages(output: Path, row: str, seed: int) -> None:
    """Give a row the answers and features of a finished row that would make the same ones."""
    folder = output / f"{row}-seed{seed}"
    for other in sorted(output.glob(f"*-seed{seed}")):
        name = other.name.rpartition("-seed")[0]
        if other == folder or not is_row(name) or of_shared_stages(row) != of_shared_stages(name):
            continue
        for stage in STAGES:
            if (other / stage / "stage.json").is_file() and complete(other / stage):
                share(other, folder, (stage,))


def of_shared_stages(row: str) -> list[str]:
    """The settings of a row that the shared stages read."""
    return [one for one in settings(row, 1) if one.startswith(NOT_SHARED)]


def complete(stage: Path) -> bool:
    return read(stage / "stage.json").get("complete") is True


def is_row(name: str) -> bool:
    try:
        parts(name)
    except SystemExit:
        return False
    return True


def finished(output: Path, ruler: Ruler) -> list[dict[str, Any]]:
    """The figures of every finished run of the folder, whichever call made it, in the order of the table."""
    found = []
    for folder in output.glob("*-seed*"):
        row, _, seed = folder.name.rpartition("-seed")
        if seed.isdecimal() and is_row(row) and (folder / "metrics.json").is_file():
            ruler.require_same(row, folder, int(seed))
            found.append({"row": row, "seed": int(seed), **figures(folder), "predicted": predicted(row)})
            found[-1]["flops"] = ruler.flops(row)
    order = {row: number for number, row in enumerate(rows())}
    return sorted(found, key=lambda one: (order.get(one["row"], len(order)), one["row"], one["seed"]))


def figures(folder: Path) -> dict[str, Any]:
    metrics, record = read(folder / "metrics.json"), read(folder / "train" / "stage.json")
    kept = (
        "task",
        "temperature",
        "samples",
        "rounds",
        "acceptance_length",
        "acceptance_length_interval",
        "conditional",
    )
    results = []
    for result in metrics["results"]:
        seconds = result["speculative"]["draft"] / result["rounds"]
        per_second = result["acceptance_length"] / seconds
        drafted = {"draft_seconds_per_round": seconds, "tokens_per_draft_second": per_second}
        results.append({**{key: result[key] for key in kept}, **drafted})
    return {
        "steps": record["summary"]["steps"],
        "train_seconds": record["seconds"],
        "trainable_parameters": metrics["draft"]["trainable_parameters"],
        "machine": metrics["machine"],
        "results": results,
    }


def differences(output: Path, found: Sequence[dict[str, Any]], against: str | None) -> list[dict[str, Any]]:
    """Each row's accepted length minus that of `against`, by seed, task and temperature, paired by prompts.

    None: minus that of its drafter as published.
    """
    made = {(one["row"], one["seed"]) for one in found}
    differing = []
    for one in found:
        other = against or parts(one["row"])[0]
        if one["row"] == other or (other, one["seed"]) not in made:
            continue
        for result in one["results"]:
            pair = (
                recorded_rounds(output / f"{row}-seed{one['seed']}", **where(result)).completions
                for row in (one["row"], other)
            )
            difference = paired_difference(*pair, seed=one["seed"])
            if isinstance(difference, NoDifference):
                sys.exit(f"{one['row']} and {other}, seed {one['seed']}: {difference.reason}: choose another --output")
            place = {
                "row": one["row"],
                "against": other,
                "seed": one["seed"],
                **{key: result[key] for key in ("task", "temperature")},
            }
            of = {"prompts": difference.prompts, "left_out": difference.left_out}
            differing.append({**place, "ahead": difference.value, "interval": list(difference.interval), **of})
    return differing


def plan(ruler: Ruler, names: Sequence[str]) -> str:
    """What each row takes: operations a step, and so many steps."""
    lines = ["| row | GFLOP a step | of them the target's | steps | predicted |", "|---|---|---|---|---|"]
    for row in names:
        flops = ruler.flops(row)
        cells = [row, f"{sum(flops.values()) / 1e9:.2f}", f"{flops['features'] / 1e9:.2f}", str(ruler.steps(row))]
        lines.append(f"| {' | '.join([*cells, predicted(row)])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except DeepSpecError as error:
        print(f"Error: {error.render()}", file=sys.stderr)
        sys.exit(error.exit_code)
