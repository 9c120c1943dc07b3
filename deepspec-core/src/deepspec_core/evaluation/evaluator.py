"""Decodes prompts speculatively with a draft, and plainly with the same target alone.

Prompts are split into groups. Each group is decoded plainly and speculatively, one right after the other, so that both
run under the same load of the machine. The result of a group is one line of a journal, and an interrupted evaluation
goes on after the last finished group. At temperature 0 every speculative output is compared with the plain one.
group_decoding.py decodes a group; recorded_groups.py writes and reads its line.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from attrs import asdict, evolve

from deepspec_core.crew import ALONE, Crew
from deepspec_core.data.failure_budget import FailureBudget, Words
from deepspec_core.decoding.engine import Request
from deepspec_core.errors import DataError, StageError
from deepspec_core.evaluation.group_decoding import Decoding, Group, GroupDecoder, Timing
from deepspec_core.evaluation.group_journals import GroupJournals
from deepspec_core.evaluation.metrics import pool
from deepspec_core.evaluation.recorded_groups import Bounds, entry_of, group_of
from deepspec_core.evaluation.reliability import judged, reliability
from deepspec_core.json_lines import read_json_lines

MIN_GROUPS = 5
_AGAIN: Final = "Evaluate again with --force evaluate."
_WORDS: Final = Words(
    work="evaluate",
    problem="Too many samples of an evaluation fail",
    key="evaluate.max_failures",
    fix="Read the reasons in that file. Nothing that was decoded is lost; --force evaluate decodes all again.",
)


def evaluate(
    requests: Sequence[Request],
    decoding: Decoding,
    *,
    journal: Path,
    prompts_digest: str,
    what: str,
    machine: Mapping[str, Any] | None = None,
    crew: Crew = ALONE,
    max_failures: float = 0.0,
    refused: int = 0,
) -> list[Group]:
    """Decode every request. Groups that are in the journal are taken from there.

    The workers of `crew` share the groups. The first worker returns all groups; the others return their own.
    `machine` describes what decides how fast this process decodes. `refused` are prompts that could not be asked; they
    are not among the requests, but they count as failures.

    Raises StageError if the journal was begun with other prompts than those of `prompts_digest`, or on another machine.
    Raises DataError if a line of the journal is damaged, if more than the share `max_failures` of all samples fails
    (counted over all workers), or if no sample is left.
    """
    size = max(decoding.batch_size, -(-len(requests) // MIN_GROUPS))
    groups = [requests[start : start + size] for start in range(0, len(requests), size)]
    journals = GroupJournals(journal, prompts=prompts_digest, machine=machine or {}, count=len(groups), crew=crew)
    with closing(journals):
        bounds = _bounds(decoding)
        done = {
            number: group_of(entry, where, expected=groups[number : number + 1], bounds=bounds)
            for number, (entry, where) in journals.done.items()
        }
        of = len(requests) + refused
        budget = FailureBudget(crew, max_failures, journal, done=0, words=evolve(_WORDS, work=what))
        if crew.first:
            budget.add(refused + _failures(done.values()), of)
        finished = sum(len(groups[number]) for number in done)
        with crew.progress(len(requests), what, "prompts", done=finished) as progress:
            halved = [group.halved_to for group in done.values() if group.halved_to is not None]
            decode_group = GroupDecoder(decoding, what, min([decoding.batch_size, *halved]))
            if journals.mine:
                decode_group.warm_up(groups[journals.mine[0]])
            for number in journals.mine:
                crew.check()
                done[number] = evolve(decode_group(groups[number]), workers=crew.count)
                journals.append(number, entry_of(done[number]))
                progress.advance(len(groups[number]))
                failed = done[number].failures
                budget.add(len(failed), of, f"{failed[0].id}: {failed[0].reason}" if failed else "")
        journals.collect()
    for number, (entry, where) in journals.done.items():
        if number not in done:
            done[number] = group_of(entry, where, expected=groups[number : number + 1], bounds=bounds)
    found = [done[number] for number in sorted(done)]
    if crew.first:
        reasons = [f"{one.id}: {one.reason}" for group in found for one in group.failures]
        budget.check_all(refused + len(reasons), of, reasons[0] if reasons else "")
        if not any(group.completions for group in found):
            raise DataError("No sample of a task could be decoded", where=what, found=reasons[0])
    return found


def _failures(groups: Iterable[Group]) -> int:
    return sum(len(group.failures) for group in groups)


def _bounds(decoding: Decoding) -> Bounds:
    return Bounds(max_tokens=decoding.proposer.max_tokens, vocab_size=decoding.target.architecture.vocab_size)


def recorded(journal: Path, *, max_tokens: int | None = None) -> tuple[str, list[Group]]:
    """The digest of a journal's prompts, and all groups in the journal. The file is only read.

    `max_tokens` is the largest number of tokens that the draft proposes on one path, where it is known.
    Raises DataError if a line is damaged, and StageError if there is no such file.
    """
    if not journal.is_file():
        raise StageError("The rounds of an evaluation are missing", where=journal, fix=_AGAIN)
    rows = list(read_json_lines(journal))
    head = rows[0][1] if rows else None
    if not isinstance(head, dict) or not isinstance(head.get("prompts"), str):
        raise DataError(
            "A line of a journal is damaged",
            where=f"{journal}:1",
            expected="the digest of the prompts",
            fix=_AGAIN,
        )
    bounds = Bounds(max_tokens=max_tokens)
    return head["prompts"], [group_of(entry, where, bounds=bounds, fix=_AGAIN) for where, entry in rows[1:]]


def summarise(groups: Sequence[Group], *, seed: int, cut: bool = False) -> dict[str, Any]:
    """The figures of one task at one temperature: pooled metrics, times, speed-up, and prompts whose outputs differ.

    "confidence" says how well the draft's confidence predicts acceptance. It is missing where the draft gives no
    confidence, and where a threshold or a scheduler `cut` the proposals, because the tokens that remain are not a fair
    sample. Raises DataError if the confidences do not match the proposed tokens.
    """
    completions = [completion for group in groups for completion in group.completions]
    summary: dict[str, Any] = pool(completions, seed=seed).as_json()
    summary["speculative"] = _total([group.speculative for group in groups])
    plain = [(group.speculative, group.plain) for group in groups if group.plain]
    if plain:
        summary["plain"] = _total([timing for _, timing in plain if timing])
        ratios = [_speed(fast) / _speed(slow) for fast, slow in plain if slow and slow.tokens and fast.tokens]
        summary["speedup"] = summary["speculative"]["tokens_per_second"] / summary["plain"]["tokens_per_second"]
        summary["speedup_median_of_groups"] = statistics.median(ratios)
    rounds = None if cut else judged(completions)
    if rounds is not None:
        summary["confidence"] = reliability(rounds).as_json()
    summary["workers"] = max(group.workers for group in groups)
    if halved := sorted({group.halved_to for group in groups if group.halved_to is not None}, reverse=True):
        summary["halved_to"] = halved
    summary["failures"] = [asdict(one) for group in groups for one in group.failures]
    summary["mismatches"] = [asdict(one) for group in groups for one in group.mismatches]
    return summary


def _total(timings: Sequence[Timing]) -> dict[str, Any]:
    counted = [name for name in asdict(timings[0]) if name != "peak_bytes"]
    total = {name: sum(getattr(timing, name) for timing in timings) for name in counted}
    peaks = [timing.peak_bytes for timing in timings if timing.peak_bytes is not None]
    return {**total, "peak_bytes": max(peaks, default=None), "tokens_per_second": total["tokens"] / total["wall"]}


def _speed(timing: Timing) -> float:
    return timing.tokens / timing.wall
