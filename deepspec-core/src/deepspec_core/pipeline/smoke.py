"""`--smoke`: a small version of a run, to see that every stage works before the real run starts."""

from __future__ import annotations

import logging
from typing import Any

from attrs import evolve

from deepspec_core.config.load import RunFile
from deepspec_core.config.schema import TrainOptions

log = logging.getLogger("deepspec")
SAMPLES = 16
STEPS = 10
PROMPTS = 4
NEW_TOKENS = 32


def smoke(file: RunFile) -> RunFile:
    """The same run on 16 samples and 10 steps, with an output folder of its own.

    A calibration is left out, with a warning, where the draft that it is of is not the one evaluated.
    """
    calibration = file.evaluate.calibration
    if calibration is not None and file.evaluate.draft is None and "train" in file.run.stages:
        log.warning("--smoke leaves evaluate.calibration out: it trains a draft that %s is not of", calibration)
        calibration = None
    return evolve(
        file,
        run=evolve(file.run, output=f"{file.run.output}-smoke"),
        data=evolve(
            file.data,
            sources=tuple(evolve(source, limit=SAMPLES) for source in file.data.sources),
            min_supervised_tokens=1,
        ),
        # Of 16 samples a share may be none.
        cache=evolve(file.cache, subset=None),
        train=evolve(
            file.train,
            max_steps=STEPS,
            epochs=STEPS,
            global_batch_size=min(file.train.global_batch_size, SAMPLES),
            **_few_evaluations(file.train),
        ),
        evaluate=evolve(
            file.evaluate,
            limit=PROMPTS,
            max_new_tokens=min(file.evaluate.max_new_tokens, NEW_TOKENS),
            calibration=calibration,
        ),
    )


def _few_evaluations(train: TrainOptions) -> dict[str, Any]:
    if train.evaluate_every is None:
        return {}
    decoded = train.evaluation
    few = evolve(decoded, prompts=min(decoded.prompts, PROMPTS), max_new_tokens=min(decoded.max_new_tokens, NEW_TOKENS))
    return {"evaluate_every": min(train.evaluate_every, STEPS // 2), "evaluation": few}
