"""Statistics of one chunk of rows, from its logits. Each is computed on first use, and shared by terms and metrics.

Knows logits and labels. Does not know how they were formed, which terms read them, or how they are reduced.

Legend: N rows of the chunk, U distinct target positions among them, V the draft's vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec_core.errors import ConfigError
from deepspec_core.rows.reduced_vocabulary import ReducedVocabulary


class Undeclared(ConfigError):
    """A term or weighting reads something and has not declared that it does. `who` is known to whoever calls it."""

    def __init__(self, read: str, attribute: str, *, who: str | None = None, where: str = "[loss]") -> None:
        self.read, self.attribute = read, attribute
        super().__init__(
            f"{who or 'a loss term or weighting'} reads {read} without saying so beforehand",
            where=where,
            fix=f"give its class the attribute {attribute} = True",
        )


TARGET = "the target's distribution"


def known(ce_N: Tensor, inside_N: Tensor | None) -> Tensor:
    """Cross-entropies, where labels that the draft does not know have that of the smallest normal number."""
    if inside_N is None:
        return ce_N
    return torch.where(inside_N, ce_N, -math.log(torch.finfo(ce_N.dtype).tiny))


class ChunkStats:
    """contracts.loss.RowStats, computed from logits.

    `differentiable` decides whether statistics carry a gradient. The mode in which a statistic is first read does not:
    a weighting may read `ce` under no_grad before a term reads it, and the term still needs its gradient.
    """

    def __init__(
        self,
        *,
        base_logits_NV: Tensor | None,
        draft_logits_NV: Tensor,
        target_logits_UV: Tensor | None,
        target_row_N: Tensor | None,
        target_ids_N: Tensor | None,
        extras: Mapping[str, Tensor],
        differentiable: bool,
        reduced: ReducedVocabulary | None = None,
        whole: Callable[[], tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """`base` holds the capped logits before the correction; None if they may not be read. `draft` holds them with
        the correction, and is the same tensor where there is none.

        target_row_N is the row of `target_logits_UV` that each row is compared with. Both are None without a target. If
        target_ids_N is None, the target's argmax is the label.

        With a vocabulary that is `reduced`, `whole` gives the normaliser and the argmax over the target's, [U] each.
        """
        self._reduced, self._whole = reduced, whole
        self._base_logits_NV = base_logits_NV
        self._draft_logits_NV = draft_logits_NV
        self._target_logits_UV = target_logits_UV
        self._target_row_N = target_row_N
        self._target_ids_N = target_ids_N
        self._extras = extras
        self._differentiable = differentiable

    @property
    def draft_logits(self) -> Tensor:
        return self._draft_logits_NV

    @property
    def target_logits(self) -> Tensor:
        return self._target(self._target_logits_UV)

    @property
    def target_ids(self) -> Tensor:
        return self.target_argmax if self._target_ids_N is None else self._target_ids_N

    @property
    def extras(self) -> Mapping[str, Tensor]:
        return self._extras

    @cached_property
    def ce(self) -> Tensor:
        return self._cross_entropy(self._draft_log_probs_NV)

    @cached_property
    def ce_without_correction(self) -> Tensor:
        if self._base_logits_NV is None:
            raise Undeclared("ce_without_correction", "needs_uncorrected")
        if self._base_logits_NV is self._draft_logits_NV:
            return self.ce
        with torch.set_grad_enabled(self._differentiable):
            return self._cross_entropy(F.log_softmax(self._base_logits_NV, dim=-1))

    @cached_property
    def tv(self) -> Tensor:
        return self._total_variation(self._differentiable)

    @cached_property
    def overlap(self) -> Tensor:
        target_NV = self._target(self._whole_log_probs_UV.exp())
        with torch.set_grad_enabled(self._differentiable):
            return torch.minimum(self._draft_log_probs_NV.exp(), target_NV).sum(-1)

    @cached_property
    def soft_ce(self) -> Tensor:
        target_NV = self._target(self._target_log_probs_UV.exp())
        with torch.set_grad_enabled(self._differentiable):
            return -(target_NV * self._draft_log_probs_NV).sum(-1)

    @cached_property
    def kl(self) -> Tensor:
        target_NV = self._target(self._target_log_probs_UV)
        with torch.set_grad_enabled(self._differentiable):
            return (target_NV.exp() * (target_NV - self._draft_log_probs_NV)).sum(-1)

    @cached_property
    def acceptance(self) -> Tensor:
        # If no term trains tv, its graph would be kept for nothing.
        tv_N = self.__dict__["tv"].detach() if "tv" in self.__dict__ else self._total_variation(False)
        return (1.0 - tv_N / 2.0).clamp(0.0, 1.0)

    @cached_property
    def draft_argmax(self) -> Tensor:
        argmax_N = self._draft_logits_NV.detach().argmax(-1)
        return argmax_N if self._reduced is None else self._reduced.tokens(argmax_N)

    @cached_property
    def target_argmax(self) -> Tensor:
        if self._target_logits_UV is None:
            raise Undeclared(TARGET, "needs_target")
        return self._target(self._target_logits_UV.argmax(-1) if self._whole is None else self._whole()[1])

    @cached_property
    def _draft_log_probs_NV(self) -> Tensor:
        with torch.set_grad_enabled(self._differentiable):
            return F.log_softmax(self._draft_logits_NV, dim=-1)

    @cached_property
    def _target_log_probs_UV(self) -> Tensor:
        if self._target_logits_UV is None:
            raise Undeclared(TARGET, "needs_target")
        return F.log_softmax(self._target_logits_UV, dim=-1)

    @cached_property
    def _whole_log_probs_UV(self) -> Tensor:
        """Of the target's whole distribution, at the draft's tokens."""
        if self._whole is None or self._target_logits_UV is None:
            return self._target_log_probs_UV
        return self._target_logits_UV - self._whole()[0][:, None]

    def _target(self, per_position: Tensor | None) -> Tensor:
        if per_position is None:
            raise Undeclared(TARGET, "needs_target")
        assert self._target_row_N is not None
        return per_position[self._target_row_N]

    def _cross_entropy(self, log_probs_NV: Tensor) -> Tensor:
        with torch.set_grad_enabled(self._differentiable):
            if self._reduced is None:
                return F.nll_loss(log_probs_NV, self.target_ids, reduction="none")
            columns_N = self._reduced.columns(self.target_ids)
            return known(F.nll_loss(log_probs_NV, columns_N.clamp(min=0), reduction="none"), columns_N >= 0)

    def _total_variation(self, differentiable: bool) -> Tensor:
        target_NV = self._target(self._whole_log_probs_UV.exp())
        with torch.set_grad_enabled(differentiable):
            tv_N = (self._draft_log_probs_NV.exp() - target_NV).abs().sum(-1)
            return tv_N if self._whole is None else tv_N + (1.0 - target_NV.sum(-1)).clamp(min=0.0)
