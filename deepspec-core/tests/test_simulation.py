"""Replays of recorded rounds: by hand where the outcome is known, and against the record where it is exact."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from deepspec_core.decoding.engine import Completion, Round
from deepspec_core.evaluation.metrics import pool
from deepspec_core.evaluation.simulation import Outcome, policies, replay, replayable

SURE, UNSURE = 5.0, -5.0


def completion(*rounds: tuple[int, int], output: int | None = None, stopped: bool = False) -> Completion:
    """Rounds as (proposed, accepted), confidences that know the outcome. By default nothing is trimmed."""
    recorded = [
        Round(proposed, accepted, accepted + 1, (SURE,) * accepted + (UNSURE,) * (proposed - accepted))
        for proposed, accepted in rounds
    ]
    if stopped:
        accepted = recorded[-1].accepted_draft_length
        recorded[-1] = Round(accepted, accepted, accepted, (SURE,) * accepted)
    total = 1 + sum(one.acceptance_length for one in recorded)
    return Completion(
        id="x",
        prompt_ids=(2,),
        output_ids=(5,) * (total if output is None else output),
        finish_reason="stop",
        rounds=tuple(recorded),
    )


def random_samples(seed: int, count: int = 12) -> list[Completion]:
    rng = np.random.default_rng(seed)
    return [completion(*[(4, int(rng.integers(0, 5))) for _ in range(rng.integers(2, 9))]) for _ in range(count)]


def run(
    samples: list[Completion], policy: str, requests: int, seconds: Callable[[int], float], draft_seconds: float = 0.0
) -> Outcome:
    made = policies(4, (0.5,), confidences=True)
    return replay(samples, made[policy](), policy, requests=requests, seconds=seconds, draft_seconds=draft_seconds)


@pytest.mark.parametrize("seed", range(5))
def test_verifying_everything_is_what_was_recorded(seed: int) -> None:
    """A multiple of the samples at one request: the accepted length is the pooled one, exactly."""
    samples = random_samples(seed)
    found = run(samples, "fixed 4", 1, lambda _: 0.5)
    assert found.tokens_per_step == pytest.approx(pool(samples).acceptance_length)
    assert found.verified_per_step == pytest.approx(4)
    assert found.tokens_per_second == pytest.approx(pool(samples).acceptance_length / 0.5)


@pytest.mark.parametrize("requests", [1, 3, 8])
def test_without_speculation_every_step_is_a_token_a_request(requests: int) -> None:
    found = run(random_samples(0), "none", requests, lambda batch: batch / 100, draft_seconds=9.0)
    assert found.tokens_per_second == pytest.approx(100)
    assert found.tokens_per_second_per_user == pytest.approx(100 / requests)
    assert (found.tokens_per_step, found.verified_per_step) == (1.0, 0.0)


def test_where_tokens_in_the_batch_are_free_everything_is_verified_and_the_oracle_only_what_pays() -> None:
    samples = random_samples(1)
    scheduler, oracle, fixed = (run(samples, name, 4, lambda _: 0.1) for name in ("scheduler", "oracle", "fixed 4"))
    assert scheduler.tokens_per_second == fixed.tokens_per_second == oracle.tokens_per_second
    assert oracle.verified_per_step < scheduler.verified_per_step == 4


def test_where_a_token_costs_as_much_as_it_gives_nothing_is_verified() -> None:
    for name in ("scheduler", "oracle"):
        found = run(random_samples(2), name, 2, lambda batch: batch * 0.1)
        assert found.verified_per_step == 0
        assert found.tokens_per_second == pytest.approx(10)


@pytest.mark.parametrize("draft_seconds", [0.0, 2.0])
def test_no_fixed_number_beats_the_oracle_in_a_step(draft_seconds: float) -> None:
    """Not where a longer step takes less time, as in a noisy table, and not where drafting takes most of the time."""
    times = {1: 1.0, 2: 1.6, 3: 1.5, 4: 2.4, 5: 0.9}
    for accepted in range(5):
        record = [completion((4, accepted))]
        made = policies(4, (), confidences=False, draft_seconds=draft_seconds)
        rate = {
            name: replay(
                record, make(), name, requests=1, seconds=times.__getitem__, draft_seconds=draft_seconds
            ).tokens_per_second
            for name, make in made.items()
            if name != "none"
        }
        assert rate["oracle"] == max(rate.values())
    stopped = [completion((4, 2), (4, 2), stopped=True)]
    # The second round's last token ends the answer and adds none: two tokens with or without it.
    assert run(stopped, "oracle", 1, lambda batch: 1 + 0.1 * batch).verified_per_step == pytest.approx((2 + 1) / 2)


def test_good_confidences_bring_the_scheduler_near_the_oracle_and_above_fixed_lengths() -> None:
    samples = random_samples(3, count=40)

    def seconds(batch: int) -> float:
        return 1 + 0.1 * batch

    found = {name: run(samples, name, 8, seconds) for name in policies(4, (0.5,), confidences=True)}
    rate = {name: outcome.tokens_per_second for name, outcome in found.items()}
    assert rate["scheduler"] == pytest.approx(rate["oracle"], rel=0.02)
    assert rate["threshold 0.5"] == pytest.approx(rate["oracle"], rel=0.02)
    assert rate["scheduler"] > 1.05 * max(rate[f"fixed {k}"] for k in range(1, 5))
    assert rate["asynchronous"] > rate["none"]


def test_a_shorter_verification_commits_what_it_reaches() -> None:
    samples = [completion((4, 3), (4, 0), (4, 4))]
    # Two verified tokens: 3, 1 and 3 tokens; the recorded 4 + 1 + 5 = 10 tokens take the rounds 3 1 3, then 3.
    found = run(samples, "fixed 2", 1, lambda _: 1.0)
    assert found.tokens / (found.steps / 4) == 10
    assert found.tokens_per_step == pytest.approx(10 / 4)


def test_an_answer_that_a_stop_token_ended_has_no_further_token() -> None:
    samples = [completion((4, 2), (4, 2), stopped=True)]
    assert samples[0].rounds[-1].acceptance_length == 2
    found = run(samples, "fixed 4", 1, lambda _: 1.0)
    assert found.tokens_per_step == pytest.approx((3 + 2) / 2)


def test_trimmed_tokens_do_not_count() -> None:
    found = run([completion((4, 4), output=3)], "fixed 4", 1, lambda _: 1.0)
    assert found.tokens_per_step == 2


def test_the_drafts_time_is_added_to_every_step() -> None:
    samples = random_samples(4)
    without, with_time = (run(samples, "fixed 4", 2, lambda _: 1.0, draft_seconds=s) for s in (0.0, 1.0))
    assert with_time.tokens_per_second == pytest.approx(without.tokens_per_second / 2)


def test_the_same_record_gives_the_same_outcome() -> None:
    for name in policies(4, (0.5,), confidences=True):
        first, second = (run(random_samples(5), name, 3, lambda batch: 1 + 0.2 * batch) for _ in range(2))
        assert first == second
        assert math.isfinite(first.tokens_per_second)


def test_without_confidences_there_is_no_threshold_and_no_scheduler() -> None:
    assert list(policies(2, (0.5,), confidences=False)) == ["none", "fixed 1", "fixed 2", "oracle"]


def test_samples_without_a_round_are_not_replayed() -> None:
    empty = completion()
    some = completion((4, 1))
    assert replayable([empty, some, empty]) == [some]
