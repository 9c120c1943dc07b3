"""What loss terms and weightings are.

A loss term is a function of one row's statistics. A weighting is a function of whole blocks of rows, whose statistics
are detached.

Legend: N rows (of a chunk), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["LossTerm", "RowStats", "Weighting"]


@runtime_checkable
class RowStats(Protocol):
    """Statistics of a chunk of rows, computed once and shared, on first use. Each is [N] fp32 unless said otherwise.

    Those that need target logits are only there where rows carry `target_hidden`.
    """

    @property
    def ce(self) -> Tensor:
        """Cross-entropy of the draft at the label."""
        ...

    @property
    def ce_without_correction(self) -> Tensor:
        """The same before the low-rank correction is added: only for terms and weightings with `needs_uncorrected`,
        since elsewhere the correction may be added in place.
        """
        ...

    @property
    def tv(self) -> Tensor:
        """Sum over V of |softmax(draft) - softmax(target)|, between 0 and 2."""
        ...

    @property
    def overlap(self) -> Tensor:
        """Sum over V of min(softmax(draft), softmax(target)), differentiable: the acceptance rate; exact where it is
        near zero, which 1 - tv / 2 is not. Where the two are equal, each has half the gradient, as in tv.
        """
        ...

    @property
    def soft_ce(self) -> Tensor:
        """Cross-entropy of the draft at the target's distribution: kl plus the target's entropy."""
        ...

    @property
    def kl(self) -> Tensor:
        """KL(target || draft)."""
        ...

    @property
    def acceptance(self) -> Tensor:
        """1 - tv / 2, detached, clamped to [0, 1]: the analytic acceptance rate."""
        ...

    @property
    def draft_argmax(self) -> Tensor:
        """int64."""
        ...

    @property
    def target_argmax(self) -> Tensor:
        """int64."""
        ...

    @property
    def draft_logits(self) -> Tensor:
        """[N, V] fp32, capped and corrected: the plain path only, for terms with `needs_logits`."""
        ...

    @property
    def target_logits(self) -> Tensor:
        """[N, V] fp32, capped: the plain path only, for terms with `needs_logits`."""
        ...

    @property
    def target_ids(self) -> Tensor:
        """int64 labels; the target's argmax where rows carry none."""
        ...

    @property
    def extras(self) -> Mapping[str, Tensor]:
        """The rows' extras, chunked alike."""
        ...


@runtime_checkable
class LossTerm(Protocol):
    """One value per row. `needs_target`: it reads statistics of the target. `needs_extras`: names it reads of the
    extras. Two more are taken as False where a term does not say, and a weighting may say them too. `needs_logits`: it
    reads `draft_logits` or `target_logits`, which keeps a run on the plain path. `needs_uncorrected`: it reads
    `ce_without_correction`, which takes one more tensor of logits.
    """

    needs_target: bool
    needs_extras: tuple[str, ...]

    def __call__(self, stats: RowStats) -> Tensor:
        """[N] fp32, differentiable in the draft's logits and the extras."""
        ...


@runtime_checkable
class Weighting(Protocol):
    """How the rows of a block weigh, multiplied with the rows' own weight. Sees whole blocks; never differentiated."""

    def __call__(self, slot: Tensor, block: Tensor, stats: RowStats) -> Tensor:
        """slot and block [N] int64, statistics of the same rows (read under no_grad) -> weight [N] fp32."""
        ...
