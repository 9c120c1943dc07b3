"""Reliability of confidences: against a direct definition on random rounds, and by hand at the edges."""

import math
from itertools import pairwise

import numpy as np
import pytest

from deepspec_core.decoding.engine import Completion, Round
from deepspec_core.errors import DataError
from deepspec_core.evaluation.reliability import ECE_BINS, judged, reliability


def completion(*rounds: tuple[int, int, tuple[float, ...] | None]) -> Completion:
    """Rounds as (proposed, accepted, logits)."""
    return Completion(
        id="x",
        prompt_ids=(2,),
        output_ids=(5,),
        finish_reason="stop",
        rounds=tuple(Round(proposed, accepted, accepted + 1, logits) for proposed, accepted, logits in rounds),
    )


def random_completions(seed: int, *, rounds: int = 60, width: int = 5) -> list[Completion]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(6):
        drawn = []
        for _ in range(rounds // 6):
            proposed = int(rng.integers(0, width + 1))
            accepted = int(rng.integers(0, proposed + 1))
            drawn.append((proposed, accepted, tuple(rng.normal(scale=2, size=proposed).tolist())))
        found.append(completion(*drawn))
    return found


def direct(completions: list[Completion], k: int) -> list[tuple[float, bool]]:
    """The product of the sigmoids up to position k and whether its prefix survived, of the rounds that proposed it."""
    return [
        (math.prod(1 / (1 + math.exp(-logit)) for logit in r.confidence[: k + 1]), r.accepted_draft_length > k)
        for one in completions
        for r in one.rounds
        if r.confidence is not None and r.proposal_length > k
    ]


@pytest.mark.parametrize("seed", range(8))
def test_figures_equal_their_definition(seed: int) -> None:
    completions = random_completions(seed)
    rounds = judged(completions)
    assert rounds is not None
    found = reliability(rounds)
    assert len(found.positions) == 5
    weighted = 0.0
    for k, position in enumerate(found.positions):
        pairs = direct(completions, k)
        assert position.rounds == len(pairs)
        assert position.accepted == pytest.approx(sum(label for _, label in pairs) / len(pairs))
        assert position.confidence == pytest.approx(sum(p for p, _ in pairs) / len(pairs))
        assert position.brier == pytest.approx(sum((p - label) ** 2 for p, label in pairs) / len(pairs))
        ece = 0.0
        for low, high in pairwise(np.linspace(0, 1, ECE_BINS + 1)):
            inside = [(p, label) for p, label in pairs if low <= p < high]
            if inside:
                mean = sum(p for p, _ in inside) / len(inside)
                share = sum(label for _, label in inside) / len(inside)
                ece += len(inside) / len(pairs) * abs(mean - share)
        assert position.ece == pytest.approx(ece)
        assert position.ece == pytest.approx(
            sum(one.rounds * abs(one.confidence - one.accepted) for one in position.bins) / len(pairs)
        )
        wins = [
            1.0 if int(1000 * p) > int(1000 * q) else 0.5 if int(1000 * p) == int(1000 * q) else 0.0
            for p, survived in pairs
            for q, other in pairs
            if survived and not other
        ]
        assert position.auroc == (pytest.approx(sum(wins) / len(wins)) if wins else None)
        weighted += len(pairs) * ece
    assert found.ece == pytest.approx(weighted / sum(position.rounds for position in found.positions))


def test_a_position_after_a_rejection_counts_and_one_that_was_not_proposed_does_not() -> None:
    """The prefix of a position after a rejected token is known not to have survived, whatever its own token is."""
    rounds = judged([completion((3, 1, (4.0, 0.0, 4.0)), (1, 1, (4.0,)), (0, 0, ()))])
    assert rounds is not None
    assert rounds.proposed.sum(0).tolist() == [2, 1, 1]
    assert rounds.survived.sum(0).tolist() == [2, 0, 0]


def test_one_class_has_no_auroc() -> None:
    for accepted, ece in ((2, 0.25), (0, 0.75)):
        found = judged([completion(*[(2, accepted, (math.log(3), 50.0))] * 5)])
        assert found is not None
        figures = reliability(found)
        assert [position.auroc for position in figures.positions] == [None, None]
        assert figures.auroc is None
        assert figures.ece == pytest.approx(ece)
        assert figures.brier == pytest.approx(ece**2)


def test_without_rounds_there_are_no_figures() -> None:
    found = judged([completion((0, 0, ()))])
    assert found is not None
    figures = reliability(found)
    assert (figures.ece, figures.brier, figures.auroc, figures.positions) == (None, None, None, ())


def test_without_a_confidence_there_is_nothing_to_judge() -> None:
    assert judged([completion((2, 1, None))]) is None
    assert judged([completion()]) is None
    assert judged([]) is None


@pytest.mark.parametrize("logits", [(1.0,), (1.0, math.nan), (math.inf, 1.0), None])
def test_confidences_that_fit_no_proposal_are_refused(logits: tuple[float, ...] | None) -> None:
    with pytest.raises(DataError, match="the sample x"):
        judged([completion((2, 1, (0.0, 0.0)), (2, 1, logits))])


def test_extreme_logits_are_no_error() -> None:
    rounds = judged([completion((2, 1, (900.0, -900.0)), (2, 0, (-900.0, 900.0)))])
    assert rounds is not None
    with np.errstate(all="raise", under="ignore"):
        figures = reliability(rounds)
    assert (figures.ece, figures.brier, figures.auroc) == (0.0, 0.0, 1.0)


def test_temperatures_scale_each_position() -> None:
    rounds = judged([completion((2, 2, (2.0, 3.0)), (2, 0, (2.0, 3.0)))])
    assert rounds is not None
    found = reliability(rounds, [2.0, 3.0])
    sigmoid = 1 / (1 + math.exp(-1))
    assert [position.confidence for position in found.positions] == pytest.approx([sigmoid, sigmoid**2])
