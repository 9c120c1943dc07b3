"""Clauses about a trained draft's weights: in its checkpoint, in bfloat16, and those that it takes from its target.

This file knows checkpoints, dtypes and the contract of drafts. It does not know how a draft is trained.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import SkipTest

import torch
from attrs import evolve
from torch import Tensor

from deepspec_core.checkpoints.options_back import lost_option
from deepspec_core.checkpoints.published import config_text, load_draft, save_draft
from deepspec_core.contracts.draft import DraftModel, Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.plugins.references import resolve
from deepspec_core.testing.changed_options import changed_options
from deepspec_core.testing.conformance import clause, require
from deepspec_core.testing.driven_proposer import GREEDY, SAMPLED, DrivenProposer
from deepspec_core.testing.global_draws import no_global_draws
from deepspec_core.testing.proposer_suite import LENGTHS, NODES, ProposerSuite, checked
from deepspec_core.testing.random_batches import features_of
from deepspec_core.testing.shifted import shifted

_ALGORITHM = "docs/plugins.md#an-algorithm"
_DESCRIPTION = "deepspec_core/contracts/draft.py: DraftDescription"
_TARGET = "docs/plugins.md#weights-of-the-target"


class DraftWeightsSuite(ProposerSuite):
    """Clauses of a draft's weights."""

    @abstractmethod
    def adapter(self) -> Any:
        """A contracts.target.TargetAdapter."""

    @abstractmethod
    def new_draft(self) -> DraftModel:
        """A draft as a run makes it."""

    @abstractmethod
    def draft(self) -> DraftModel:
        """A draft with large random weights."""

    def target_weights(self) -> Mapping[str, Tensor]:
        """The weights of a target's checkpoint that `describe().target_weights` asks for.

        A draft that asks for some overrides it. Names, shapes and dtypes matter; the values do not.
        """
        return {}

    @clause(
        "a saved draft is recognised as its type's alone, and proposes the same when it is loaded", written=_ALGORITHM
    )
    def test_a_checkpoint_is_the_same_draft(self) -> None:
        draft = self.draft()
        config = json.loads(config_text(draft, draft.describe(), self.adapter()))
        found = self.registry().recognise(config).name
        require(found == self.component, f"config.json is recognised as {found!r}")
        loaded = self._loaded(draft, torch.float32)
        require(
            loaded.describe() == draft.describe(), f"describe() says {loaded.describe()}, before {draft.describe()}"
        )
        mine, theirs = draft.state_dict(), loaded.state_dict()
        other = [name for name in mine if name not in theirs or not torch.equal(mine[name], theirs[name])]
        require(not other, f"other weights: {other}")
        for one, again in zip(self._two_rounds(draft), self._two_rounds(shifted(loaded)), strict=True):
            away = "another number of tokens" if one.lengths.tolist() != again.lengths.tolist() else None
            if away is None and one.probabilities is not None and again.probabilities is not None:
                gap = float((one.probabilities - again.probabilities).abs().max())
                away = f"probabilities that differ by up to {gap:.3g}" if gap > self.tolerance else None
            if away is None and not torch.equal(one.tokens, again.tokens):
                away = "other tokens"
            require(away is None, f"after loading: {away}. Is all that it computes with in state_dict()?")

    @clause(
        "every option comes back from config.json, whatever its value, but those in `unread_options`",
        written=_DESCRIPTION,
    )
    def test_options_come_back(self) -> None:
        given = self.made_options()
        if not given:
            raise SkipTest("it has no options")
        registry = self.registry()
        spec, build = registry.get("draft", self.component), registry.load("draft", self.component)
        taps = self.draft().describe().taps
        for name, others in [("", list(given)), *changed_options(given[0])]:
            for options in others:
                try:
                    draft = build(options, self.adapter(), taps)
                    config = json.loads(config_text(draft, draft.describe(), self.adapter()))
                except Exception:  # a value that does not fit the small target, or the other options
                    continue
                lost = lost_option(options, resolve(spec.options_of)(config)[0], draft.describe().unread_options)
                require(lost is None, f"{lost}" + (f", with another {name} than the suite's" if name else ""))
                break

    @clause("a draft that is loaded in bfloat16, as its target is, proposes what can be verified", written=_ALGORITHM)
    def test_decoding_in_bfloat16(self) -> None:
        draft = self._loaded(self.draft(), torch.bfloat16)
        for nodes in (None, NODES) if self.trees() else (None,):
            for sampling in (GREEDY, SAMPLED):
                driven = DrivenProposer(draft, num_slots=4, max_length=48, tree_nodes=nodes)
                taps = len(driven.proposer.taps)
                driven.start({slot: (_rounded(self.sample(slot, taps)), LENGTHS[slot]) for slot in range(4)})
                checked(driven, [0, 1, 2, 3], sampling)
                driven.accept({1: 1, 3: min(2, driven.proposer.max_tokens + 1)})
                checked(driven, [1, 3], sampling)

    @clause(
        "`adopt_weights` copies numbers of the target's weights into weights of its own, not into embedding or lm_head",
        written=_TARGET,
    )
    def test_weights_of_the_target(self) -> None:
        draft = self.new_draft()
        asked = tuple(draft.describe().target_weights)
        if not asked:
            raise SkipTest("it asks for no weights of the target beside the embedding and lm_head")
        names = self.target_weights()
        idle = [start for start in asked if not any(name.startswith(start) for name in names)]
        require(not idle, f"no weight for {idle} in what target_weights() of the suite's subclass gives")
        other = [name for name in names if not name.startswith(asked)]
        require(not other, f"weights {other}, and it asks for {asked}")
        before, first, second = _copied(draft.state_dict()), _random(names, 1), _random(names, 2)
        given = _copied(first)
        with no_global_draws():
            draft.adopt_weights(first)
        after = _copied(draft.state_dict())
        require(_changed(first, given) == [], f"it changes the target's {_changed(first, given)}")
        for name, part in before.items():
            found = after.get(name)
            same = found is not None and found.shape == part.shape and found.dtype == part.dtype
            require(same, f"{name} was {list(part.shape)} {part.dtype} and is {None if found is None else found.dtype}")
        shared = [name for name in _changed(before, after) if name.startswith(("embed_tokens.", "lm_head."))]
        require(not shared, f"it writes over {shared}, which are the target's")
        draft.adopt_weights(second)
        taken = _copied(draft.state_dict())
        require(_changed(after, taken), "no weight of the draft depends on the numbers that it is given")
        for part in second.values():
            part.zero_()
        lent = _changed(taken, draft.state_dict())
        require(not lent, f"{lent} are the target's memory, not copies")

    def _loaded(self, draft: DraftModel, dtype: torch.dtype) -> DraftModel:
        """The draft after saving and loading."""
        registry, adapter = self.registry(), self.adapter()
        with TemporaryDirectory() as folder:
            save_draft(draft, adapter, Path(folder) / "draft")
            return load_draft(Path(folder) / "draft", registry=registry, adapter=adapter, dtype=dtype)

    def _two_rounds(self, draft: DraftModel) -> list[Any]:
        driven = DrivenProposer(draft, num_slots=2, max_length=48)
        driven.start({1: (self.sample(1, len(driven.proposer.taps)), 6)})
        first = driven.propose([1], SAMPLED)
        driven.accept({1: 1})
        return [first, driven.propose([1], SAMPLED)]


def _rounded(sample: Sample) -> Sample:
    """The sample with its features rounded to bfloat16, as a target in bfloat16 gives them."""
    features = features_of(sample)
    hidden, last_hidden = features.hidden.bfloat16(), features.last_hidden.bfloat16()
    return evolve(sample, features=TargetFeatures(hidden=hidden, last_hidden=last_hidden))


def _random(like: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(part.shape, generator=generator).to(part.dtype) for name, part in like.items()}


def _copied(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: part.detach().clone() for name, part in weights.items()}


def _changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    return [name for name, part in before.items() if not torch.equal(part, after[name])]
