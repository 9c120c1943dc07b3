"""Decodes prompts speculatively with a draft, and plainly with the same target alone.

Prompts are split into groups. Each group is decoded plainly and speculatively, one right after the other, so that both
run under the same load of the machine. The result of a group is one line of a journal, and an interrupted evaluation
goes on after the last finished group. At temperature 0 every speculative output is compared with the plain one.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from attrs import asdict, evolve, field, frozen

from deepspec_core.contracts.proposer import Proposer, Sampling
from deepspec_core.contracts.target import TargetModel
from deepspec_core.crew import ALONE, Crew
from deepspec_core.decoding.engine import Clock, Completion, Request, Round, decode
from deepspec_core.decoding.stop_text import StopText
from deepspec_core.errors import DataError, StageError
from deepspec_core.evaluation.group_journals import GroupJournals
from deepspec_core.evaluation.metrics import pool
from deepspec_core.evaluation.parting import Parting, differs, parting, recorded_parting
from deepspec_core.evaluation.peak_memory import forget_peak, peak_bytes
from deepspec_core.evaluation.reliability import judged, reliability
from deepspec_core.evaluation.turns import LaterTurns, first_turn_of
from deepspec_core.json_lines import read_json_lines

MIN_GROUPS = 5
WARM_UP_TOKENS = 16


@frozen(kw_only=True)
class Decoding:
    """What both decodings of an evaluation share. `max_length` is the greatest length of a sequence with its prompt.

    `later` asks further turns, each after the decoding's own answers; without it the requests are all there is.
    """

    target: TargetModel
    proposer: Proposer
    sampling: Sampling
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    max_length: int
    batch_size: int
    plain: bool = True
    confidence_threshold: float = 0.0
    stop_text: StopText | None = None
    later: LaterTurns | None = None


@frozen(kw_only=True)
class Timing:
    """The seconds of one decoding, by part, and the number of tokens in its output.

    peak_bytes: The most memory at once (peak_memory.py). None where it is not known, as in journals of before.
    """

    tokens: int
    wall: float
    prefill: float
    draft: float
    verify: float
    host: float
    peak_bytes: int | None = None


@frozen(kw_only=True)
class Group:
    """The results of one group of prompts. `plain` is None if plain decoding is off. So many `workers` decoded groups
    at the same time."""

    completions: tuple[Completion, ...]
    speculative: Timing
    plain: Timing | None
    mismatches: tuple[Parting, ...] = field(factory=tuple)
    workers: int = 1


def evaluate(
    requests: Sequence[Request],
    decoding: Decoding,
    *,
    journal: Path,
    prompts_digest: str,
    what: str,
    machine: Mapping[str, Any] | None = None,
    crew: Crew = ALONE,
) -> list[Group]:
    """Decode every request. Groups that are in the journal are taken from there.

    The workers of `crew` share the groups. The first one returns all of them, the others return their own.
    `machine` says what decides how fast this process decodes. StageError if the journal was begun with other prompts
    than those of `prompts_digest`, or on another machine. DataError if a line of it is damaged.
    """
    size = max(decoding.batch_size, -(-len(requests) // MIN_GROUPS))
    groups = [requests[start : start + size] for start in range(0, len(requests), size)]
    journals = GroupJournals(journal, prompts=prompts_digest, machine=machine or {}, count=len(groups), crew=crew)
    with closing(journals):
        done = {
            number: _group_of(entry, groups[number : number + 1], where)
            for number, (entry, where) in journals.done.items()
        }
        finished = sum(len(groups[number]) for number in done)
        with crew.progress(len(requests), what, "prompts", done=finished) as progress:
            if journals.mine:
                _warm_up(groups[journals.mine[0]][: decoding.batch_size], decoding)
            for number in journals.mine:
                crew.check()
                done[number] = evolve(_decode_group(groups[number], decoding, progress.advance), workers=crew.count)
                journals.append(number, asdict(done[number]))
        journals.collect()
    for number, (entry, where) in journals.done.items():
        if number not in done:
            done[number] = _group_of(entry, groups[number : number + 1], where)
    return [done[number] for number in sorted(done)]


def recorded(journal: Path) -> tuple[str, list[Group]]:
    """The digest of the prompts of a journal, and all groups in it. The file is only read.

    DataError if a line of it is damaged; StageError if there is no such file.
    """
    if not journal.is_file():
        raise StageError(
            "The rounds of an evaluation are missing", where=journal, fix="Evaluate again with --force evaluate."
        )
    rows = list(read_json_lines(journal))
    head = rows[0][1] if rows else None
    if not isinstance(head, dict) or not isinstance(head.get("prompts"), str):
        raise DataError(
            "A line of a journal is damaged",
            where=f"{journal}:1",
            expected="the digest of the prompts",
            fix="Evaluate again with --force evaluate.",
        )
    return head["prompts"], [_group_of(entry, None, where) for where, entry in rows[1:]]


def summarise(groups: Sequence[Group], *, seed: int, cut: bool = False) -> dict[str, Any]:
    """The figures of one task at one temperature: pooled metrics, times, speed-up, and prompts whose outputs differ.

    "confidence" says how well the draft's confidence foretells acceptance. It is missing where the draft gives none,
    and where a threshold or a scheduler `cut` proposals: the tokens that it kept are not a fair sample. DataError if
    confidences do not fit.
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
    summary["mismatches"] = [asdict(one) for group in groups for one in group.mismatches]
    return summary


