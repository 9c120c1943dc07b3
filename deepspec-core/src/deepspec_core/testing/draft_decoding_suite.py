"""Clauses that compare what a trained draft proposes with what training makes of the same text.

This file knows rows and proposals. It does not know how rows are prepared, or how a proposer comes to its tokens.

Legend: N rows, K proposed tokens at most, V the target's vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from deepspec_core.contracts.draft import DraftModel, PreparedSample, Sample
from deepspec_core.contracts.proposer import Proposal, Sampling
from deepspec_core.contracts.rows import Rows
from deepspec_core.testing.conformance import clause, require
from deepspec_core.testing.draft_weights_suite import DraftWeightsSuite
from deepspec_core.testing.driven_proposer import GREEDY, SAMPLED, DrivenProposer
from deepspec_core.testing.placed_rows import distributions
from deepspec_core.testing.random_batches import padded_batch, random_sample
from deepspec_core.testing.trained_blocks import blocks_after, wide

_SEES = "docs/plugins.md#what-a-draft-sees-of-the-target"
# Drawn anchors differ from draw to draw. Among this many draws, one has the anchor that is looked for.
_DRAWS = 24
# A text, the tokens of it that are the prompt, and how many tokens are committed after each proposal before the last.
_PLACES: tuple[tuple[int, int, tuple[int, ...]], ...] = ((0, 5, ()), (1, 9, (3, 1)), (2, 3, (1,)))


class DraftDecodingSuite(DraftWeightsSuite):
    """Clauses of a trained draft's proposals, beside its rows."""

    @abstractmethod
    def chosen_taps(self) -> tuple[int, ...]:
        """The taps, as the constructor gets them."""

    @abstractmethod
    def prepared(self, draft: DraftModel, samples: list[Sample] | None = None, seed: int = 0) -> list[PreparedSample]:
        """The samples as the draft prepares them, each with a generator of its own."""

    def proposed(self, draft: DraftModel, rows: Rows) -> Tensor:
        """The distributions [N, V] from which decoding draws at these rows of training: those of the heads.

        A draft that draws from other distributions overrides it.
        """
        return distributions(draft, rows)

    def chosen(self, draft: DraftModel, rows: Rows) -> Tensor:
        """Scores [N, V]: where no token is drawn, decoding proposes the token with the highest score of its row.

        These are the distributions of `proposed`. A draft that chooses tokens otherwise overrides it.
        """
        return self.proposed(draft, rows)

    @clause("decoding gives a token the distribution that training gives it in the same text", written=_SEES)
    def test_decoding_sees_what_training_sees(self) -> None:
        self._compare(SAMPLED)

    @clause("greedy decoding proposes the tokens that are most probable in training, each at its place", written=_SEES)
    def test_greedy_tokens_are_those_of_training(self) -> None:
        self._compare(GREEDY)

    def _compare(self, sampling: Sampling) -> None:
        """Compare proposals in known texts with training."""
        draft = self.draft()
        for index, length, counts in _PLACES:
            driven = DrivenProposer(draft, num_slots=5, max_length=48)
            text = self.sample(index, len(draft.proposer().taps))
            driven.start({2: (text, length)})
            at = length
            for count in counts:
                driven.propose([2], sampling)
                driven.accept({2: min(count, driven.proposer.max_tokens + 1)})
                at += min(count, driven.proposer.max_tokens + 1)
            proposal = driven.propose([2], sampling)
            self._compare_with_training(draft, text, at, proposal, greedy=sampling.temperature == 0)

    def _compare_with_training(
        self, draft: DraftModel, text: Sample, at: int, proposal: Proposal, *, greedy: bool
    ) -> None:
        """Compare a proposal for the tokens after position `at` with training, which is given the proposed tokens."""
        count = int(proposal.lengths[0])
        if count == 0:
            return
        tokens_K = proposal.tokens[0, :count]
        rows, blocks = self._trained_on(draft, text, at, tokens_K)
        require(blocks, f"training has no block for the tokens after position {at}, in {_DRAWS} draws")
        block = blocks[0]
        if greedy or proposal.probabilities is None:
            scores_NV = self.chosen(draft, rows).double()
            short = [_short_of_the_best(scores_NV[one], tokens_K) for one in blocks]
            most, place, best, block = min((*found, one) for found, one in zip(short, blocks, strict=True))
            words = f"token {place} after position {at} is {int(tokens_K[place])}, and the most probable is {best}"
            require(most <= self.tolerance, f"{words}, by {most:.3g}")
        else:
            q_KV = proposal.probabilities[0, :count].double()
            own_NV = self.proposed(draft, rows).double()
            gap, block = min((float((q_KV - own_NV[one]).abs().max()), one) for one in blocks)
            require(gap <= self.tolerance, f"probabilities after position {at} that differ by up to {gap:.3g}")
        if proposal.confidence is not None and "confidence_logits" in rows.extras:
            sure_K = rows.extras["confidence_logits"][block].detach()
            gap = float((proposal.confidence[0, : len(block)] - sure_K).abs().max())
            require(gap <= 10 * self.tolerance, f"confidence after position {at} that differs by up to {gap:.3g}")

    def _trained_on(self, draft: DraftModel, text: Sample, at: int, tokens_K: Tensor) -> tuple[Rows, Any]:
        """The rows of training on the text with these tokens after position `at`, and the blocks that predict them."""
        known = random_sample("known", len(text.input_ids), seed=0, num_taps=len(self.chosen_taps()))
        ids_T, count = text.input_ids.clone(), len(tokens_K)
        ids_T[at + 1 : at + 1 + count] = tokens_K
        features = wide(text, known)
        sample = Sample(
            id="known", input_ids=ids_T, loss_mask=known.loss_mask, original_length=len(ids_T), features=features
        )
        for draw in range(_DRAWS):
            rows = draft.train()(padded_batch(draft, self.prepared(draft, [sample], seed=draw)))
            draft.eval()
            blocks = blocks_after(rows, sample, at, count)
            if blocks:
                break
        return rows, blocks


def _short_of_the_best(scores_KV: Tensor, tokens_K: Tensor) -> tuple[float, int, int]:
    """By how much the worst of the tokens is less probable than the best of its row, its column, and that best."""
    best_K, ids_K = scores_KV.max(-1)
    short_K = best_K - scores_KV.gather(1, tokens_K[:, None])[:, 0]
    worst = int(short_K.argmax())
    return float(short_K[worst]), worst, int(ids_K[worst])
