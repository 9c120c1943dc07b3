"""The regenerate stage: the target answers the run's training prompts itself."""

from __future__ import annotations

from collections import Counter
from typing import Any

from deepspec_core.data.regenerate import regenerate, sampling_of
from deepspec_core.pipeline.run import Run


def run_stage(run: Run) -> dict[str, Any]:
    """Answer every training conversation; an interrupted stage goes on with those that are missing."""
    fmt = run.adapter.conversation_format()
    architecture = run.adapter.architecture
    counts: Counter[str] = Counter()
    report = regenerate(
        run.conversations("train", counts),
        target=run.target,
        tokenizer=run.tokenizer,
        fmt=fmt,
        options=run.file.regenerate,
        sampling=sampling_of(run.file.regenerate, fmt.sampling),
        stop_ids=architecture.stop_token_ids,
        out=run.regenerated,
        seed=run.file.run.seed,
        max_length=min(run.file.data.max_length, architecture.max_positions),
        system_prompt=run.file.data.system_prompt,
        total=run.expected_conversations(),
    )
    return {
        "conversations": report.conversations,
        "output_tokens": report.output_tokens,
        "failures": report.failures,
        "unfinished": report.unfinished,
        "empty": report.empty,
        "dropped_turns": report.dropped_turns,
        "rerendered_answers": report.rerendered_answers,
        "duplicates": counts["duplicates"],
    }
