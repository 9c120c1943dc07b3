"""The contracts of loss terms and weightings.

A loss term computes one value from the statistics of one row. A weighting computes the weights of the rows of whole
blocks; the statistics that it reads carry no gradient.

Legend: N rows (of a chunk), V the target's vocabulary, D the draft's (V if it is not reduced).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["LossTerm", "RowStats", "Weighting"]


@runtime_checkable
class RowStats(Protocol):
    """Statistics of a chunk of rows, each computed on first use and then shared. Most are [N] fp32.

    Statistics that need the target's logits exist only if the rows carry `target_hidden`.

    With a reduced vocabulary (`Heads.draft_ids`), the draft's probability of a token outside it is 0. tv, overlap and
    acceptance compare with the target's whole distribution. soft_ce and kl would then be infinite, so they compare with
    the target's distribution over the draft's tokens, renormalised. Tokens are ids of the target's vocabulary.
    """

    @property
    def ce(self) -> Tensor:
        """Cross-entropy of the draft at the label.

        At a label outside a reduced vocabulary it is -log of the smallest normal number, without gradient. Such rows
        have the weight 0.
        """
        ...

    @property
    def ce_without_correction(self) -> Tensor:
        """Cross-entropy of the draft at the label before the low-rank correction is added. Only terms and weightings
        with `needs_uncorrected` may read it, because for others the correction may be added in place.
        """
        ...

    @property
    def tv(self) -> Tensor:
        """Sum over V of |softmax(draft) - softmax(target)|, between 0 and 2."""
        ...

    @property
    def overlap(self) -> Tensor:
        """Sum over V of min(softmax(draft), softmax(target)), differentiable. This is the acceptance rate. It is exact
        also near zero, where 1 - tv / 2 is not. Where the two probabilities are equal, each gets half of the gradient,
        as in tv.
        """
        ...

    @property
    def soft_ce(self) -> Tensor:
        """Cross-entropy of the draft under the target's distribution, which is kl plus the target's entropy."""
        ...

    @property
    def kl(self) -> Tensor:
        """KL(target || draft)."""
        ...

    @property
    def acceptance(self) -> Tensor:
        """The acceptance rate as 1 - tv / 2, without gradient, clamped to [0, 1]."""
        ...

    @property
    def draft_argmax(self) -> Tensor:
        """The draft's most probable token, int64."""
        ...

    @property
    def target_argmax(self) -> Tensor:
        """The target's most probable token, int64."""
        ...

    @property
    def draft_logits(self) -> Tensor:
        """[N, D] fp32, soft-capped and corrected. Only terms with `needs_logits` may read it; they run on the plain
        path.
        """
        ...

    @property
    def target_logits(self) -> Tensor:
        """[N, D] fp32, soft-capped, for the draft's tokens. Only terms with `needs_logits` may read it; they run on the
        plain path.
        """
        ...

    @property
    def target_ids(self) -> Tensor:
        """The labels, int64: the rows' `target_ids` if given, else the target's argmax."""
        ...

    @property
    def extras(self) -> Mapping[str, Tensor]:
        """The extras of the chunk's rows."""
        ...


@runtime_checkable
class LossTerm(Protocol):
    """Computes one value per row. It keeps nothing of a call: what it kept would keep the call's logits in memory.

    needs_target: Whether it reads statistics of the target.
    needs_extras: The names of the extras that it reads.

    Two more attributes are optional, also for weightings. A missing one counts as False.

    needs_logits: Whether it reads `draft_logits` or `target_logits`. A run with such a term uses the plain path.
    needs_uncorrected: Whether it reads `ce_without_correction`, which takes memory for one more tensor of logits.
    """

    needs_target: bool
    needs_extras: tuple[str, ...]

    def __call__(self, stats: RowStats) -> Tensor:
        """[N] fp32, differentiable in the draft's logits and the extras."""
        ...


@runtime_checkable
class Weighting(Protocol):
    """Computes how much each row of a block counts. Its result is multiplied by the rows' own weight.

    It is called with whole blocks. No gradient flows through it. It keeps nothing between calls and writes into nothing
    that it is given. It reads no extras, because it cannot say which ones it needs. Slots that are not supervised have
    no row, so a row's slot number may be larger than its place in the block.

    needs_target: Whether it reads statistics of the target. Optional; a missing one counts as False.
    """

    def __call__(self, slot: Tensor, block: Tensor, stats: RowStats) -> Tensor:
        """The weights [N] fp32 of rows with these slots and blocks, [N] int64. `stats` are read under no_grad."""
        ...
