"""The regenerate stage: the target answers the run's training prompts itself, in this process or on servers."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from deepspec_core.crew import ALONE
from deepspec_core.data.answering import Answerer
from deepspec_core.data.regenerate import regenerate, sampling_of
from deepspec_core.data.regenerate_report import RegenerateReport
from deepspec_core.data.several_answers import several
from deepspec_core.pipeline import contents, workers
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.serving import farm_of

log = logging.getLogger("deepspec")


def run_stage(run: Run) -> dict[str, Any]:
    """Answer every training conversation, as often as the run file says.

    An interrupted stage goes on with those that are missing.
    """
    counts: Counter[str] = Counter()
    served, without = bool(run.file.regenerate.servers), Counter[str]()
    if served and not workers.crew().first:
        return {}  # one process keeps all servers busy
    if served:
        # The answers are this target's, although its weights are not read here.
        run.reads.content(contents.TARGET, run.target.content_digest())
    if run.file.regenerate.features:
        from deepspec_core.pipeline.one_pass import keeping

        with keeping(run) as kept:
            report = _regenerated(run, counts, kept.farm, keep=kept.keep)
            without = kept.writer.told()
    else:
        report = _regenerated(run, counts, farm_of(run) if served else None)
    with_features = without.pop("", 0)
    for reason, count in without.most_common():
        log.warning("%d answers were received without features; the cache stage will request them: %s", count, reason)
    if report.too_long:
        log.warning(
            "%d conversations were left out: their first prompt has data.max_length (%d) tokens or more",
            report.too_long,
            run.data.max_length,
        )
    if report.skipped_results:
        log.info(
            "%d recorded tool results were skipped, and %d were replayed after the target's own tool calls",
            report.skipped_results,
            report.replayed_results,
        )
    return {
        "conversations": report.conversations,
        "output_tokens": report.output_tokens,
        "failures": report.failures,
        "unfinished": report.unfinished,
        "cut": report.cut,
        "too_long": report.too_long,
        "empty": report.empty,
        "dropped_turns": report.dropped_turns,
        "rerendered_answers": report.rerendered_answers,
        "mismatched_answers": report.mismatched_answers,
        "replayed_results": report.replayed_results,
        "skipped_results": report.skipped_results,
        "duplicates": counts["duplicates"],
        "same_prompt": counts["same_prompt"],
        "unusable": counts["unusable"],
        "malformed": counts["malformed"],
        **(
            {"texts_with_features": with_features, "texts_without_features": dict(without)}
            if run.file.regenerate.features
            else {}
        ),
    }


def _regenerated(run: Run, counts: Counter[str], farm: Answerer | None, **keep: Any) -> RegenerateReport:
    assert run.data.regenerated is not None, "this stage is in the run"
    fmt = run.target.family.conversation_format()
    return regenerate(
        several(run.data.conversations("train", counts, keep=True), run.file.regenerate.answers),
        target=run.target.model if farm is None else None,
        answerer=farm,
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
        crew=workers.crew() if farm is None else ALONE,
        **keep,
    )
