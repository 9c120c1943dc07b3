"""What a diagnosis compares: outcomes of blocks, stored features, prompts, files of drafts, and what it says."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from attrs import evolve

from deepspec_core.config.schema import EvaluateOptions
from deepspec_core.contracts.draft import Sample
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.decoding.engine import Completion, Round
from deepspec_core.diagnosis import finding as names
from deepspec_core.diagnosis.draft_files import config_differences
from deepspec_core.diagnosis.feature_check import compare_features, features_finding
from deepspec_core.diagnosis.finding import Diagnosis, Finding, Stage
from deepspec_core.diagnosis.outcomes import (
    Outcomes,
    accepted_difference,
    of_blocks,
    of_completions,
    share_difference,
)
from deepspec_core.diagnosis.prompt_check import PromptDifference, Trained, compare_prompt, prompts_finding
from deepspec_core.diagnosis.served import above_the_engine, served_outcomes
from deepspec_core.errors import DataError
from deepspec_core.features.capture import capture
from deepspec_core.pipeline.diagnosing import left_out
from deepspec_core.testing.tiny_target import TinyTarget
from deepspec_core.testing.tiny_tokenizer import ASSISTANT_START, tiny_tokenizer


def drawn(rate: float, *, groups: int = 40, seed: int = 0, positions: int = 4) -> Outcomes:
    """Blocks whose tokens are right with this probability, ten in each group."""
    rng = np.random.default_rng(seed)
    matched = rng.random((10 * groups, positions)) < rate
    return of_blocks(np.arange(groups).repeat(10).tolist(), matched, np.ones_like(matched))


def test_conditional_shares_count_blocks_that_are_right_so_far() -> None:
    matched = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 1]], dtype=bool)
    counted = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0]], dtype=bool)
    found = of_blocks([5, 5, 9], matched, counted)
    assert found.shares() == [2 / 3, 2 / 3, 1 / 2]
    assert found.conditional() == [2 / 3, 1 / 2, 0.0]
    assert found.accepted() == pytest.approx(2 / 3 + 2 / 3 * 1 / 2)
    assert (found.groups, found.blocks) == (2, 3)


def test_rounds_of_the_engine_count_without_the_last() -> None:
    rounds = (Round(3, 3, 4), Round(3, 1, 2), Round(3, 0, 1))
    done = Completion(id="a", prompt_ids=(1,), output_ids=(1,) * 8, finish_reason="stop", rounds=rounds)
    found = of_completions([done])
    assert found.conditional() == [1.0, 0.5, 1.0]


def test_a_difference_is_a_drop_only_if_it_is_sure_and_large() -> None:
    assert accepted_difference(drawn(0.8), drawn(0.5, seed=1), paired=False).drops(0.1)
    assert not accepted_difference(drawn(0.8), drawn(0.8, seed=1), paired=False).drops(0.1)
    # Sure, and smaller than what is tolerated.
    slight = accepted_difference(drawn(0.8, groups=600), drawn(0.77, groups=600, seed=1), paired=False)
    assert slight.interval[1] < 0
    assert not slight.drops(0.1)
    # Large, and of few samples.
    assert not accepted_difference(drawn(0.6, groups=2), drawn(0.45, groups=2, seed=1), paired=False).drops(0.1)
    assert not accepted_difference(drawn(0.5), drawn(0.8, seed=1), paired=False).drops(0.1)


def test_equal_stages_have_no_difference_at_all_when_they_are_paired() -> None:
    found = accepted_difference(drawn(0.7), drawn(0.7), paired=True)
    assert found.interval == (0.0, 0.0)


def test_recorded_shares_are_compared_with_their_own_noise() -> None:
    assert not share_difference([0.8] * 4, 64, drawn(0.8)).drops(0.1)
    assert share_difference([0.8] * 4, 64, drawn(0.4)).drops(0.1)
    # Four samples say little.
    assert not share_difference([0.8] * 4, 4, drawn(0.6)).drops(0.1)


@pytest.fixture(scope="module")
def target() -> TinyTarget:
    return TinyTarget(num_layers=6)


def stored(target: TinyTarget, taps: Sequence[int], dtype: torch.dtype = torch.float32) -> list[Sample]:
    ids = torch.arange(20) % 7 + 3
    sample = Sample(id="a", input_ids=ids, loss_mask=ids > 0, original_length=20)
    return list(capture([sample], target, taps, batch_size=1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_that_were_only_rounded_agree(target: TinyTarget, dtype: torch.dtype) -> None:
    compared = compare_features(stored(target, [1, 3], dtype), target, [1, 3])
    assert [one.tap for one in compared] == [1, 3, "last"]
    assert [one.fits for one in compared] == [1, 3, "last"]
    assert features_finding(compared) is None


@pytest.mark.parametrize(("shift", "says"), [(1, "1 too low"), (-1, "1 too high")])
def test_features_of_neighbouring_layers_are_told_by_number(target: TinyTarget, shift: int, says: str) -> None:
    found = features_finding(compare_features(stored(target, [1 + shift, 3 + shift]), target, [1, 3]))
    assert found is not None
    assert found.name == "layer numbering"
    assert f"the stored tap 1 is the target's layer {1 + shift}" in found.says
    assert says in found.says


def test_features_of_another_target_fit_no_layer(target: TinyTarget) -> None:
    found = features_finding(compare_features(stored(TinyTarget(num_layers=6, seed=1), [1, 3]), target, [1, 3]))
    assert found is not None
    assert found.name == "features"
    assert found.explains[0] == names.LIVE


SAID = [{"role": "user", "content": "What is two?"}]
ANSWERED = [*SAID, {"role": "assistant", "content": "two is two"}]


def asked(*, trained_thinking: bool, thinking: bool, change: str = "") -> PromptDifference:
    """A training sample's ids against evaluation's, whose template is `change` and then the same."""
    train, evaluate = ChatTokenizer(tiny_tokenizer(), thinking=trained_thinking), tiny_tokenizer()
    prompt = train.render_prompt(SAID)
    answer = "<think>\nwell</think>two" if trained_thinking else "two"
    ids = [*prompt, *train.encode(answer)[0]]
    evaluate.chat_template = change + evaluate.chat_template
    own = ChatTokenizer(evaluate, thinking=thinking)
    other = own.in_mode(not thinking).render_prompt(SAID)
    trained = Trained(sample="a", ids=ids, prompt=len(prompt))
    return compare_prompt(trained, own.render_prompt(SAID), other, own, header=ASSISTANT_START)


@pytest.mark.parametrize("thinking", [True, False])
def test_the_same_prompts_are_the_same(thinking: bool) -> None:
    assert asked(trained_thinking=thinking, thinking=thinking).kind == "same"


@pytest.mark.parametrize("thinking", [True, False])
def test_the_other_thinking_mode_is_told_from_another_template(thinking: bool) -> None:
    # With thinking, the prompt is a beginning of the one without.
    assert asked(trained_thinking=not thinking, thinking=thinking).kind == "thinking mode"


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ("{{ '<|start|>' }}", "tokens at the beginning", "<|start|>"),
        ("{{ '<|start|>system\\nIn verse.<|end|>\\n' }}", "template", "part at token"),
    ],
)
def test_other_prompts_are_told_apart(change: str, kind: str, says: str) -> None:
    found = asked(trained_thinking=False, thinking=False, change=change)
    assert found.kind == kind
    assert says in found.says


def test_a_prompt_without_the_assistants_header() -> None:
    own = ChatTokenizer(tiny_tokenizer())
    prompt = own.render_prompt(SAID)
    short = own.encode("<|start|>user\nWhat is two?<|end|>\n")[0]
    trained = Trained(sample="a", ids=[*prompt, 7, 8], prompt=len(prompt))
    found = compare_prompt(trained, short, short, own, header=ASSISTANT_START)
    assert found.kind == "generation prompt"


def test_few_differing_prompts_are_no_finding() -> None:
    same, other = PromptDifference(sample="a", kind="same"), PromptDifference(sample="b", kind="template", says="x")
    assert prompts_finding([same] * 3 + [other]) is None
    found = prompts_finding([same] + [other] * 3)
    assert found is not None
    assert "3 of 4 prompts" in found.says


def test_keys_of_a_config_that_say_what_the_draft_is() -> None:
    own = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "dtype": "float32", "block_size": 7}
    other = {**own, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "dtype": "bfloat16"}
    assert config_differences(own, own) == {}
    assert config_differences(own, other) == {"rope_parameters.rope_theta": (1e4, 1e6)}


def test_counts_of_a_server(tmp_path: Path) -> None:
    path = tmp_path / "served.json"
    path.write_text(json.dumps({"drafts": 1200, "accepted": [900, 640, 410]}))
    found = served_outcomes(path, max_tokens=3)
    assert found.conditional() == pytest.approx([900 / 1200, 640 / 900, 410 / 640])
    assert found.accepted() == pytest.approx((900 + 640 + 410) / 1200)
    for wrong in ({"drafts": 10, "accepted": [11]}, {"drafts": "10", "accepted": [1]}, {"drafts": 10, "accepted": []}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(DataError):
            served_outcomes(path, max_tokens=3)
    with pytest.raises(DataError, match="no such file"):
        served_outcomes(tmp_path / "none.json", max_tokens=3)


def test_counts_of_more_positions_than_the_draft_proposes_are_of_another(tmp_path: Path) -> None:
    path = tmp_path / "served.json"
    path.write_text(json.dumps({"drafts": 10000, "accepted": [10000] * 8}))
    with pytest.raises(DataError, match=r"(?s)not of this draft.*8 positions.*at most 5"):
        served_outcomes(path, max_tokens=5)
    # A server may have counters for more.
    path.write_text(json.dumps({"drafts": 1200, "accepted": [900, 640, 0, 0]}))
    assert served_outcomes(path, max_tokens=2).conditional() == pytest.approx([900 / 1200, 640 / 900])


def test_a_server_far_above_the_engine_is_a_finding() -> None:
    above = accepted_difference(drawn(0.3), drawn(0.9, seed=1), paired=False)
    found = above_the_engine(above, 0.1)
    assert found is not None
    stages = (Stage(name="engine", accepted=above.earlier), Stage(name="served", against="engine", difference=above))
    said = Diagnosis(stages=stages, findings=(found,), facts={}, not_measured={}).sentences()
    assert "Nothing found" not in " ".join(said)
    assert any(line.startswith("server above the engine: ") for line in said)
    assert above_the_engine(accepted_difference(drawn(0.8), drawn(0.8, seed=1), paired=False), 0.1) is None
    assert above_the_engine(accepted_difference(drawn(0.8), drawn(0.3, seed=1), paired=False), 0.1) is None


def stage(name: str, rate: float, earlier: float | None = None) -> Stage:
    if earlier is None:
        return Stage(name=name, accepted=rate)
    difference = accepted_difference(drawn(earlier), drawn(rate, seed=1), paired=False)
    return Stage(name=name, against="before", difference=difference, drops=difference.drops(0.1))


CAUSE = Finding(name="rotary", says="It says 20.", fix="Put it back.", explains=(names.REPLAYED,))


def test_the_verdict_names_the_first_drop_and_only_what_explains_it() -> None:
    stages = (stage("recorded", 0.8), stage("replayed", 0.5, 0.8), stage("engine", 0.2, 0.5))
    beside = evolve(CAUSE, name="positions", explains=(names.ENGINE,))
    found = Diagnosis(stages=stages, findings=(CAUSE, beside), facts={}, not_measured={})
    said = found.sentences()
    assert said[0].startswith("The first stage that drops is `replayed`")
    assert said[1] == "rotary: It says 20. Put it back."
    assert said[2].startswith("Seen beside it: positions")
    assert [one.name for one in found.causes] == ["rotary"]
    assert json.loads(json.dumps(found.as_json()))["first_drop"] == "replayed"


def test_a_drop_without_a_cause_says_so_and_no_drop_says_the_noise() -> None:
    drop = Diagnosis(stages=(stage("live", 0.8), stage("held-out", 0.4, 0.8)), findings=(), facts={}, not_measured={})
    assert drop.sentences()[1].startswith("No single cause was seen.")
    calm = Diagnosis(stages=(stage("live", 0.8), stage("held-out", 0.8, 0.8)), findings=(), facts={}, not_measured={})
    (said,) = calm.sentences()
    assert said.startswith("Nothing found")
    assert "99% intervals: `held-out`" in said
    # A difference that costs nothing measurable is still told.
    assert "rotary: It says 20." in " ".join(evolve(calm, findings=(CAUSE,)).sentences())


def test_what_evaluation_does_otherwise_is_named() -> None:
    greedy = EvaluateOptions(temperature=(0.0,))
    assert left_out(greedy) == left_out(EvaluateOptions(temperature=(1.0, 0.0))) == {}
    (said,) = left_out(evolve(greedy, repetition_penalty=1.5, stop=("x",), confidence_threshold=0.3)).values()
    assert said.endswith("without evaluate.repetition_penalty, evaluate.stop, evaluate.confidence_threshold")
    sampled = evolve(greedy, top_p=0.8, top_k=20, min_p=0.1, samples=4)
    assert left_out(sampled) == {}
    (said,) = left_out(evolve(sampled, temperature=(1.0,), turns="all")).values()
    names = ("temperature", "top_p", "top_k", "min_p", "samples", "turns")
    assert said.endswith("without " + ", ".join(f"evaluate.{name}" for name in names))
