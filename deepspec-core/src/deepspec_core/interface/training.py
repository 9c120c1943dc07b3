"""A whole run from Python: the same stages, folders and refusals as on the command line, without its output.

Knows where a run's results lie; what stages do is pipeline/'s.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from deepspec_core.config.load import load_run_file
from deepspec_core.config.schema import RunFile
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.running import run_stages
from deepspec_core.pipeline.smoke import smoke as made_small
from deepspec_core.plugins.discovery import load_plugins

log = logging.getLogger("deepspec")


@frozen(kw_only=True)
class Training:
    """What a run left behind. `folder` is its output; `draft` the directory of the finished draft.

    `steps`: optimizer steps. `figures`: the last line of the training log, such as {"loss": ...}. `metrics`: what the
    evaluate stage wrote to metrics.json, None where the run has no such stage. `stages`: each stage's own summary.
    """

    folder: Path
    draft: Path
    steps: int
    figures: dict[str, Any]
    metrics: dict[str, Any] | None
    stages: dict[str, dict[str, Any]]


def train(
    run_file: RunFile | str | os.PathLike[str],
    *,
    stages: Sequence[str] = (),
    force: Sequence[str] = (),
    smoke: bool = False,
    base: str | os.PathLike[str] = ".",
) -> Training:
    """Do the stages of a run file, or only those in `stages`, as far as they are not done.

    `run_file` is a path, or a RunFile, whose relative paths then start at `base`. Finished stages are skipped,
    interrupted ones resume, and a setting that changed under results is refused; `force` discards the results of stages
    first. `smoke` makes every stage small. Runs in this process on one device; messages go to the logger "deepspec".
    Raises DeepSpecError as the command line would report it.
    """
    plugins = load_plugins()
    if isinstance(run_file, RunFile):
        file, path = run_file, Path(base) / "run file"
    else:
        file, path = load_run_file(run_file, plugins=plugins), Path(run_file)
    run = Run(file=made_small(file) if smoke else file, path=path, plugins=plugins)
    summaries = run_stages(run, only=stages, force=force, say=log.info)
    trained, metrics = summaries.get("train", {}), run.folder / "metrics.json"
    return Training(
        folder=run.folder,
        draft=run.folder / "draft",
        steps=trained.get("steps", 0),
        figures=trained.get("figures", {}),
        metrics=json.loads(metrics.read_text(encoding="utf-8")) if "evaluate" in summaries else None,
        stages=summaries,
    )
