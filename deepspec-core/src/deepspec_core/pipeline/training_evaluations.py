"""A run's evaluations during training: the prompts it holds out, its target with weights, its workers; and the checks
before the first stage.

Knows [train] evaluate_every of a run file. Does not know how prompts are decoded, or which checkpoint is the best.
"""

from __future__ import annotations

import logging
from pathlib import Path

from deepspec_core.config.schema import CACHED, HELD_OUT, SERVER
from deepspec_core.errors import TargetError
from deepspec_core.evaluation.requests import requests_of_prompts
from deepspec_core.evaluation.tasks import load_task
from deepspec_core.hub import why_unreachable
from deepspec_core.pipeline import workers
from deepspec_core.pipeline.run import Run
from deepspec_core.targets.extra_weights import INDEX, SINGLE
from deepspec_core.targets.opening import weight_bytes
from deepspec_core.training.best_checkpoints import Evaluations
from deepspec_core.training.held_out_decoding import HeldOutDecoding

log = logging.getLogger("deepspec")

_PLACE = "train.evaluate_every"
_WEIGHTS_OR_INDEX = (SINGLE, INDEX)


def evaluations_of(run: Run) -> Evaluations:
    """What evaluates the run's checkpoints. Raises DataError if no prompt is held out, or none can be asked."""
    options = run.file.train
    if options.evaluate_every is None:
        return Evaluations(options)
    prompts = load_task(
        HELD_OUT,
        limit=None,
        seed=run.file.run.seed,
        base=run.base,
        registry=run.plugins.registry,
        held_out=lambda: run.data.held_out(options.evaluation.prompts),
    )
    asked = requests_of_prompts(
        prompts,
        run.target.tokenizer.in_mode(run.file.regenerate.thinking is True),
        system_prompt=run.file.data.system_prompt,
        seed=run.file.run.seed,
        room=run.target.architecture.max_positions,
        task=_PLACE,
    )
    if asked.too_long:
        log.warning(
            "%s: %d prompts are left out, because they leave the target no room to answer", _PLACE, asked.too_long
        )
    decoding = HeldOutDecoding(
        target=run.target.model,
        registry=run.plugins.registry,
        requests=tuple(asked.requests),
        options=options.evaluation,
        crew=workers.crew(),
    )
    return Evaluations(options, decoding, crew=workers.crew())


def check_evaluations(run: Run) -> None:
    """Raise TargetError if the target's weights, which decoding needs, are not there. Says what else an evaluation
    needs.

    With cached features, or features from servers, nothing else would have asked for them before training begins.
    """
    options = run.file.train
    if options.evaluate_every is None:
        return
    if run.file.features.mode in (CACHED, SERVER):
        kind = "cached features" if run.file.features.mode == CACHED else "features from servers"
        log.info("%s = %d: the target is loaded beside %s", _PLACE, options.evaluate_every, kind)
    where, revision = run.target.where, run.file.target.revision
    if isinstance(where, Path):
        found = "no safetensors files" if weight_bytes(where) is None else None
    else:
        found = _not_on_hub(where, revision)
    if found is not None:
        raise TargetError(
            "the draft cannot be evaluated during training, because the target's weights are missing",
            where=where,
            found=found,
            expected="a target that can be loaded",
            fix="Give the target with its weights, or remove train.evaluate_every.",
        )


def _not_on_hub(name: str, revision: str | None) -> str | None:
    """Why the weights of a Hub id cannot be had, as far as it is known without a download."""
    problem = why_unreachable()
    if problem is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    kept = (try_to_load_from_cache(name, file, revision=revision) for file in _WEIGHTS_OR_INDEX)
    return None if any(isinstance(path, str) for path in kept) else problem
