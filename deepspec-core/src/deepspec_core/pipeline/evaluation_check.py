"""Checks, before the first stage, what evaluations will read: draft, calibration, cost table, tasks and prompts.

Knows the stage `evaluate` and the evaluations during training. checking.py calls each check for the stages that need
it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection

from deepspec_core.config.schema import HELD_OUT
from deepspec_core.errors import ConfigError, DataError
from deepspec_core.pipeline.run import Run

log = logging.getLogger("deepspec")


def check_evaluation(run: Run, todo: Collection[str], confidence: bool | None, proposed: int | None) -> None:
    """Check the stage `evaluate`. `confidence` and `proposed` are of the draft that this run trains, if it is known.

    Raises DeepSpecError.
    """
    from deepspec_core.config.trees import require_trees, tree_mistakes
    from deepspec_core.data.thinking import modes
    from deepspec_core.evaluation.failed_samples import failures_of, warn_of_failures
    from deepspec_core.pipeline.evaluated_draft import describe_evaluated
    from deepspec_core.pipeline.evaluating import calibration_of, journals, prompts_of, requests_of
    from deepspec_core.pipeline.scheduling import costs_of

    options = run.file.evaluate
    journals(options.tasks)
    if options.calibration is not None and options.draft is None and "train" in todo:
        raise ConfigError(
            "no calibration can be of a draft that is yet to be trained",
            where=f"{run.path}: evaluate.calibration",
            found=options.calibration,
            expected="no calibration while the run still trains",
            fix="Remove the key and run. Then fit one with `deepspec calibrate`, name it here, and evaluate again.",
        )
    if options.draft is not None or "train" not in run.file.run.stages:
        description, revision = describe_evaluated(run)
        for remark in getattr(description, "remarks", ()):
            log.warning("%s: %s", description.algorithm, remark)
        if run.file.draft.tree is not None:
            require_trees(description.algorithm, run.plugins.registry)
            for mistake in tree_mistakes(options):
                raise mistake
        confidence, proposed = description.gives_confidence, description.max_tokens
        calibration_of(run, description, revision)
    if proposed is not None:
        costs_of(run, confidence, proposed)
    if options.confidence_threshold > 0 and confidence is False:
        raise ConfigError(
            "this draft gives no confidence to compare with the threshold",
            where="[evaluate] confidence_threshold",
            found=f"{options.confidence_threshold:g}",
            expected="a draft with a confidence head, or a threshold of 0",
        )
    for task in options.tasks:
        if task != HELD_OUT:
            prompts = prompts_of(run, task)
            for thinking in modes(run.file.regenerate.thinking):
                asked = requests_of(run, task, prompts, thinking=thinking)
                warn_of_failures(f"evaluate.tasks: {task}", failures_of(asked.refused))
        else:
            _require_held_out(run)


def check_decoded_in_training(run: Run) -> None:
    """Check what evaluations during training need: the target's weights, and a held-out prompt."""
    from deepspec_core.pipeline.training_evaluations import check_evaluations

    if run.file.train.evaluate_every is not None:
        check_evaluations(run)
        _require_held_out(run)


def _require_held_out(run: Run) -> None:
    """Check that at least one prompt is held out, if that can be found out without the Hub."""
    from deepspec_core.data.source_rows import on_hub

    if any(on_hub(source, run.base) for source in run.file.data.sources):
        return
    if next(run.data.held_out(1), None) is None:
        raise DataError(
            "No prompt is held out for evaluation",
            where=f"{run.path}: data.held_out",
            found=f"none of the conversations, at a share of {run.file.data.held_out:g}",
            expected="at least one",
            fix="Raise data.held_out, give more data, or name other tasks and remove train.evaluate_every.",
        )
