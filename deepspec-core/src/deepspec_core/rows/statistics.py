"""Statistics of one chunk of rows, from its logits. Each is computed on first use, and shared by terms and metrics.

Knows logits and labels. Does not know how they were formed, which terms read them, or how they are reduced.

Legend: N rows of the chunk, U distinct target positions among them, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from deepspec_core.errors import ConfigError


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
    ) -> None:
        """`base` holds the capped logits before the correction; None if they may not be read. `draft` holds them with
        the correction, and is the same tensor where there is none.

        target_row_N is the row of `target_logits_UV` that each row is compared with. Both are None without a target. If
        target_ids_N is None, the target's argmax is the label.
        """
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
        target_NV = self._target(self._target_log_probs_UV.exp())
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
        return self._draft_logits_NV.detach().argmax(-1)

    @cached_property
    def target_argmax(self) -> Tensor:
        if self._target_logits_UV is None:
            raise Undeclared(TARGET, "needs_target")
        return self._target(self._target_logits_UV.argmax(-1))

    @cached_property
    def _draft_log_probs_NV(self) -> Tensor:
        with torch.set_grad_enabled(self._differentiable):
            return F.log_softmax(self._draft_logits_NV, dim=-1)

    @cached_property
    def _target_log_probs_UV(self) -> Tensor:
        if self._target_logits_UV is None:
            raise Undeclared(TARGET, "needs_target")
        return F.log_softmax(self._target_logits_UV, dim=-1)

    def _target(self, per_position: Tensor | None) -> Tensor:
        if per_position is None:
            raise Undeclared(TARGET, "needs_target")
        assert self._target_row_N is not None
        return per_position[self._target_row_N]

    def _cross_entropy(self, log_probs_NV: Tensor) -> Tensor:
        with torch.set_grad_enabled(self._differentiable):
            return F.nll_loss(log_probs_NV, self.target_ids, reduction="none")

    def _total_variation(self, differentiable: bool) -> Tensor:
        target_NV = self._target(self._target_log_probs_UV.exp())
        with torch.set_grad_enabled(differentiable):
            return (self._draft_log_probs_NV.exp() - target_NV).abs().sum(-1)
