"""The tokens that a draft with a reduced vocabulary knows: those that answers have most of, and the stop tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from attrs import evolve

from deepspec_core.contracts.draft import Sample
from deepspec_core.data.frequent_tokens import frequent_tokens
from deepspec_core.errors import ConfigError
from deepspec_core.layers.draft_vocabulary import DraftVocabulary
from deepspec_core.testing.tiny_target import TinyTarget


def sample(ids: Sequence[int], supervised: Sequence[int]) -> Sample:
    return Sample(
        id="s",
        input_ids=torch.tensor(ids),
        loss_mask=torch.tensor(supervised, dtype=torch.bool),
        original_length=len(ids),
    )


# Supervised: 7 three times, 2 and 5 twice, 3 once; 8 and 0 in prompts only.
SAMPLES = [
    sample([8, 8, 8, 8, 7, 5, 2, 3], [0, 0, 0, 0, 1, 1, 1, 1]),
    sample([0, 7, 7, 5, 2], [0, 1, 1, 1, 1]),
]


@pytest.mark.parametrize(
    ("size", "ids", "covered"),
    [(2, [1, 7], 3), (3, [1, 2, 7], 5), (4, [1, 2, 5, 7], 7), (6, [0, 1, 2, 3, 5, 7], 8), (10, list(range(10)), 8)],
)
def test_the_most_frequent_supervised_tokens_and_the_stop_token(size: int, ids: list[int], covered: int) -> None:
    found = frequent_tokens(SAMPLES, size=size, vocab_size=10, always=(1,))
    assert found.ids.tolist() == ids
    assert (found.covered, found.supervised) == (covered, 8)


def test_the_order_of_samples_does_not_matter() -> None:
    forward, backward = (
        frequent_tokens(samples, size=3, vocab_size=10, always=()) for samples in (SAMPLES, SAMPLES[::-1])
    )
    assert torch.equal(forward.ids, backward.ids)


def vocabulary(size: int) -> DraftVocabulary:
    architecture = evolve(TinyTarget(vocab_size=10).architecture, stop_token_ids=(1, 4))
    return DraftVocabulary(size, architecture)


def test_logits_are_spread_over_the_target_s_tokens() -> None:
    known = vocabulary(3)
    known.choose(torch.tensor([1, 4, 7]))
    spread = known.spread(torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.bfloat16))
    assert spread.dtype == torch.bfloat16
    assert spread[0, [1, 4, 7]].tolist() == [0.5, -1.0, 2.0]
    assert spread.isinf().sum() == 7
    probabilities = spread.float().softmax(-1)
    assert probabilities[0, [0, 2, 3, 5, 6, 8, 9]].tolist() == [0.0] * 7


@pytest.mark.parametrize("size", [1, 11])
def test_sizes_that_no_draft_can_have(size: int) -> None:
    with pytest.raises(ConfigError) as caught:
        vocabulary(size)
    assert caught.value.where == "[draft] vocab_size"
    assert caught.value.expected == "from 2 (the target's stop tokens) to 10 (all of its tokens)"


def test_ids_are_checked() -> None:
    known = vocabulary(3)
    assert known.problem() is None
    for ids, said in (([1, 4, 10], "from 1 to 10"), ([-1, 4, 7], "from -1 to 7"), ([4, 1, 7], "do not increase")):
        known.choose(torch.tensor(ids))
        assert said in str(known.problem())
