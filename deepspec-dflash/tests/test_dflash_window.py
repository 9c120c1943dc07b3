"""A draft with a window: decoding sees what training sees at any length of context, from a cache that does not grow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attrs import evolve

from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.errors import ConfigError
from deepspec_core.testing.driven_proposer import SAMPLED, DrivenProposer
from deepspec_core.testing.random_batches import features_of, padded_batch, random_sample
from deepspec_dflash.model import DFlashModel

MakeModel = Callable[..., DFlashModel]
WINDOW = 6


def test_decoding_sees_what_training_sees(make_model: MakeModel) -> None:
    """Prompts shorter and longer than the window, in one batch; then commits, until both have passed it."""
    model = make_model(window=WINDOW)
    samples = [random_sample(str(i), 40, seed=i) for i in range(3)]
    lengths = {0: 3, 1: 25, 2: 6}
    driven = DrivenProposer(model, num_slots=3, max_length=64)
    driven.start({slot: (samples[slot], length) for slot, length in lengths.items()})
    for committed in ({0: 1, 1: 4, 2: 5}, {0: 2, 2: 1}, {0: 5, 1: 1, 2: 3}):
        found = driven.propose(range(3), SAMPLED)
        assert found.probabilities is not None
        for slot, length in lengths.items():
            rows = model(padded_batch(model, [model.preparation.at(samples[slot], torch.tensor([length]))]))
            expected = model.logits(rows.hidden).softmax(-1)
            torch.testing.assert_close(found.probabilities[slot], expected, rtol=0, atol=1e-6)
        driven.accept(committed)
        lengths |= {slot: lengths[slot] + count for slot, count in committed.items()}


def test_what_lies_before_the_window_does_not_matter(make_model: MakeModel) -> None:
    anchor = torch.tensor([20])
    sample = random_sample("a", 40)
    features = features_of(sample)

    def hidden(model: DFlashModel, changed: int) -> torch.Tensor:
        other = features.hidden.clone()
        other[changed] += 1.0
        moved = evolve(sample, features=TargetFeatures(hidden=other, last_hidden=features.last_hidden))
        rows: torch.Tensor = model(padded_batch(model, [model.preparation.at(moved, anchor)])).hidden
        return rows

    sliding, whole = make_model(window=WINDOW, num_layers=1), make_model(num_layers=1)
    first = 20 - WINDOW + 1
    same, other = hidden(sliding, first - 1), hidden(sliding, first)
    torch.testing.assert_close(same, hidden(sliding, 0), rtol=0, atol=0)
    assert (same[0] - other[0]).abs().max() > 1e-3, "the anchor's slot sees the window's first position"
    torch.testing.assert_close(same[1], other[1], rtol=0, atol=1e-6)  # the next slot's window begins later
    assert (hidden(whole, 0) - hidden(whole, 1)).abs().max() > 1e-3


def test_the_cache_does_not_grow(make_model: MakeModel) -> None:
    def kept(window: int | None, max_length: int) -> int:
        proposer = make_model(window=window).proposer()
        proposer.open_slots(2, max_length)
        return sum(cache.keys_SGLD.numel() for cache in proposer._caches)

    assert kept(WINDOW, 1000) == kept(WINDOW, 100_000) < kept(None, 1000) / 100


def test_a_window_smaller_than_a_block_is_refused(make_model: MakeModel) -> None:
    make_model(window=4, block_size=4)
    with pytest.raises(ConfigError, match="at least") as refused:
        make_model(window=3, block_size=4)
    assert refused.value.where == "[draft.layer] window"
