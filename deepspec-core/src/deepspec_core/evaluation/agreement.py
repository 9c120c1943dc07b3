"""Compares a server's greedy answers, token by token, with those that this engine recorded for the same prompts.

This file knows finished sequences. It does not know where they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attrs import asdict, frozen

from deepspec_core.decoding.engine import Completion
from deepspec_core.evaluation.served import by_position, kept_per_round


@frozen(kw_only=True)
class Difference:
    """An answer that differs between the two engines.

    position: The index, from 0, of the first output token that differs.
    ours, theirs: The two tokens at that index; None where that answer has ended.
    """

    id: str
    position: int
    ours: int | None
    theirs: int | None


@frozen(kw_only=True)
class Agreement:
    """How both engines compare on the prompts that both answered.

    acceptance_length, by_position, kept_per_round: This engine's own figures. `by_position` gives shares of all rounds.
        They are None where the server also answered other prompts, or where the two token limits differ.
    """

    run: str
    draft_revision: str | None
    compared: int
    equal: int
    differing: tuple[Difference, ...]
    acceptance_length: float | None
    by_position: tuple[float, ...] | None
    kept_per_round: float | None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def agreement(
    theirs: Sequence[Completion],
    ours: Sequence[Completion],
    *,
    run: str,
    draft_revision: str | None,
    limits: tuple[int, int],
) -> Agreement | None:
    """Compare the answers to equal prompts. Returns None if the engines have no prompt in common.

    `limits` are the token limits of an answer, theirs and ours. Tokens beyond the smaller limit are not compared.
    """
    own = {(done.id, done.prompt_ids): done for done in ours}
    pairs = [(done, own[done.id, done.prompt_ids]) for done in theirs if (done.id, done.prompt_ids) in own]
    if not pairs:
        return None
    shared = min(limits)
    differing = [found for done, mine in pairs if (found := _difference(done, mine, shared)) is not None]
    rounds = [one for _, mine in pairs for one in mine.rounds]
    whole = len(pairs) == len(theirs) and limits[0] == limits[1] and len(rounds) > 0
    longest = max((one.proposal_length for one in rounds), default=0)
    accepted_at = tuple(sum(one.accepted_draft_length > k for one in rounds) for k in range(longest))
    return Agreement(
        run=run,
        draft_revision=draft_revision,
        compared=len(pairs),
        equal=len(pairs) - len(differing),
        differing=tuple(differing),
        acceptance_length=sum(one.acceptance_length for one in rounds) / len(rounds) if whole else None,
        by_position=tuple(by_position(accepted_at, len(rounds))) if whole else None,
        kept_per_round=kept_per_round([mine for _, mine in pairs], len(rounds)) if whole else None,
    )


def _difference(theirs: Completion, ours: Completion, shared: int) -> Difference | None:
    one, other = theirs.output_ids[:shared], ours.output_ids[:shared]
    if one == other:
        return None
    shortest = min(len(one), len(other))
    position = next((k for k in range(shortest) if one[k] != other[k]), shortest)
    return Difference(
        id=theirs.id,
        position=position,
        ours=other[position] if position < len(other) else None,
        theirs=one[position] if position < len(one) else None,
    )
