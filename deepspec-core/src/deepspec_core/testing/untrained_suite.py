"""UntrainedDraftSuite: the clauses of drafts that are not trained. Knows their contract and that of proposers."""

from __future__ import annotations

from typing import Any, NoReturn

from deepspec_core.contracts.untrained import Surroundings, UntrainedDescription, UntrainedDraft
from deepspec_core.testing.conformance import clause, require
from deepspec_core.testing.proposer_suite import ProposerSuite
from deepspec_core.testing.tiny_tokenizer import tiny_tokenizer

_DRAFT = "deepspec_core/contracts/untrained.py: UntrainedDraft"
_PAGE = "docs/plugins.md#a-draft-that-is-not-trained"


class UntrainedDraftSuite(ProposerSuite):
    """Clauses of `contracts.untrained.UntrainedDraft`, and of its proposer.

    Texts repeat themselves, so that a draft that looks for repetitions finds some.
    """

    distinct_tokens = 4

    def surroundings(self) -> Surroundings:
        """Facts about the target, which has 64 tokens. A draft that opens a model overrides it."""
        target = self.target()
        return Surroundings(
            architecture=target.architecture,
            tokenizer=tiny_tokenizer(),
            dtype=target.dtype,
            device=target.device,
            open_model=_no_model,
        )

    def draft(self) -> UntrainedDraft:
        """A new draft."""
        build = self.registry().load("draft", self.component)
        made: UntrainedDraft = build(*(self.made_options() or (None,)), self.surroundings())
        return made

    def source(self) -> Any:
        """A new draft, because all calls of `proposer` may return the same one."""
        return self.draft()

    @clause("the spec says `trained=False`, and `build(options, surroundings)` gives a draft", written=_PAGE)
    def test_it_is_a_draft(self) -> None:
        require(not self.registry().get("draft", self.component).trained, "a spec of a draft that is trained")
        draft = self.draft()
        require(isinstance(draft, UntrainedDraft), f"{type(draft).__name__}, in which members are missing")

    @clause("`describe` gives the draft type and the most tokens of a round", written=_DRAFT)
    def test_it_describes_itself(self) -> None:
        draft = self.draft()
        said = draft.describe()
        require(isinstance(said, UntrainedDescription), type(said).__name__)
        require(said.algorithm == self.component, f"algorithm = {said.algorithm!r}, the spec's name {self.component!r}")
        most = draft.proposer().max_tokens
        require(said.max_tokens == most, f"max_tokens {said.max_tokens}, its proposer {most}")
        sentences = isinstance(said.remarks, tuple) and all(isinstance(one, str) for one in said.remarks)
        require(sentences, f"remarks = {said.remarks!r}, which are no sentences")

    @clause("`digest` is the same for the same draft, and `parameters` a whole number", written=_DRAFT)
    def test_it_is_told_apart(self) -> None:
        one, other = self.draft(), self.draft()
        require(isinstance(one.digest(), str), f"digest() = {one.digest()!r}")
        require(one.digest() == other.digest(), f"{one.digest()!r}, then {other.digest()!r}")
        one.proposer()
        number = one.parameters()
        require(type(number) is int and number >= 0, f"parameters() = {number!r}")

    @clause("texts are found in which it proposes something, or the suite tests nothing", written=_PAGE)
    def test_it_proposes_something(self) -> None:
        driven = self.driven()
        driven.start(self.prompts(driven))
        lengths = driven.propose(range(4)).lengths.tolist()
        require(any(lengths), f"{lengths} tokens for four texts: choose texts by overriding `sample`")


def _no_model(name: str, revision: str | None) -> NoReturn:
    raise AssertionError(f"the draft opens the model {name!r}: override `surroundings` with an `open_model`")
