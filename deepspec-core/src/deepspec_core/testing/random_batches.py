"""Random samples with features, and batches of them padded and packed in any way, for tests of drafts.

Sizes are those of the recorded targets (recorded.py): H 32, V 64, five taps.

Legend: B rows, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from deepspec_core.contracts.draft import DraftBatch, DraftModel, PreparedSample, Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.training.host_batch import placed

__all__ = [
    "TAPS",
    "features_of",
    "padded_batch",
    "prepare",
    "ragged_samples",
    "random_sample",
    "with_large_weights",
]

TAPS = (0, 2, 3, 5, 6)
"""The tapped layers whose features random samples carry."""
_H = 32
_GAPS = [0, 0, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1, 1, 0, 1, 1]

_Draft = TypeVar("_Draft", bound=nn.Module)


def with_large_weights(draft: _Draft) -> _Draft:
    """The draft with new random matrices, large enough that different inputs give clearly different outputs."""
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() >= 2:
                # In new memory, because the draft's embedding and lm_head may share memory with a target's.
                parameter.data = torch.empty_like(parameter).normal_(std=parameter.shape[-1] ** -0.5)
    return draft


def random_sample(
    name: str, length: int, mask: Sequence[int] | None = None, *, seed: int = 0, num_taps: int = len(TAPS)
) -> Sample:
    """A random sample with features. Its loss mask is `mask`, or all tokens but the first."""
    generator = torch.Generator().manual_seed(seed)
    supervised = torch.ones(length, dtype=torch.bool) if mask is None else torch.tensor(mask, dtype=torch.bool)
    supervised[0] = False
    return Sample(
        id=name,
        input_ids=torch.randint(2, 63, (length,), generator=generator),
        loss_mask=supervised,
        original_length=length,
        features=TargetFeatures(
            hidden=torch.randn(length, _H * num_taps, generator=generator),
            last_hidden=torch.randn(length, _H, generator=generator),
        ),
    )


def ragged_samples() -> list[Sample]:
    """Four samples: a long one, one supervised with gaps, one with few supervised tokens and one with none."""
    return [
        random_sample("long", 40, seed=1),
        random_sample("gaps", 18, _GAPS, seed=2),
        random_sample("few", 9, [0, 0, 0, 0, 0, 1, 1, 1, 0], seed=3),
        random_sample("none", 6, [0] * 6, seed=4),
    ]


def prepare(draft: DraftModel, samples: Sequence[Sample]) -> list[PreparedSample]:
    """The samples as the draft prepares them, the i-th with a generator of seed i."""
    return [draft.preparation.prepare(sample, np.random.default_rng(index)) for index, sample in enumerate(samples)]


def padded_batch(
    draft: DraftModel,
    prepared: Sequence[PreparedSample],
    *,
    extra: int = 0,
    filler: float = 0.0,
    rows: Sequence[Sequence[int]] | None = None,
) -> DraftBatch:
    """A batch of prepared samples, padded by `extra` positions more than needed. Features are `filler` there.

    `rows` packs them: each entry lists the samples of one row, which follow each other without a gap.
    """
    grouped = [[one] for one in prepared] if rows is None else [[prepared[index] for index in row] for row in rows]
    width = max(sum(len(one.sample.input_ids) for one in row) for row in grouped) + extra

    def padded(part: Callable[[Sample], Tensor], value: float = 0.0) -> Tensor:
        joined_B = [torch.cat([part(one.sample) for one in row]) for row in grouped]
        full_T = joined_B[0].new_zeros(width, *joined_B[0].shape[1:])
        return pad_sequence([*joined_B, full_T], batch_first=True, padding_value=value)[:-1]

    joined = [one for row in grouped for one in row]
    if rows is not None:
        joined = placed(joined, [len(row) for row in grouped])
    number = {id(one.sample): index for index, one in enumerate(joined)}
    return DraftBatch(
        input_ids=padded(lambda sample: sample.input_ids),
        loss_mask=padded(lambda sample: sample.loss_mask),
        attention_mask=padded(lambda sample: torch.ones_like(sample.loss_mask)),
        features=TargetFeatures(
            hidden=padded(lambda sample: features_of(sample).hidden, filler),
            last_hidden=padded(lambda sample: features_of(sample).last_hidden, filler),
        ),
        prepared=draft.preparation.collate(joined),
        position_ids=None if rows is None else padded(lambda sample: torch.arange(len(sample.input_ids))),
        document_ids=None
        if rows is None
        else padded(lambda sample: torch.full_like(sample.input_ids, number[id(sample)]), -1),
    )


def features_of(sample: Sample) -> TargetFeatures:
    """The features of a sample that has them."""
    assert sample.features is not None
    return sample.features
