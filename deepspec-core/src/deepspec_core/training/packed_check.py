"""Checks numerically, before the first step, whether the conversations of a packed row are kept separate.

Two made-up conversations share a row. The results for one must not change when the other is replaced. So a plugin's own
claim need not be trusted. This file knows the contracts of drafts and targets. It knows no run, algorithm or family.

Legend: T tokens, C = taps * H, H hidden size, N rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from deepspec_core.config.batching import not_apart
from deepspec_core.contracts.draft import DraftModel, Sample
from deepspec_core.contracts.features import FeatureSource
from deepspec_core.contracts.rows import Rows
from deepspec_core.contracts.target import TargetFeatures, TargetModel
from deepspec_core.errors import DeepSpecError, PluginError, TargetError
from deepspec_core.plugins.origin import component_of, package_of
from deepspec_core.plugins.references import FAILURES, blame
from deepspec_core.training.host_batch import HostBatch, host_batch
from deepspec_core.training.sampler import sample_rng

_LENGTH = 48
# The largest mean difference divided by the mean size. Kernels may add in another order for other numbers, but the
# results change far more if the other conversation is visible.
_ROUNDING = {torch.float32: 1e-5}
_COARSE = 1e-2


def check_target_apart(target: TargetModel, taps: Sequence[int]) -> None:
    """Raise TargetError if the target's features of a conversation depend on the one beside it."""
    vocab_size = target.architecture.vocab_size
    for kept in (0, 1):
        found = [_features(target, taps, seeds, kept, vocab_size) for seeds in _exchanged(kept)]
        if _differ(*found):
            raise not_apart(TargetError, "the target", f"{package_of(target)}, {component_of(target)}")


def check_draft_apart(draft: DraftModel, *, device: torch.device, compute_dtype: torch.dtype) -> None:
    """Raise PluginError if the draft's rows of a conversation depend on the one beside it."""
    bf16, where = compute_dtype == torch.bfloat16, f"{package_of(draft)}, {component_of(draft)}"
    for kept in (0, 1):
        found = []
        for seeds in _exchanged(kept):
            try:
                # The samples carry their features, so no feature source is used.
                batch = _packed(draft, seeds, kept).to_draft_batch(cast(FeatureSource, None), device)
                with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                    rows: Rows = draft(batch)
            except (DeepSpecError, torch.OutOfMemoryError):
                raise
            except FAILURES as error:
                raise not_apart(PluginError, "the draft", where, blame(error)) from error
            found.append(tuple(_tensors(rows)))
        if _differ(*found, coarse=bf16):
            raise not_apart(PluginError, "the draft", where)


def _exchanged(kept: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The seeds of the two conversations, and the same seeds with the conversation beside `kept` exchanged."""
    return ((1, 2), (1, 3)) if kept == 0 else ((1, 2), (3, 2))


def _features(
    target: TargetModel, taps: Sequence[int], seeds: Sequence[int], kept: int, vocab_size: int
) -> tuple[Tensor, Tensor]:
    ids_1T = torch.cat([_ids(seed, vocab_size) for seed in seeds])[None].to(target.device)
    position_1T = torch.arange(_LENGTH, device=target.device).repeat(2)[None]
    document_1T = torch.arange(2, device=target.device).repeat_interleave(_LENGTH)[None]
    features = target.features(ids_1T, torch.ones_like(ids_1T, dtype=torch.bool), position_1T, document_1T, taps)
    own = slice(kept * _LENGTH, (kept + 1) * _LENGTH)
    return features.hidden[0, own], features.last_hidden[0, own]


def _packed(draft: DraftModel, seeds: Sequence[int], kept: int) -> HostBatch:
    """A row of two conversations. Only `kept` is supervised, so all of the draft's rows belong to it."""
    target_VH, num_taps = draft.heads().target, len(draft.describe().taps)
    vocab_size, size = target_VH.shape
    samples = []
    for number, seed in enumerate(seeds):
        drawn = torch.Generator().manual_seed(seed)
        sample = Sample(
            id=f"made-up-{number}",
            input_ids=_ids(seed, vocab_size),
            loss_mask=(torch.arange(_LENGTH) > 0) & (number == kept),
            original_length=_LENGTH,
            features=TargetFeatures(
                hidden=torch.randn(_LENGTH, num_taps * size, generator=drawn),
                last_hidden=torch.randn(_LENGTH, size, generator=drawn),
            ),
        )
        samples.append(sample)
    prepared = [draft.preparation.prepare(sample, sample_rng(0, 0, sample.id)) for sample in samples]
    return host_batch(prepared, draft.preparation, row_sizes=(2,))


def _ids(seed: int, vocab_size: int) -> Tensor:
    return torch.randint(vocab_size, (_LENGTH,), generator=torch.Generator().manual_seed(seed))


def _tensors(rows: Rows) -> Iterator[Tensor]:
    """The tensors that the loss of the rows is computed from."""
    yield rows.hidden
    if rows.target_hidden is not None and rows.target_index is not None:
        yield rows.target_hidden[rows.target_index]
    for part in (rows.correction, rows.target_ids, rows.weight, rows.slot, rows.denominator, *rows.extras.values()):
        if part is not None:
            yield part


def _differ(found: Sequence[Tensor], expected: Sequence[Tensor], *, coarse: bool = False) -> bool:
    """Whether the difference is larger than rounding."""
    if [part.shape for part in found] != [part.shape for part in expected]:
        return True
    for one, other in zip(found, expected, strict=True):
        limit = _COARSE if coarse else _ROUNDING.get(one.dtype, _COARSE)
        difference = (one.double() - other.double()).abs().mean()
        if one.numel() and not bool(difference <= limit * other.double().abs().mean()):
            return True
    return False
