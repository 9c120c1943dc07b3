"""Statistics of one chunk of rows, without autograd through logits: a few passes, and gradients by formula.

It is a contracts.loss.RowStats whose differentiable statistics are leaves of [N] values. Terms compute with these, and
autograd gives the gradients of the leaves. One more pass (kernels/) turns them into the gradient of the logits. Knows
logits, labels and kernels. Does not know which terms read what, or how they are reduced.

Legend: N rows of the chunk, U rows of the target window, V the draft's vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from deepspec_core.rows.kernels.formulas import Distance, Divergence, Incoming, Logits, RowKernels, logit_values
from deepspec_core.rows.reduced_vocabulary import ReducedVocabulary
from deepspec_core.rows.statistics import TARGET, Undeclared, known
from deepspec_core.rows.target_window import TargetWindow


class FusedStats:
    """RowStats by passes over the logits. `gradient` may be called once, and overwrites the logits."""

    def __init__(
        self,
        *,
        kernels: RowKernels,
        draft: Logits,
        target: TargetWindow | None,
        target_ids_N: Tensor | None,
        extras: Mapping[str, Tensor],
        differentiable: bool,
        uncorrected: bool,
        reduced: ReducedVocabulary | None = None,
    ) -> None:
        """`draft` is [N, V]. If target_ids_N is None, the target's argmax is the label.

        `uncorrected`: a term has said that it reads the logits before the correction, so the product is without it.
        """
        self._kernels = kernels
        self._draft = draft
        self._window = target
        self._target_ids_N = target_ids_N
        self._extras = extras
        self._differentiable = differentiable
        self._uncorrected = uncorrected
        self._reduced = reduced
        self._leaves: dict[str, Tensor] = {}

    @property
    def draft_logits(self) -> Tensor:
        raise Undeclared("draft_logits", "needs_logits")

    @property
    def target_logits(self) -> Tensor:
        raise Undeclared("target_logits", "needs_logits")

    @property
    def target_ids(self) -> Tensor:
        return self.target_argmax if self._target_ids_N is None else self._target_ids_N

    @property
    def extras(self) -> Mapping[str, Tensor]:
        return self._extras

    @property
    def ce(self) -> Tensor:
        return self._leaf("ce", lambda: self._cross_entropy(self._draft, self._lse_N))

    @property
    def ce_without_correction(self) -> Tensor:
        if not self._uncorrected:
            raise Undeclared("ce_without_correction", "needs_uncorrected")
        if self._draft.correction is None:
            return self.ce
        return self._leaf("ce_without_correction", lambda: self._cross_entropy(self._base, self._base_lse_N))

    @property
    def tv(self) -> Tensor:
        return self._leaf("tv", lambda: self._tv_N)

    @property
    def overlap(self) -> Tensor:
        return self._leaf("overlap", lambda: self._distance.overlap)

    @property
    def soft_ce(self) -> Tensor:
        return self._leaf("soft_ce", lambda: self._divergence.soft_ce)

    @property
    def kl(self) -> Tensor:
        return self._leaf("kl", lambda: self._divergence.kl)

    @cached_property
    def acceptance(self) -> Tensor:
        return (1.0 - self._tv_N / 2.0).clamp(0.0, 1.0)

    @cached_property
    def draft_argmax(self) -> Tensor:
        argmax_N = self._kernels.argmax(self._draft)
        return argmax_N if self._reduced is None else self._reduced.tokens(argmax_N)

    @property
    def target_argmax(self) -> Tensor:
        return self._target.argmax()[self._target.rows.row_N]

    def gradient(
        self, total: Tensor, extras: Mapping[str, Tensor]
    ) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor | None]]:
        """The gradients of `total` by product [N, V], by correction [N, V] (None without one), and by each of `extras`.

        `total` [] is computed from this object's statistics and extras. If it does not depend on the logits, the first
        two are None.
        """
        leaves = {name: leaf for name, leaf in self._leaves.items() if leaf.requires_grad}
        found = torch.autograd.grad(total, [*leaves.values(), *extras.values()], allow_unused=True)
        of = {name: gradient for name, gradient in zip(leaves, found, strict=False) if gradient is not None}
        of_extras = found[len(leaves) :]
        if not of:
            return None, None, of_extras
        incoming = Incoming(
            ce=of.get("ce"),
            soft=_sum(of.get("soft_ce"), of.get("kl")),
            tv=_sum(of.get("tv"), -0.5 * of["overlap"] if "overlap" in of else None),
            ce_without_correction=of.get("ce_without_correction"),
        )
        labelled = incoming.ce is not None or incoming.ce_without_correction is not None
        compared = incoming.soft is not None or incoming.tv is not None
        self._kernels.gradient(
            self._draft,
            self._lse_N,
            incoming,
            label_N=self._label_columns_N if labelled else None,
            target=None if not compared else self._target.rows if incoming.tv is None else self._target.whole_rows(),
            below_N=None if incoming.tv is None else self._distance.below,
            base_lse_N=None if incoming.ce_without_correction is None else self._base_lse_N,
        )
        return self._draft.product, self._draft.correction, of_extras

    def _leaf(self, name: str, value: Callable[[], Tensor]) -> Tensor:
        if name not in self._leaves:
            with torch.no_grad():
                self._leaves[name] = value().detach().requires_grad_(self._differentiable)
        return self._leaves[name]

    @property
    def _target(self) -> TargetWindow:
        if self._window is None:
            raise Undeclared(TARGET, "needs_target")
        return self._window

    @property
    def _base(self) -> Logits:
        return self._draft._replace(correction=None)

    @cached_property
    def _lse_N(self) -> Tensor:
        return self._kernels.normaliser(self._draft)

    @cached_property
    def _base_lse_N(self) -> Tensor:
        return self._kernels.normaliser(self._base)

    @cached_property
    def _distance(self) -> Distance:
        return self._kernels.distance(self._draft, self._lse_N, self._target.whole_rows())

    @cached_property
    def _tv_N(self) -> Tensor:
        """The draft gives nothing to what the target gives to tokens outside a reduced vocabulary."""
        if self._reduced is None:
            return self._distance.tv
        target = self._target.whole_rows()
        assert target.whole_lse_U is not None
        outside_U = (1.0 - (target.lse_U - target.whole_lse_U).exp()).clamp(min=0.0)
        return self._distance.tv + outside_U[target.row_N]

    @cached_property
    def _divergence(self) -> Divergence:
        return self._kernels.divergence(self._draft, self._lse_N, self._target.rows)

    @property
    def _label_columns_N(self) -> Tensor:
        """The column of each label; -1 for one that the draft does not know."""
        return self.target_ids if self._reduced is None else self._reduced.columns(self.target_ids)

    def _cross_entropy(self, logits: Logits, lse_N: Tensor) -> Tensor:
        columns_N = self._label_columns_N
        at_N1 = columns_N.clamp(min=0)[:, None]
        picked = logits._replace(
            product=logits.product.gather(1, at_N1),
            correction=None if logits.correction is None else logits.correction.gather(1, at_N1),
        )
        return known(lse_N - logit_values(picked)[:, 0], None if self._reduced is None else columns_N >= 0)


def _sum(one_N: Tensor | None, other_N: Tensor | None) -> Tensor | None:
    """The sum, in which None counts as zero; None if both are."""
    if one_N is None or other_N is None:
        return other_N if one_N is None else one_N
    return one_N + other_N
