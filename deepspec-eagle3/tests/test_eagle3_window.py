"""A draft with a window: decoding sees what training sees at any length of context, from a cache that does not grow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from attrs import evolve

import deepspec_eagle3.proposer as proposer_module
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.proposer import Proposal
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.errors import ConfigError
from deepspec_core.testing.driven_proposer import SAMPLED, DrivenProposer
from deepspec_core.testing.random_batches import features_of, padded_batch, prepare, random_sample
from deepspec_eagle3.model import Eagle3Model, Places

MakeModel = Callable[..., Eagle3Model]
WINDOW = 6


def check_as_in_training(model: Eagle3Model, known: Sample, length: int, proposal: Proposal, slot: int) -> None:
    """The proposal after `length` tokens has the distributions that training gives, had the target emitted its tokens.

    The token at `length` is known too: the proposal's first anchor.
    """
    assert proposal.probabilities is not None
    drawn = proposal.tokens[slot]
    ids = torch.cat([known.input_ids[: length + 1], drawn])
    whole = features_of(known).hidden[: len(ids)]
    sample = evolve(
        known,
        input_ids=ids,
        loss_mask=torch.ones(len(ids), dtype=torch.bool),
        features=TargetFeatures(hidden=whole, last_hidden=torch.zeros(len(ids), 32)),
    )
    batch = padded_batch(model, prepare(model, [sample]))
    first, later = model.unroll(batch, Places.of(batch, model.window))
    prepared = batch.prepared["later_index"].tolist()
    states = [first[0, length - 1], *(state[prepared.index(length - 1)] for state in later)]
    expected = torch.stack([model.logits(model.drafter.norm(state)) for state in states]).softmax(-1)
    torch.testing.assert_close(proposal.probabilities[slot], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("piece", [3, 7, 256])
def test_decoding_sees_what_training_sees(
    make_model: MakeModel, num_layers: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts shorter and longer than the window in one batch, in pieces; then rejected proposals and commits."""
    monkeypatch.setattr(proposer_module, "_PIECE", piece)
    model = make_model(window=WINDOW, num_layers=num_layers)
    samples = [random_sample(str(i), 60, seed=i) for i in range(3)]
    lengths = {0: 3, 1: 25, 2: 6}
    driven = DrivenProposer(model, num_slots=3, max_length=300)
    driven.start({slot: (samples[slot], length) for slot, length in lengths.items()})
    for committed in ({0: 1, 1: 4, 2: 5}, {0: 2, 2: 1}, {0: 5, 1: 1, 2: 3}, {0: 5, 1: 5, 2: 5}, {0: 5, 1: 5, 2: 5}):
        found = driven.propose(range(3), SAMPLED)
        for slot, length in lengths.items():
            check_as_in_training(model, samples[slot], length, found, slot)
        driven.accept(committed)
        lengths |= {slot: lengths[slot] + count for slot, count in committed.items()}


def test_what_lies_before_the_window_does_not_matter(make_model: MakeModel) -> None:
    """Index q of step s stands at q + s: its window reaches back to q + s - WINDOW + 1."""
    sample = random_sample("a", 40)
    features, at = features_of(sample), 20

    def states(model: Eagle3Model, changed: int) -> list[torch.Tensor]:
        hidden = features.hidden.clone()
        hidden[changed] += 1.0
        moved = evolve(sample, features=TargetFeatures(hidden=hidden, last_hidden=features.last_hidden))
        batch = padded_batch(model, prepare(model, [moved]))
        first, later = model.unroll(batch, Places.of(batch, model.window))
        return [first[0, at], *(state[batch.prepared["later_index"].tolist().index(at)] for state in later)]

    sliding = make_model(window=WINDOW)
    unseen = states(sliding, 0)
    for changed in range(at - WINDOW, at):
        for step, (one, other) in enumerate(zip(states(sliding, changed), unseen, strict=True)):
            # What a step saw reaches the later ones through its output.
            seen = at - WINDOW + 1 <= changed
            assert ((one - other).abs().max() > 1e-4) == seen, (changed, step)


def test_the_cache_does_not_grow(make_model: MakeModel) -> None:
    def kept(window: int | None, max_length: int) -> int:
        proposer = make_model(window=window).proposer()
        proposer.open_slots(2, max_length)
        return sum(cache.keys_SGLD.numel() for cache in proposer._caches)

    assert kept(WINDOW, 1000) == kept(WINDOW, 100_000) < kept(None, 1000) / 3


def test_a_window_smaller_than_a_proposal_is_refused(make_model: MakeModel) -> None:
    make_model(window=4, ttt_length=4)
    with pytest.raises(ConfigError, match="at least") as refused:
        make_model(window=3, ttt_length=4)
    assert refused.value.where == "[draft.layer] window"
