"""A whole run from Python: the same stages, folders and refusals as on the command line, without its output.

Knows where a run's results lie; what stages do is pipeline/'s.
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

log = logging.getLogger("deepspec")


@frozen(kw_only=True)
class Training:
    """What a run left behind. `folder` is its output, `draft` the directory of the finished draft.

    `steps`: optimizer steps. `figures`: the last line of the training log, such as {"loss": ...}. `metrics`: what the
    evaluate stage wrote to metrics.json. `stages`: the summary of each stage that was asked for. Without a train stage
    among them `draft` is None where no earlier run left one, `steps` 0 and `figures` empty; without an evaluate stage
    `metrics` is None.
    """

    folder: Path
    draft: Path | None
    steps: int
    figures: dict[str, Any]
    metrics: dict[str, Any] | None = field(repr=False)
    stages: dict[str, dict[str, Any]] = field(repr=False)


def train(
    run_file: RunFile | Mapping[str, Any] | str | os.PathLike[str],
    *,
    stages: Sequence[str] = (),
    force: Sequence[str] = (),
    smoke: bool = False,
    base: str | os.PathLike[str] = ".",
) -> Training:
    """Do the stages of a run file, or only those in `stages`, as far as they are not done.

    `run_file` is the path of a TOML file, or a RunFile, or a dictionary as RunFile.from_dict takes it; of the latter
    two, relative paths start at `base`. Finished stages are skipped, interrupted ones resume, and a setting that
    changed under results is refused; `force` discards the results of stages first. `smoke` makes every stage small.

    Runs in this process on one device; messages go to the logger "deepspec". Raises DeepSpecError as the command line
    would report it.
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
