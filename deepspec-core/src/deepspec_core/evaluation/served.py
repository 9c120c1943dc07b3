"""The figures of one task as a server's counters give them, in the form of metrics.json: what they do not tell is None.

Knows what was measured (servers/measuring.py). Does not know servers.
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

    A server without speculative decoding has those of plain decoding alone. Where others asked it too, its rounds are
    not those of the answers, and no figure is made of them.
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
    """Tokens of the answers per round, but for the first token of each, which the prompt's own pass gives.

    Engines differ in what they count of an answer's last round: some count tokens after its end. This does not.
    """
    return sum(len(answer.output_ids) - 1 for answer in answers) / rounds


def by_position(accepted_at: tuple[int, ...], rounds: int) -> list[float]:
    """The share of all rounds that accepted the token at each position, as engines count it."""
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
    """How many of the tokens that answers kept no round can have given: engines count no step without a proposal."""
    return max(0, kept - tally.rounds - tally.accepted)


def _full(tally: Tally) -> bool | None:
    """Whether every proposal had a token at every position; None where that is not known."""
    if tally.accepted_at is None or tally.proposed is None:
        return None
    return tally.proposed == tally.rounds * len(tally.accepted_at)
