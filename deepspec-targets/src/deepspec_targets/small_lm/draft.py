"""A small language model as a draft: whether it goes with a target, and what it says of itself.

Knows models by contract. How it proposes is proposer.py's.
"""

from __future__ import annotations

from functools import cached_property

from deepspec_core.contracts.proposer import Proposer
from deepspec_core.contracts.untrained import Surroundings, UntrainedDescription
from deepspec_core.errors import CheckpointError
from deepspec_targets.small_lm.options import SmallLMOptions
from deepspec_targets.small_lm.proposer import SmallLMProposer
from deepspec_targets.small_lm.vocabulary import differences


class SmallLM:
    """The draft. CheckpointError where its tokenizer is not the target's."""

    def __init__(self, options: SmallLMOptions, surroundings: Surroundings) -> None:
        self.options, self.target = options, surroundings.architecture
        self.model = surroundings.open_model(options.model, options.revision)
        differ = differences(self.model.tokenizer.get_vocab(), surroundings.tokenizer.get_vocab())
        if differ is not None:
            raise CheckpointError(
                "the draft's tokenizer is not the target's",
                where=f"[draft] model = {options.model}",
                found=differ,
                expected="the same id for every token",
                fix="Choose a model that has the target's tokenizer, mostly a smaller one of the same series.",
            )

    def describe(self) -> UntrainedDescription:
        """Facts, and a remark where the model has fewer positions than the target."""
        own, targets = self.model.architecture.max_positions, self.target.max_positions
        remark = f"{self.options.model} has {own:,} positions, the target {targets:,}: past them it proposes nothing"
        return UntrainedDescription(
            algorithm="small-lm",
            max_tokens=self.options.max_tokens,
            num_layers=self.model.architecture.num_layers,
            remarks=(remark,) if own < targets else (),
        )

    def digest(self) -> str:
        """That of the model's files."""
        return self.model.digest()

    def proposer(self) -> Proposer:
        """The one proposer, with the model's weights."""
        return self._proposer

    @cached_property
    def _proposer(self) -> SmallLMProposer:
        return SmallLMProposer(self.model.load(), max_tokens=self.options.max_tokens, vocab_size=self.target.vocab_size)

    def parameters(self) -> int:
        """Those of the model."""
        return self.model.parameters()
