"""A whole run from Python: the same stages, folders and checks as on the command line, without its output.

Knows where a run's results are; pipeline/ runs the stages.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import field, frozen

from deepspec_core.config.load import RunFile, load_run_file, run_file_of
from deepspec_core.config.paths import no_path
from deepspec_core.evaluation.metrics_file import read_metrics
from deepspec_core.interface.arguments import flag_of, names_of, path_of
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.running import run_stages
from deepspec_core.pipeline.smoke import smoke as made_small
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.exits import no_exit

log = logging.getLogger("deepspec")


@frozen(kw_only=True)
class Training:
    """The results of a run.

    folder: The run's output.
    draft: The directory of the finished draft; None if neither this call nor an earlier one has trained it.
    steps: The number of optimizer steps; 0 if no train stage was asked for.
    figures: The last line of the training log, such as {"loss": ...}; empty if no train stage was asked for.
    metrics: The contents of metrics.json; None if no evaluate stage was asked for.
    stages: The summary of each stage that was asked for.
    """

    folder: Path
    draft: Path | None
    steps: int
    figures: dict[str, Any]
    metrics: dict[str, Any] | None = field(repr=False)
    stages: dict[str, dict[str, Any]] = field(repr=False)


@no_exit()
def train(
    run_file: RunFile | Mapping[str, Any] | str | os.PathLike[str],
    *,
    stages: Sequence[str] = (),
    force: Sequence[str] = (),
    smoke: bool = False,
    base: str | os.PathLike[str] = ".",
) -> Training:
    """Run the stages of a run file, or only those in `stages`. Finished stages are skipped.

    `run_file` is the path of a TOML file, a RunFile, or a dictionary as RunFile.from_dict takes it. For a RunFile or a
    dictionary, relative paths start at `base`. Interrupted stages resume. If a setting changed after a stage had
    results, the run is refused, unless `force` names the stage: its results are then discarded first. `smoke` makes
    every stage small.

    Runs in this process on one device. Messages go to the logger "deepspec". Raises the DeepSpecError that the command
    line would print.
    """
    smoke = flag_of(smoke, "smoke")
    plugins, base = load_plugins(), path_of(base, "base", expected="a folder")
    if (problem := no_path("the argument `base`", base)) is not None:
        raise problem
    stages, force = names_of(stages, "stages"), names_of(force, "force")
    if isinstance(run_file, RunFile):
        file, path = run_file, base / "run file"
    elif isinstance(run_file, Mapping):
        file, path = run_file_of(run_file, folder=base, plugins=plugins), base / "run file"
    else:
        path = path_of(run_file, "run_file", expected="the path of a run file, a RunFile, or a dictionary")
        file = load_run_file(path, plugins=plugins)
    run = Run(file=made_small(file) if smoke else file, path=path, plugins=plugins, smoke=smoke)
    summaries = run_stages(run, only=stages, force=force, say=log.info)
    trained, metrics, draft = summaries.get("train", {}), run.folder / "metrics.json", run.folder / "draft"
    return Training(
        folder=run.folder,
        draft=draft if draft.is_dir() else None,
        steps=trained.get("steps", 0),
        figures=trained.get("figures", {}),
        metrics=read_metrics(metrics) if "evaluate" in summaries else None,
        stages=summaries,
    )
