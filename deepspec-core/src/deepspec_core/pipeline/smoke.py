"""`--smoke`: a small version of a run, to see that every stage works before the real run starts."""

from __future__ import annotations

from attrs import evolve

from deepspec_core.config.load import RunFile

SAMPLES = 16
STEPS = 10
PROMPTS = 4
NEW_TOKENS = 32


def smoke(file: RunFile) -> RunFile:
    """The same run on 16 samples and 10 steps, with an output folder of its own."""
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
        ),
        evaluate=evolve(file.evaluate, limit=PROMPTS, max_new_tokens=min(file.evaluate.max_new_tokens, NEW_TOKENS)),
    )
