"""The figures of one task from a server's counters, in the form of metrics.json. Figures not counted are None.

This file knows what was measured (servers/measuring.py). It does not know servers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from deepspec_core.decoding.engine import Completion
from deepspec_core.evaluation.metrics import loops
from deepspec_core.evaluation.turns import prompt_of
from deepspec_core.servers.counting import Tally
from deepspec_core.servers.measuring import Measured

_UNKNOWN: Final = ("prefill", "draft", "verify", "host", "peak_bytes")
_OF_ROUNDS: Final = (
    "rounds",
    "acceptance_length",
    "draft_tokens_per_proposal",
    "verify_rate",
    "marginal",
    "conditional",
)


def figures(measured: Measured) -> dict[str, Any]:
    """The figures of one pass over a task's prompts.

    A server without speculative decoding has only the figures of plain decoding. If other clients asked the server
    during the pass, its counted rounds include theirs, and no figure is made from rounds.
    """
    answers = measured.completions
    tokens = sum(len(answer.output_ids) for answer in answers)
    tally = measured.tally
    timing = {"tokens": tokens, "wall": measured.wall, **dict.fromkeys(_UNKNOWN)}
    timing["tokens_per_second"] = tokens / measured.wall
    rounds = dict.fromkeys(_OF_ROUNDS) if tally is None else _of_rounds(tally)
    return {
        "prompts": len({prompt_of(answer.id) for answer in answers}),
        "samples": len(answers),
        "output_tokens": tokens,
        **rounds,
        "acceptance_length_interval": None,
        "limit_share": sum(answer.finish_reason == "length" for answer in answers) / len(answers),
        "loop_share": sum(loops(answer.output_ids) for answer in answers) / len(answers),
        "by_context": None,
        "speculative": timing if measured.speculates else None,
        **({} if measured.speculates else {"plain": timing}),
        "mismatches": None,
        "counted": {
            "speculates": measured.speculates,
            "tokens_in_answers": measured.counted,
            "tokens_by_counters": measured.by_counters,
            "disturbed": measured.disturbed,
            "mismatched_answers": measured.mismatched,
            "kept_per_round": None if tally is None else kept_per_round(answers, tally.rounds),
            "tokens_beside_rounds": None if tally is None else _beside(tokens - len(answers), tally),
            "full_proposals": None if tally is None else _full(tally),
        },
    }


def kept_per_round(answers: Sequence[Completion], rounds: int) -> float:
    """Tokens of the answers per round, without the first token of each answer, which the prefill gives.

    Engines count the last round of an answer differently: some count tokens after its end. This figure does not.
    """
    return sum(len(answer.output_ids) - 1 for answer in answers) / rounds


def by_position(accepted_at: tuple[int, ...], rounds: int) -> list[float]:
    """For each position, the share of all rounds that accepted the token there, as engines count it."""
    return [count / rounds for count in accepted_at]


def _of_rounds(tally: Tally) -> dict[str, Any]:
    committed, rounds = tally.accepted + tally.rounds, tally.rounds
    at, proposed = tally.accepted_at, tally.proposed
    before = (rounds, *at[:-1]) if at else ()
    return {
        "rounds": rounds,
        "acceptance_length": committed / rounds,
        "draft_tokens_per_proposal": None if proposed is None else proposed / rounds,
        "verify_rate": None if proposed is None else committed / (proposed + rounds),
        "marginal": None if at is None else by_position(at, rounds),
        "conditional": None
        if at is None
        else [count / base if base else None for count, base in zip(at, before, strict=True)],
    }


def _beside(kept: int, tally: Tally) -> int:
    """How many tokens of the answers came from no counted round: engines do not count steps without a proposal."""
    return max(0, kept - tally.rounds - tally.accepted)


def _full(tally: Tally) -> bool | None:
    """Whether every proposal had a token at every position; None where that is not known."""
    if tally.accepted_at is None or tally.proposed is None:
        return None
    return tally.proposed == tally.rounds * len(tally.accepted_at)
