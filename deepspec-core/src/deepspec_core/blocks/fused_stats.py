"""Statistics of one chunk of rows without differentiable logits: a handful of passes, and gradients by formula.

contracts.loss.RowStats whose differentiable statistics are leaves of [N] values. Terms build on them with autograd;
what arrives at the leaves is turned into the gradient of the logits by one more pass (row_kernels.py). Knows logits,
labels and kernels; not which terms read what, nor how they are reduced.

Legend: N rows of the chunk, U rows of the target window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from deepspec_core.blocks.row_kernels import Comparison, Incoming, Logits, RowKernels, logit_values
from deepspec_core.blocks.target_window import TargetWindow
from deepspec_core.errors import ConfigError

# Statistics of draft and target together, and those at the label.
_OF_BOTH = frozenset({"tv", "overlap", "soft_ce", "kl"})
_OF_LABELS = frozenset({"ce", "ce_without_correction"})


class FusedStats:
    """`gradient` may be called once, and overwrites the logits it was made from."""

    def __init__(
        self,
        *,
        kernels: RowKernels,
        draft: Logits,
        target: TargetWindow | None,
        target_ids_N: Tensor | None,
        extras: Mapping[str, Tensor],
        differentiable: bool,
    ) -> None:
        """`draft` [N, V]; target_ids_N None takes the target's argmax as labels."""
        self._kernels = kernels
        self._draft = draft
        self._window = target
        self._target_ids_N = target_ids_N
        self._extras = extras
        self._differentiable = differentiable
        self._leaves: dict[str, Tensor] = {}

    @property
    def draft_logits(self) -> Tensor:
        raise self._no_logits("draft_logits")

    @property
    def target_logits(self) -> Tensor:
        raise self._no_logits("target_logits")

    @property
    def target_ids(self) -> Tensor:
        return self.target_argmax if self._target_ids_N is None else self._target_ids_N

    @property
    def extras(self) -> Mapping[str, Tensor]:
        return self._extras

    @property
    def ce(self) -> Tensor:
        return self._leaf("ce", lambda: self._lse_N - self._label_logit(self._draft))

    @property
    def ce_without_correction(self) -> Tensor:
        if self._draft.correction is None:
            return self.ce
        return self._leaf("ce_without_correction", lambda: self._base_lse_N - self._label_logit(self._base))

    @property
    def tv(self) -> Tensor:
        return self._leaf("tv", lambda: self._comparison.tv)

    @property
    def overlap(self) -> Tensor:
        return self._leaf("overlap", lambda: self._comparison.overlap)

    @property
    def soft_ce(self) -> Tensor:
        return self._leaf("soft_ce", lambda: self._comparison.soft_ce)

    @property
    def kl(self) -> Tensor:
        return self._leaf("kl", lambda: self._comparison.kl)

    @cached_property
    def acceptance(self) -> Tensor:
        return (1.0 - self._comparison.tv.detach() / 2.0).clamp(0.0, 1.0)

    @cached_property
    def draft_argmax(self) -> Tensor:
        return self._kernels.argmax(self._draft)

    @property
    def target_argmax(self) -> Tensor:
        return self._target.argmax()[self._target.row_N]

    def gradient(
        self, total: Tensor, extras: Mapping[str, Tensor]
    ) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor | None]]:
        """d total / d product [N, V], / d correction [N, V] (None where there is none) and / d each of `extras`.

        `total` [] is built on this object's statistics and extras. The first two None: it does not depend on logits.
        """
        leaves = {name: leaf for name, leaf in self._leaves.items() if leaf.requires_grad}
        found = torch.autograd.grad(total, [*leaves.values(), *extras.values()], allow_unused=True)
        of = {name: gradient for name, gradient in zip(leaves, found, strict=False) if gradient is not None}
        of_extras = found[len(leaves) :]
        if not of:
            return None, None, of_extras
        zero_N = torch.zeros_like(self._lse_N)
        incoming = Incoming(
            ce=of.get("ce", zero_N),
            soft=of.get("soft_ce", zero_N) + of.get("kl", zero_N),
            tv=of.get("tv", zero_N) - 0.5 * of.get("overlap", zero_N),
            ce_without_correction=of.get("ce_without_correction"),
        )
        compared = not of.keys().isdisjoint(_OF_BOTH)
        labelled = not of.keys().isdisjoint(_OF_LABELS)
        self._kernels.gradient(
            self._draft,
            self._lse_N,
            self.target_ids if labelled else torch.zeros_like(zero_N, dtype=torch.int64),
            incoming,
            target=self._target.logits if compared else None,
            target_lse_U=self._target.lse_U if compared else None,
            target_row_N=self._target.row_N if compared else None,
            below_N=self._comparison.below if compared else None,
            base_lse_N=None if incoming.ce_without_correction is None else self._base_lse_N,
        )
        return self._draft.product, self._draft.correction, of_extras

    def _leaf(self, name: str, value: Callable[[], Tensor]) -> Tensor:
        if name not in self._leaves:
            with torch.no_grad():
                self._leaves[name] = value().detach().requires_grad_(self._differentiable)
        return self._leaves[name]

    @staticmethod
    def _no_logits(name: str) -> ConfigError:
        return ConfigError(
            f"a loss term or weighting reads {name}, but fused kernels form no logits",
            where="[loss] kernels",
            fix='give the term the attribute needs_logits = True, or set kernels = "plain"',
        )

    @property
    def _target(self) -> TargetWindow:
        assert self._window is not None, "target statistics of rows without a target"
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
    def _comparison(self) -> Comparison:
        window = self._target
        return self._kernels.compare(self._draft, self._lse_N, window.logits, window.lse_U, window.row_N)

    def _label_logit(self, logits: Logits) -> Tensor:
        at_N1 = self.target_ids[:, None]
        picked = logits._replace(
            product=logits.product.gather(1, at_N1),
            correction=None if logits.correction is None else logits.correction.gather(1, at_N1),
        )
        return logit_values(picked)[:, 0]
