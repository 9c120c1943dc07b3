"""Pooled figures: against recorded runs of the published code, and by hand on small cases."""

import json
from pathlib import Path

import pytest
from attrs import evolve

from deepspec_core.decoding.engine import Completion, Round
from deepspec_core.evaluation.metrics import loops, pool
from deepspec_core.evaluation.report import accepted, prompts

PARITY = Path(__file__).parents[2] / "tests" / "parity"


def _completion(rounds: list[tuple[int, int, int]], output: tuple[int, ...] = (5,), finish: str = "stop") -> Completion:
    return Completion(
        id="x",
        prompt_ids=(2,),
        output_ids=output,
        finish_reason=finish,
        rounds=tuple(Round(*entry) for entry in rounds),
    )


@pytest.mark.parametrize("case", ["qwen3-decode-dflash", "qwen3-decode-dspark", "qwen3-decode-eagle3"])
def test_figures_equal_the_recorded_ones(case: str) -> None:
    recorded = json.loads((PARITY / case / "case.json").read_text())["by_confidence_threshold"]["0.0"]
    completions = [
        _completion(
            list(
                zip(
                    sample["proposal_lengths"],
                    sample["accepted_draft_lengths"],
                    sample["acceptance_lengths"],
                    strict=True,
                )
            )
        )
        for sample in recorded["samples"]
    ]
    found, expected = pool(completions), recorded["metrics"]
    assert found.samples == expected["num_samples"]
    assert found.rounds == recorded["summary"]["proposal_count"]
    assert found.acceptance_length == pytest.approx(expected["acceptance_length"])
    assert found.draft_tokens_per_proposal == pytest.approx(expected["draft_tokens_per_proposal"])
    assert found.verify_rate == pytest.approx(expected["verify_rate"])
    assert found.marginal == pytest.approx(expected["accept_rates_by_position"])


def test_pooled_over_rounds_not_averaged_over_samples() -> None:
    one, other = evolve(_completion([(3, 3, 4)]), id="one"), evolve(_completion([(3, 0, 1)] * 3), id="other")
    found = pool([one, other])
    assert found.acceptance_length == pytest.approx(7 / 4)
    assert found.marginal == pytest.approx((0.25, 0.25, 0.25))
    assert found.conditional == pytest.approx((0.25, 1.0, 1.0))
    low, high = found.acceptance_length_interval
    assert low == pytest.approx(1.0)
    assert high == pytest.approx(4.0)
    # Two turns of one prompt are not independent: together they are drawn or not.
    turns = pool([one, evolve(other, id="one (turn 2)")])
    assert (turns.samples, turns.acceptance_length_interval) == (2, pytest.approx((7 / 4, 7 / 4)))
    # A table counts prompts, and says so where they have more answers.
    several = pool([one, evolve(other, id="one (sample 2)"), other])
    assert prompts(found.as_json()) == "2"
    assert prompts(several.as_json()) == "2 (3 answers)"
    assert prompts({"samples": 3}) == "3", "a file of before"


def test_conditional_acceptance_counts_only_rounds_that_reached_the_position() -> None:
    found = pool([_completion([(2, 0, 1), (2, 1, 2), (2, 2, 3), (1, 1, 2)])])
    assert found.marginal == pytest.approx((3 / 4, 1 / 3))
    assert found.conditional == pytest.approx((3 / 4, 1 / 2))


def test_no_rounds_at_all() -> None:
    found = pool([_completion([])])
    assert (found.samples, found.rounds, found.marginal) == (1, 0, ())
    assert found.acceptance_length is found.acceptance_length_interval is None, "a round commits at least one token"
    assert found.draft_tokens_per_proposal is found.verify_rate is None
    assert accepted(found.as_json()) == "-"


def test_limits_and_loops_are_counted() -> None:
    looping, plain = (7, 8, 9) * 20, tuple(range(60))
    assert loops(looping)
    assert not loops(plain)
    found = pool([_completion([(1, 1, 2)], looping, "length"), _completion([(1, 1, 2)], plain)])
    assert (found.limit_share, found.loop_share) == (0.5, 0.5)


def test_accepted_length_by_context() -> None:
    """The context of a round is the prompt, the token that the prompt's own pass gave, and what rounds committed."""
    long = Completion(
        id="x",
        prompt_ids=(2,) * 250,
        output_ids=(5,),
        finish_reason="stop",
        rounds=(Round(4, 3, 4), Round(4, 0, 1), Round(4, 2, 3), *[Round(4, 0, 1)] * 600),
    )
    found = pool([long, _completion([(4, 4, 5)])]).by_context
    # Rounds begin at 251, 255, 256, 259, 260, and so on to 858; the other completion's at 2.
    assert [(bucket.start, bucket.end, bucket.rounds) for bucket in found] == [
        (0, 256, 3),
        (256, 512, 1 + 253),
        (512, 1024, 347),
    ]
    assert found[0].acceptance_length == pytest.approx((5 + 4 + 1) / 3)
    assert found[1].acceptance_length == pytest.approx((3 + 253) / 254)
    assert sum(bucket.rounds for bucket in found) == 604
    assert pool([_completion([])]).by_context == ()
