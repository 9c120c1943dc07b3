"""The regenerate stage: the target answers the run's training prompts itself."""

from __future__ import annotations

from collections import Counter
from typing import Any

from deepspec_core.data.regenerate import regenerate, sampling_of
from deepspec_core.pipeline.run import Run


def run_stage(run: Run) -> dict[str, Any]:
    """Answer every training conversation. An interrupted stage goes on with those that are missing."""
    assert run.data.regenerated is not None, "this stage is in the run"
    fmt = run.target.adapter.conversation_format()
    counts: Counter[str] = Counter()
    report = regenerate(
        run.data.conversations("train", counts, keep=True),
        target=run.target.model,
        tokenizer=run.target.tokenizer,
        fmt=fmt,
        options=run.file.regenerate,
        sampling=sampling_of(run.file.regenerate, fmt.sampling),
        stop_ids=run.target.architecture.stop_token_ids,
        out=run.data.regenerated,
        seed=run.file.run.seed,
        max_length=run.data.max_length,
        system_prompt=run.file.data.system_prompt,
        total=run.data.expected_conversations(),
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
        "same_prompt": counts["same_prompt"],
        "unusable": counts["unusable"],
        "malformed": counts["malformed"],
    }
