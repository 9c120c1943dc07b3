"""Made-up samples of a run, for trying and estimating its training before there is any data.

They have the sizes of real samples and arbitrary values. Features may be fake tensors (estimating/memory.py).

Legend: T tokens, C = taps * H, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from deepspec_core.contracts.draft import DraftModel, Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.dtypes import torch_dtype
from deepspec_core.pipeline.run import Run
from deepspec_core.training.host_batch import HostBatch, host_batch
from deepspec_core.training.sampler import sample_rng


def made_up_features(run: Run, length: int) -> TargetFeatures:
    """Features of one sample of `length` tokens, in the dtype in which a cache of this run returns them."""
    dtype, size = torch_dtype(run.file.cache.dtype), run.target.architecture.hidden_size
    dtype = torch.bfloat16 if dtype.itemsize == 1 else dtype
    return TargetFeatures(
        hidden=torch.empty(length, len(run.file.target.layers) * size, dtype=dtype),
        last_hidden=torch.empty(length, size, dtype=dtype),
    )


def made_up_samples(count: int, length: int, features: TargetFeatures | None) -> list[Sample]:
    """`count` samples of `length` tokens, supervised from their second token on."""
    return [
        Sample(
            id=f"made-up-{number}",
            input_ids=torch.zeros(length, dtype=torch.long),
            loss_mask=torch.arange(length) > 0,
            original_length=length,
            features=features,
        )
        for number in range(count)
    ]


def made_up_batch(draft: DraftModel, samples: Sequence[Sample], seed: int, *, packed: bool = False) -> HostBatch:
    """These samples as a micro-batch of this draft, a row for each of them or all in one."""
    preparation = draft.preparation
    prepared = [preparation.prepare(sample, sample_rng(seed, 0, sample.id)) for sample in samples]
    return host_batch(prepared, preparation, row_sizes=(len(prepared),) if packed else None)
