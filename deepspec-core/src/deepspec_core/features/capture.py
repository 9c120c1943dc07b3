"""Runs the target over samples to compute their features, in batches of similar length.

Knows batches and the type in which features are stored; does not know where they go or how they are used.

Legend: T tokens, C channels: taps * H, or H.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

import torch
from attrs import evolve
from torch import Tensor

from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures, TargetModel
from deepspec_core.data.collate import pad_ids
from deepspec_core.data.samples import as_samples
from deepspec_core.errors import CacheError


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
    CacheError where a feature is not finite in `dtype`: float16 ends at 65,504.
    """
    dtype = target.dtype if dtype is None else dtype
    samples = as_samples(samples)
    order = samples.longest_first()
    for first in range(0, len(order), batch_size):
        batch = [samples.sample(int(number)) for number in order[first : first + batch_size]]
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
                computed = TargetFeatures(
                    hidden=features.hidden[row, :length], last_hidden=features.last_hidden[row, :length]
                )
                require_finite(stored, computed, taps, sample.id)
                yield evolve(sample, features=stored)


def require_finite(kept: TargetFeatures, computed: TargetFeatures, taps: Sequence[int], sample: str) -> None:
    """CacheError, naming layer and value, where a feature is not finite in the type it is kept in."""
    _require_finite(kept.hidden, computed.hidden, [f"layer {tap}" for tap in taps], sample)
    _require_finite(kept.last_hidden, computed.last_hidden, ["the last layer"], sample)


def _require_finite(kept_TC: Tensor, computed_TC: Tensor, layers: Sequence[str], sample: str) -> None:
    if bool(torch.isfinite(kept_TC).all()):
        return
    token, channel = (int(index) for index in torch.nonzero(~torch.isfinite(kept_TC))[0])
    value, range_ = float(computed_TC[token, channel]), torch.finfo(kept_TC.dtype)
    fits = math.isfinite(value)
    dtype = str(kept_TC.dtype).removeprefix("torch.")
    raise CacheError(
        f"A feature does not fit {dtype}" if fits else "The target computed a feature that is not finite",
        where=f"sample {sample}, token {token}, {layers[channel * len(layers) // kept_TC.shape[1]]}",
        found=f"{value:,g}",
        expected=f"{range_.min:,g} to {range_.max:,g}" if fits else "a finite number",
        fix='Set cache.dtype = "bfloat16".'
        if fits
        else "Set target.dtype to a wider type, or examine the sample and the target's weights.",
    )
