"""A group of prompts as a line of a journal: written with a digest, and checked when it is read.

Somebody may have edited a line. The digest covers everything else in the line. Lines of older versions have no digest;
they are accepted if their numbers are possible for rounds. This file knows what a group holds. It does not know files,
prompts or models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from attrs import asdict, frozen

from deepspec_core.decoding.engine import Completion, Request, Round
from deepspec_core.errors import DataError
from deepspec_core.evaluation.group_decoding import Failure, Group, Timing
from deepspec_core.evaluation.parting import recorded_parting
from deepspec_core.evaluation.sealed_json import content_digest
from deepspec_core.evaluation.turns import first_turn_of

_DO_AGAIN: Final = "Remove that line and those after it; what they recorded is done again."


@frozen(kw_only=True)
class Bounds:
    """The upper bounds of recorded numbers; None where a bound is not known.

    max_tokens: The largest number of tokens on a path of a proposal. vocab_size: All token ids are below it.
    """

    max_tokens: int | None = None
    vocab_size: int | None = None


def entry_of(group: Group) -> dict[str, Any]:
    """The entry of a group, which becomes a line of the journal."""
    entry = asdict(group)
    return {**entry, "digest": content_digest(entry)}


def group_of(
    entry: dict[str, Any],
    where: str,
    *,
    expected: Sequence[Sequence[Request]] | None = None,
    bounds: Bounds,
    fix: str = _DO_AGAIN,
) -> Group:
    """The group that a line of the journal records.

    `expected` has the requests of the group's first turns. It is empty if there should be no such group, and None if
    the requests are not known. Raises DataError, which names `where`, if the line is damaged.
    """
    try:
        group = _from_json(entry)
        problem = next(_impossible(group, bounds), None)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    else:
        if problem is None and expected is not None and not _answers(group, expected):
            problem = "other prompts than those of its place"
        written = {name: value for name, value in entry.items() if name != "digest"}
        if problem is None and "digest" in entry and entry["digest"] != content_digest(written):
            problem = "it was edited: its digest is another than that of what it says"
    if problem is not None:
        raise DataError("A line of a journal is damaged", where=where, found=problem, fix=fix)
    return group


def _answers(group: Group, expected: Sequence[Sequence[Request]]) -> bool:
    """Whether the first turns are those of the requests, except for samples that failed."""
    firsts = {one.id for requests in expected for one in requests}
    first = [done for done in group.completions if done.id in firsts or first_turn_of(done.id) not in firsts]
    failed = {one.id for one in group.failures}
    asked = [[(one.id, one.prompt_ids) for one in requests if one.id not in failed] for requests in expected]
    return asked == [[(done.id, done.prompt_ids) for done in first]]


def _impossible(group: Group, bounds: Bounds) -> Iterator[str]:
    """Descriptions of the values that no decoded group can have."""
    if not all(type(number) is int for number in (group.workers, group.halved_to or 1)):
        yield "numbers that are none"
    for done in group.completions:
        for number, one in enumerate(done.rounds, start=1):
            if (why := _impossible_round(one, last=number == len(done.rounds), most=bounds.max_tokens)) is not None:
                yield f"{why}, in round {number} of {done.id}"
        ids, committed = (*done.prompt_ids, *done.output_ids), [one.acceptance_length for one in done.rounds]
        if not all(type(token) is int for token in ids):
            yield f"numbers that are none, in {done.id}"
        if not all(0 <= token < (bounds.vocab_size or math.inf) for token in ids):
            yield f"a token id outside the vocabulary, in {done.id}"
        # The first token belongs to no round, and the last round may commit tokens beyond the output's end.
        if not 1 + sum(committed[:-1]) <= len(done.output_ids) <= 1 + sum(committed):
            yield f"{len(done.output_ids)} tokens of output from rounds that committed {sum(committed)}, in {done.id}"
        if done.finish_reason not in ("stop", "length"):
            yield f"the finish reason {done.finish_reason!r}, in {done.id}"
    for timing in (group.speculative, group.plain):
        if timing is not None and not _is_timing(timing):
            yield f"times that are none: {asdict(timing)}"
    tokens = sum(len(done.output_ids) for done in group.completions)
    if group.speculative.tokens != tokens:
        yield f"{group.speculative.tokens} tokens in its time, and {tokens} in its outputs"


def _impossible_round(one: Round, *, last: bool, most: int | None) -> str | None:
    proposed, accepted, committed = one.proposal_length, one.accepted_draft_length, one.acceptance_length
    nodes = proposed if one.nodes is None else one.nodes
    logits = one.confidence or ()
    counts = (proposed, accepted, committed, nodes)
    if not all(type(count) is int for count in counts) or not all(type(logit) is float for logit in logits):
        return "numbers that are none"
    if not 0 <= accepted <= proposed <= nodes:
        return f"{accepted} of {proposed} proposed tokens accepted"
    if most is not None and proposed > most:
        return f"{proposed} proposed tokens of a draft that proposes {most}"
    # If an accepted token ended the answer, the round does not commit the target's own token.
    if committed != accepted + 1 and not (last and committed == accepted > 0):
        return f"{committed} tokens committed where {accepted} were accepted"
    if one.confidence is not None and (len(logits) != proposed or not all(map(math.isfinite, logits))):
        return f"confidences that are not one of each of {proposed} tokens"
    return None


def _is_timing(timing: Timing) -> bool:
    seconds = (timing.wall, timing.prefill, timing.draft, timing.verify, timing.host)
    counts = (timing.tokens, timing.peak_bytes or 0)
    if not all(type(count) is int and count >= 0 for count in counts):
        return False
    numbers = all(type(one) in (int, float) and math.isfinite(one) for one in seconds)
    return numbers and (timing.wall > 0 or timing.tokens == 0)


def _from_json(entry: Mapping[str, Any]) -> Group:
    def completion(row: dict[str, Any]) -> Completion:
        rounds = tuple(
            Round(**{**r, "confidence": None if r["confidence"] is None else tuple(r["confidence"])})
            for r in row["rounds"]
        )
        ids = {name: tuple(row[name]) for name in ("prompt_ids", "output_ids")}
        return Completion(**{**row, "id": str(row["id"]), **ids, "rounds": rounds})

    return Group(
        completions=tuple(completion(row) for row in entry["completions"]),
        speculative=Timing(**entry["speculative"]),
        plain=None if entry["plain"] is None else Timing(**entry["plain"]),
        mismatches=tuple(recorded_parting(one) for one in entry["mismatches"]),
        workers=entry.get("workers", 1),
        failures=tuple(Failure(id=str(one["id"]), reason=str(one["reason"])) for one in entry.get("failures", ())),
        halved_to=entry.get("halved_to"),
    )
