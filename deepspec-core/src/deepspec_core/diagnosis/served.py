"""The rounds that a server counted in its speculative-decoding metrics, read from a JSON file.

`{"drafts": 1200, "accepted": [900, 640, 410]}` has the number of proposals, and for each position the number of
proposals whose token there was accepted. This file knows the JSON file and its counts. It does not contact a server.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from deepspec_core.diagnosis import finding as names
from deepspec_core.diagnosis.finding import Finding
from deepspec_core.diagnosis.outcomes import Difference, Outcomes
from deepspec_core.errors import DataError
from deepspec_core.json_files import read_object

# Counters do not tell prompts apart, so the rounds are distributed over this many groups.
_GROUPS = 100


def served_outcomes(path: Path, *, max_tokens: int) -> Outcomes:
    """The outcomes of the server's rounds. Raises DataError if the file is malformed or its counts are inconsistent.

    The draft proposes at most `max_tokens` tokens. A token that was accepted beyond them came from another draft.
    """
    try:
        content = read_object(path, kind=DataError)
    except FileNotFoundError:
        raise DataError("no such file", where=path, expected=f"a file like {_LIKE}") from None
    drafts, accepted = content.get("drafts"), content.get("accepted")
    if type(drafts) is not int or not isinstance(accepted, list) or not all(type(one) is int for one in accepted):
        raise DataError("these are no counts of a server", where=path, found=sorted(content), expected=_LIKE)
    counts = [drafts, *accepted]
    if not accepted or drafts < 1 or counts[-1] < 0 or any(b > a for a, b in pairwise(counts)):
        raise DataError(
            "the counts do not go together",
            where=path,
            found=counts[:8],
            expected="at least one draft, and at no position more accepted tokens than at the one before",
        )
    if any(accepted[max_tokens:]):
        raise DataError(
            "the counts are not of this draft",
            where=path,
            found=f"accepted tokens at {len(accepted)} positions",
            expected=f"at most {max_tokens}, as many as the draft proposes",
            fix="Count the rounds of a server that has this draft.",
        )
    return outcomes_of_counts(drafts, accepted[:max_tokens])


def above_the_engine(difference: Difference, tolerance: float) -> Finding | None:
    """The finding if the server accepts significantly more than the engine, by more than this share of the engine's."""
    over = difference.later - difference.earlier
    if difference.interval[0] <= 0 or over <= tolerance * difference.earlier:
        return None
    return Finding(
        name="server above the engine",
        says=f"The server accepted {difference.later:.3f} draft tokens a round and the engine {difference.earlier:.3f} "
        f"(a difference of {over:+.3f}, 99% interval {difference.interval[0]:+.3f} to {difference.interval[1]:+.3f}). "
        "Both decode with the same target and draft, so they are of other prompts, of another draft, or counted "
        "otherwise.",
        fix="Count the server's rounds on evaluation's prompts alone, asked greedily, with this draft.",
        explains=(names.SERVED,),
    )


def outcomes_of_counts(rounds: int, accepted: Sequence[int]) -> Outcomes:
    """The outcomes of this many rounds. accepted[k] of them accepted the token at position k; it never rises with k."""
    counts = [rounds, *accepted]
    # Rounds are sorted by their number of accepted tokens; each kind is distributed over the groups at random.
    exactly = -np.diff([*counts, 0])
    rng = np.random.default_rng(0)
    dealt_SG = np.array([rng.multinomial(number, [1 / _GROUPS] * _GROUPS) for number in exactly])
    at_least_GS = dealt_SG[::-1].cumsum(0)[::-1].T.astype(np.float64)
    survived, reached = at_least_GS[:, 1:], at_least_GS[:, :-1]
    every = np.repeat(at_least_GS[:, :1], len(accepted), axis=1)
    return Outcomes(matched=survived, counted=every, survived=survived, reached=reached)


_LIKE = '{"drafts": 1200, "accepted": [900, 640, 410]}'
