"""Running the target over samples to take its features, in batches of like length.

Knows batches and dtypes; not where features go nor what is done with them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from attrs import evolve

from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures, TargetModel
from deepspec_core.data.collate import pad_ids


def capture(
    samples: Sequence[Sample],
    target: TargetModel,
    taps: Sequence[int],
    *,
    batch_size: int,
    dtype: torch.dtype | None = None,
    done: Collection[str] = (),
) -> Iterator[Sample]:
    """The samples with features, on the CPU, in `dtype` (the target's own where None); longest first.

    Samples whose ids are in `done` are left out. Batches are laid out over all samples all the same, so a sample is
    computed beside the same neighbours, and comes out the same to the bit, whether or not a run was interrupted.
    """
    dtype = target.dtype if dtype is None else dtype
    order = sorted(samples, key=lambda sample: (-len(sample.input_ids), sample.id))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        if all(sample.id in done for sample in batch):
            continue
        input_ids, attention_mask = pad_ids(batch)
        with torch.no_grad():
            features = target.features(
                input_ids.to(target.device), attention_mask.to(target.device), None, None, tuple(taps)
            )
        hidden, last_hidden = features.hidden.to("cpu", dtype), features.last_hidden.to("cpu", dtype)
        for row, sample in enumerate(batch):
            if sample.id not in done:
                length = len(sample.input_ids)
                # Copies: a view would keep the whole batch alive.
                stored = TargetFeatures(
                    hidden=hidden[row, :length].clone(), last_hidden=last_hidden[row, :length].clone()
                )
                yield evolve(sample, features=stored)