def _decode_group(requests: Sequence[Request], decoding: Decoding, advance: Callable[[int], None]) -> Group:
    plain_outputs, plain = _run(requests, decoding, None) if decoding.plain else ({}, None)
    completions, speculative = _run(requests, decoding, decoding.proposer)
    advance(len(requests))
    greedy = decoding.sampling.temperature == 0
    parted = [done for key, done in completions.items() if greedy and differs(done, plain_outputs.get(key))]
    return Group(
        completions=tuple(completions.values()),
        speculative=speculative,
        plain=plain,
        mismatches=tuple(parting(decoding.target, done, plain_outputs[done.id], decoding.sampling) for done in parted),
    )


def _run(
    requests: Sequence[Request], decoding: Decoding, proposer: Proposer | None
) -> tuple[dict[str, Completion], Timing]:
    clock, later, device = Clock(), decoding.later, decoding.target.device
    forget_peak(device)
    answers: dict[str, list[Completion]] = {request.id: [] for request in requests}
    pending, max_length = {request.id: request for request in requests}, decoding.max_length
    while pending:
        owner = {request.id: identity for identity, request in pending.items()}
        for completion in decode(
            decoding.target,
            proposer,
            list(pending.values()),
            sampling=decoding.sampling,
            stop_ids=decoding.stop_ids,
            max_new_tokens=decoding.max_new_tokens,
            batch_size=decoding.batch_size,
            max_length=max_length,
            confidence_threshold=decoding.confidence_threshold,
            stop_text=decoding.stop_text,
            clock=clock,
        ):
            answers[owner[completion.id]].append(completion)
        if later is None:
            break
        following = ((identity, later.next(identity, answers[identity])) for identity in pending)
        pending = {identity: request for identity, request in following if request is not None}
        longest = max((len(request.prompt_ids) for request in pending.values()), default=0)
        max_length = min(later.positions, longest + decoding.max_new_tokens)
    ordered = {completion.id: completion for request in requests for completion in answers[request.id]}
    return ordered, Timing(
        tokens=sum(len(completion.output_ids) for completion in ordered.values()),
        wall=clock.wall,
        prefill=clock.prefill,
        draft=clock.draft,
        verify=clock.verify,
        host=clock.host,
        peak_bytes=peak_bytes(device),
    )


def _warm_up(requests: Sequence[Request], decoding: Decoding) -> None:
    """Decode a little both ways without measuring, because first calls also allocate memory and select kernels.

    The key-value caches are allocated for all of `decoding.max_length`, so a few tokens touch everything.
    """
    brief = evolve(decoding, max_new_tokens=min(decoding.max_new_tokens, WARM_UP_TOKENS), later=None)
    if brief.plain:
        _run(requests, brief, None)
    _run(requests, brief, brief.proposer)


def _total(timings: Sequence[Timing]) -> dict[str, Any]:
    counted = [name for name in asdict(timings[0]) if name != "peak_bytes"]
    total = {name: sum(getattr(timing, name) for timing in timings) for name in counted}
    peaks = [timing.peak_bytes for timing in timings if timing.peak_bytes is not None]
    return {**total, "peak_bytes": max(peaks, default=None), "tokens_per_second": total["tokens"] / total["wall"]}


def _speed(timing: Timing) -> float:
    return timing.tokens / timing.wall


def _group_of(entry: dict[str, Any], expected: Sequence[Sequence[Request]] | None, where: str) -> Group:
    """The group that a line of the journal records.

    `expected` has the requests of its first turns, and is empty where there is no such group; None if they are not
    known.
    """
    try:
        group = _from_json(entry)
        counts = [
            n
            for done in group.completions
            for r in done.rounds
            for n in (r.proposal_length, r.acceptance_length, 0 if r.nodes is None else r.nodes)
        ]
        ids = [token for done in group.completions for token in done.output_ids]
        logits = [logit for done in group.completions for r in done.rounds for logit in r.confidence or ()]
        numbers = all(type(number) is int for number in (*counts, *ids, group.workers)) and all(
            type(one) is float for one in logits
        )
        problem = None if numbers else "numbers that are none"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    else:
        firsts = {one.id for requests in expected or () for one in requests}
        first = [done for done in group.completions if done.id in firsts or first_turn_of(done.id) not in firsts]
        found = [[(done.id, done.prompt_ids) for done in first]]
        asked = [[(one.id, one.prompt_ids) for one in requests] for requests in expected or ()]
        if problem is None and expected is not None and asked != found:
            problem = "other prompts than those of its place"
    if problem is not None:
        raise DataError(
            "A line of a journal is damaged",
            where=where,
            found=problem,
            fix="Remove that line and those after it; what they recorded is done again.",
        )
    return group


def _from_json(entry: dict[str, Any]) -> Group:
    def completion(row: dict[str, Any]) -> Completion:
        rounds = tuple(
            Round(**{**r, "confidence": None if r["confidence"] is None else tuple(r["confidence"])})
            for r in row["rounds"]
        )
        ids = {name: tuple(row[name]) for name in ("prompt_ids", "output_ids")}
        return Completion(**{**row, **ids, "rounds": rounds})

    return Group(
        completions=tuple(completion(row) for row in entry["completions"]),
        speculative=Timing(**entry["speculative"]),
        plain=None if entry["plain"] is None else Timing(**entry["plain"]),
        mismatches=tuple(recorded_parting(one) for one in entry["mismatches"]),
        workers=entry.get("workers", 1),
    )
