"""Sequential temperature scaling: against a search by hand, on confidences whose temperature is known, at the edges."""

import math

import numpy as np
import pytest

from deepspec_core.decoding.engine import Completion, Round
from deepspec_core.evaluation.calibration import GRID, fit, fitted
from deepspec_core.evaluation.reliability import Judged, ece, judged, reliability, survival
from deepspec_core.evaluation.turns import sample_id


def rounds_of(logits_NK: np.ndarray, survived_NK: np.ndarray, *, prompts: int = 10) -> Judged:
    return Judged(
        logits=logits_NK,
        proposed=np.ones(logits_NK.shape, dtype=bool),
        survived=survived_NK,
        prompt=np.arange(len(logits_NK)) % prompts,
    )


def drawn(temperatures: list[float], *, rounds: int = 20_000, seed: int = 0) -> Judged:
    """Rounds of a draft that says temperatures[k] times the true logit of position k."""
    rng = np.random.default_rng(seed)
    true_NK = rng.normal(loc=1.0, size=(rounds, len(temperatures)))
    survived_NK = (rng.random(true_NK.shape) < 1 / (1 + np.exp(-true_NK))).cumprod(1).astype(bool)
    return rounds_of(true_NK * np.array(temperatures), survived_NK)


def test_the_grid_has_one_and_reaches_a_factor_of_ten() -> None:
    assert len(GRID) == 41
    assert 1.0 in GRID
    assert (min(GRID), max(GRID)) == pytest.approx((0.1, 10))


def test_known_temperatures_are_found_again() -> None:
    found = fit(drawn([2.0, 0.5, 1.0]), 3)
    # Neighbours in the grid are 12% apart.
    assert np.log(found) == pytest.approx(np.log([2.0, 0.5, 1.0]), abs=0.24)


@pytest.mark.parametrize("seed", range(4))
def test_each_position_has_the_best_temperature_with_those_before_it_fixed(seed: int) -> None:
    rounds = drawn([3.0, 0.4, 1.7], rounds=300, seed=seed)
    found = fit(rounds, 3)
    for k in range(3):
        errors = [
            ece(survival(rounds.logits[:, : k + 1], [*found[:k], temperature])[:, k], rounds.survived[:, k])
            for temperature in GRID
        ]
        assert errors[GRID.index(found[k])] == min(errors)
        # 1 is in the grid: with those before it fixed, no position is worse than unscaled.
        assert min(errors) <= errors[GRID.index(1.0)]


def test_the_order_of_confidences_at_a_position_stays() -> None:
    rounds = drawn([2.5, 0.6], rounds=200)
    found = fit(rounds, 2)
    for k in range(2):
        scaled = rounds.logits[:, k] / found[k]
        assert (np.argsort(scaled, kind="stable") == np.argsort(rounds.logits[:, k], kind="stable")).all()


def test_calibrated_confidences_err_less_also_on_samples_left_out() -> None:
    found = fitted(drawn([3.0, 3.0]), 2)
    assert found.before.ece is not None
    assert found.after.ece is not None
    assert found.after_left_out is not None
    assert found.after_left_out.ece is not None
    assert found.after.ece < found.before.ece / 3
    assert found.after_left_out.ece < found.before.ece / 3
    assert found.after_left_out.ece != found.after.ece


def test_a_temperature_at_the_end_of_the_grid_is_named() -> None:
    assert fitted(drawn([1.0, 1.0]), 2).at_the_edge == ()
    logits = np.tile([5.0, -1.0], (40, 1))
    survived = np.tile([True, False], (40, 1))
    assert fitted(rounds_of(logits, survived), 2).at_the_edge == (2,)


def test_one_prompt_leaves_none_out() -> None:
    whole = drawn([1.0], rounds=50)
    assert fitted(rounds_of(whole.logits, whole.survived, prompts=1), 1).after_left_out is None


def test_positions_that_no_round_proposed_have_one() -> None:
    assert fit(drawn([2.0], rounds=100), 3)[1:] == (1.0, 1.0)


def test_only_labelled_positions_are_fitted() -> None:
    """Whatever stands where nothing was proposed changes nothing."""
    whole = drawn([2.0, 0.5], rounds=400)
    proposed = whole.proposed.copy()
    proposed[::2, 1] = False
    some = Judged(logits=whole.logits, proposed=proposed, survived=whole.survived, prompt=whole.prompt)
    other_logits = np.where(proposed, whole.logits, 77.0)
    other = Judged(logits=other_logits, proposed=proposed, survived=whole.survived, prompt=whole.prompt)
    assert fit(some, 2) == fit(other, 2)
    assert reliability(some) == reliability(other)


@pytest.mark.parametrize("survived", [True, False])
def test_one_class_still_has_temperatures(survived: bool) -> None:
    logits = np.full((20, 2), math.log(3))
    found = fit(rounds_of(logits, np.full((20, 2), survived)), 2)
    assert all(temperature in GRID for temperature in found)


def test_equal_errors_take_the_temperature_nearest_to_one() -> None:
    """A logit of 0 is a half at every temperature."""
    assert fit(rounds_of(np.zeros((10, 1)), np.ones((10, 1), dtype=bool)), 1) == (1.0,)


def test_the_answers_to_a_prompt_are_left_out_together() -> None:
    """Samples and later turns that say the same add nothing that is new. The other half had better not know them."""
    drawn_NK = drawn([2.0, 2.0], rounds=40)
    accepted_N = drawn_NK.survived.sum(1)

    def answers(copies: int, turn: str) -> list[Completion]:
        names = [
            [f"p{n}", *(sample_id(f"p{n}", k) for k in range(2, copies + 1)), *([f"p{n}{turn}"] * bool(turn))]
            for n in range(10)
        ]
        return [
            Completion(
                id=name,
                prompt_ids=(2,),
                output_ids=(5,),
                finish_reason="stop",
                rounds=tuple(
                    Round(2, int(accepted_N[row]), int(accepted_N[row]) + 1, tuple(drawn_NK.logits[row].tolist()))
                    for row in range(n, 40, 10)
                ),
            )
            for n, of in enumerate(names)
            for name in of
        ]

    once, thrice, turned = (judged(answers(*how)) for how in ((1, ""), (3, ""), (1, " (turn 2)")))
    assert once is not None
    assert thrice is not None
    assert turned is not None
    expected = fitted(once, 2)
    assert expected.after_left_out is not None
    assert expected.after_left_out.ece is not None
    assert expected.after.ece is not None
    assert expected.after_left_out.ece > expected.after.ece
    for several in (thrice, turned):
        found = fitted(several, 2).after_left_out
        assert found is not None
        assert found.ece == pytest.approx(expected.after_left_out.ece)
