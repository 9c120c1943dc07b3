"""What a run would do: its stages, the results that exist, and upper bounds of sizes.

Reads the target's config, and counts conversations if the run file limits them. Loads no weights and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deepspec_core.disk import in_words
from deepspec_core.evaluation.tasks import quota_of
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.stages import Step

_WORDS = {"run": "would run", "resume": "would resume", "skip": "complete, would be skipped"}


def preview(run: Run, steps: Sequence[Step]) -> Iterator[str]:
    """One line for each stage, and one for the target."""
    architecture = run.target.architecture
    yield (
        f"target: {run.file.target.model} ({architecture.model_type}, {architecture.num_layers} layers, hidden size "
        f"{architecture.hidden_size}, vocabulary {architecture.vocab_size:,}), taps {list(run.file.target.layers)}"
    )
    yield f"output: {run.folder}"
    for step in steps:
        size = "" if step.action == "skip" else _size(run, step.stage.name)
        yield f"{step.stage.name}: {_WORDS[step.action]}{size and ', '}{size}"


def _size(run: Run, stage: str) -> str:
    file = run.file
    cached = stage in ("cache", "train") and file.features.mode == "cached"
    count = run.cache.expected_samples() if cached else run.data.expected_conversations()
    known = f"at most {count:,}" if count is not None else "all"
    if stage == "regenerate":
        servers = len(file.regenerate.servers)
        answered = f", by {servers} server{'s' * (servers > 1)}" if servers else ""
        return f"{known} conversations of at most {file.regenerate.max_tokens:,} new tokens an answer{answered}"
    if stage == "cache":
        per_token = run.cache.format.bytes_per_token(run.cache.bare_header())
        bound = f", at most {in_words(per_token * count * file.data.max_length)}" if count is not None else ""
        return f"{per_token:,} bytes a token{bound}"
    if stage == "train":
        steps = file.train.max_steps
        if count is not None:
            whole = -(-count // file.train.global_batch_size) * file.train.epochs
            steps = min(whole, steps or whole)
        bound = f"at most {steps:,} steps" if steps is not None else f"{file.train.epochs} epochs"
        return f"{bound} of {file.train.global_batch_size} sequences, {file.features.mode} features"
    most = {task: file.evaluate.limit or quota_of(task, run.plugins.registry) for task in file.evaluate.tasks}
    tasks = (f"{task} ({'all' if count is None else f'at most {count:,}'})" for task, count in most.items())
    return f"prompts of {', '.join(tasks)} at temperature " + ", ".join(
        f"{temperature:g}" for temperature in file.evaluate.temperature
    )
