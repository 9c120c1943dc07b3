"""Runs the training pass over samples with a finished draft: which token it predicts at each slot, and the label.

It is training's own pass: the draft's preparation, its forward, and the row engine with a term that only records. This
file knows drafts through their contract. It does not know where samples and features come from.

Legend: N rows, M blocks, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from attrs import evolve, frozen
from torch import Tensor

from deepspec_core.contracts.draft import DraftModel, Sample
from deepspec_core.contracts.loss import RowStats
from deepspec_core.contracts.rows import Rows
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.diagnosis.outcomes import Outcomes, of_blocks
from deepspec_core.rows.engine import RowEngine
from deepspec_core.rows.weighted import weighted
from deepspec_core.rows.weightings import Uniform
from deepspec_core.training.host_batch import host_batch
from deepspec_core.training.sampler import sample_rng


@frozen(kw_only=True, eq=False)
class Said:
    """The rows of one sample, in the order of blocks and slots: [N] each.

    said: The draft's most probable token. labels: The label. acceptance: The acceptance rate at temperature 1; NaN
        where the row has no target distribution. fit: Whether the row's output is finite. distributions: [N, V], the
        draft's distribution over the target's vocabulary; None if it was not asked for.
    """

    sample: Sample
    block: Tensor
    slot: Tensor
    said: Tensor
    labels: Tensor
    acceptance: Tensor
    fit: Tensor
    distributions: Tensor | None = None

    @property
    def matched(self) -> Tensor:
        """Whether the draft's most probable token is the label, [N]."""
        return (self.said == self.labels) & self.fit


class _Look:
    """A loss term that records the statistics that it is given."""

    needs_extras: tuple[str, ...] = ()
    needs_logits = True

    def __init__(self, *, needs_target: bool, spread: Callable[[Tensor], Tensor] | None) -> None:
        self.needs_target, self.spread = needs_target, spread
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []
        self.distributions: list[Tensor] = []

    def __call__(self, stats: RowStats) -> Tensor:
        acceptance = stats.acceptance if self.needs_target else torch.full_like(stats.ce, torch.nan)
        self.seen.append((stats.draft_argmax, stats.target_ids, acceptance))
        if self.spread is not None:
            self.distributions.append(self.spread(stats.draft_logits).softmax(-1).float().cpu())
        return torch.zeros_like(stats.ce)


@torch.no_grad()
def said_of(
    draft: DraftModel,
    samples: Sequence[Sample],
    *,
    device: torch.device,
    seed: int,
    compute_dtype: torch.dtype = torch.float32,
    keep_distributions: bool = False,
) -> Iterator[Said]:
    """The draft's predictions for each sample. Samples carry their features, and each is a batch of its own.

    With `compute_dtype` bfloat16 the pass runs under autocast, as in training. Draws depend on `seed` and the sample's
    id.
    """
    for sample in samples:
        prepared = draft.preparation.prepare(sample, sample_rng(seed, 0, sample.id))
        batch = host_batch([prepared], draft.preparation).to_draft_batch(_Stored(), device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=compute_dtype == torch.bfloat16):
            rows = weighted(draft(batch))
            fit_N = rows.hidden.isfinite().all(-1)
            needs_target = rows.target_hidden is not None
            if needs_target and rows.target_index is not None:
                assert rows.target_hidden is not None
                fit_N = fit_N & rows.target_hidden.isfinite().all(-1)[rows.target_index]
            look = _Look(needs_target=needs_target, spread=draft.spread if keep_distributions else None)
            engine = RowEngine({"look": (look, 1.0)}, Uniform(), kernels="plain")
            engine(_finite(rows), draft.heads())
        said, labels, acceptance = (
            torch.cat(parts).cpu() if parts else torch.zeros(0, dtype=torch.long)
            for parts in (list(column) for column in (zip(*look.seen, strict=True) if look.seen else ((), (), ())))
        )
        yield Said(
            sample=sample,
            block=rows.block.cpu(),
            slot=rows.slot.cpu(),
            said=said,
            labels=labels,
            acceptance=acceptance.float(),
            fit=fit_N.cpu(),
            distributions=torch.cat(look.distributions) if look.distributions else None,
        )


def outcomes_of(said: Sequence[Said]) -> Outcomes:
    """The outcomes of the blocks of several samples; a sample is a group."""
    slots = max((int(one.slot.max()) + 1 for one in said if len(one.slot)), default=0)
    groups: list[int] = []
    matched, counted = [np.zeros((0, slots), dtype=bool)], [np.zeros((0, slots), dtype=bool)]
    for number, one in enumerate(said):
        blocks_N = torch.unique_consecutive(one.block, return_inverse=True)[1]
        size = int(blocks_N.max()) + 1 if len(blocks_N) else 0
        flags = torch.zeros(2, size, slots, dtype=torch.bool)
        flags[0, blocks_N, one.slot], flags[1, blocks_N, one.slot] = one.matched, True
        groups += [number] * size
        matched.append(flags[0].numpy())
        counted.append(flags[1].numpy())
    found = of_blocks(groups, np.concatenate(matched), np.concatenate(counted))
    return evolve(found, unfit=int(sum((~one.fit).sum() for one in said)))


def acceptance_rates(said: Sequence[Said]) -> list[float]:
    """By slot, the mean acceptance rate at temperature 1. Empty if the rows have no target distribution."""
    slot = torch.cat([one.slot for one in said]) if said else torch.zeros(0, dtype=torch.long)
    rate = torch.cat([one.acceptance for one in said]) if said else torch.zeros(0)
    if not len(rate) or bool(rate.isnan().any()):
        return []
    return [float(rate[slot == k].mean()) for k in sorted(set(slot.tolist()))]


def _finite(rows: Rows) -> Rows:
    """The rows with values that are not finite replaced, because these would spread through sums. `fit` counts them."""
    return evolve(
        rows,
        hidden=rows.hidden.nan_to_num(0.0, 0.0, 0.0),
        target_hidden=None if rows.target_hidden is None else rows.target_hidden.nan_to_num(0.0, 0.0, 0.0),
        correction=None if rows.correction is None else rows.correction.nan_to_num(0.0, 0.0, 0.0),
        extras={},
    )


class _Stored:
    """Takes the place of a feature source, because every sample carries its features."""

    def __len__(self) -> int:
        return 0

    def lengths(self) -> Sequence[int]:
        return ()

    def __getitem__(self, index: int) -> Sample:
        raise AssertionError("samples bring their features")

    def features(self, samples: Sequence[Sample], input_ids: Tensor, attention_mask: Tensor) -> TargetFeatures:
        raise AssertionError("samples bring their features")
