"""A padded micro-batch on the host, and how it becomes a draft's batch on the device.

A row holds one sample, or several one after another. Knows padding, packing and feature sources. Does not know what the
algorithm's own tensors mean.

Legend: B rows, M samples (M = B unless packed), T tokens of the longest row, C = taps * H, H hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from attrs import evolve, frozen
from torch import Tensor

from deepspec_core.contracts.draft import DraftBatch, Preparation, PreparedSample, Sample
from deepspec_core.contracts.features import FeatureSource
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.data.collate import pad, pad_features, pad_ids
from deepspec_core.training.one_buffer import Part, joined, split

_ALWAYS = ("input_ids", "loss_mask", "attention_mask")
_PACKED = ("position_ids", "document_ids")
_PREPARED = "prepared."


@frozen(kw_only=True, eq=False)
class HostBatch:
    """A right-padded micro-batch. input_ids, loss_mask and attention_mask are [B, T]; padding is 0 and false.

    features: [B, T, C] and [B, T, H]; None if the samples came without features.
    samples: The M samples of the batch, row by row, without their features.
    prepared: The algorithm's own tensors.
    counts: The sums of what the preparation counted.
    row_sizes: How many samples each row has. position_ids and document_ids: [B, T], as in DraftBatch. All three are
        None if nothing is packed.
    """

    samples: tuple[Sample, ...]
    input_ids: Tensor
    loss_mask: Tensor
    attention_mask: Tensor
    features: TargetFeatures | None
    prepared: Mapping[str, Tensor]
    counts: Mapping[str, int]
    row_sizes: tuple[int, ...] | None = None
    position_ids: Tensor | None = None
    document_ids: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes the tensors go as one piece of memory; the samples' own are found in the batch's again."""
        about = {"counts": self.counts, "row_sizes": self.row_sizes}
        names = [(one.id, len(one.input_ids), one.original_length) for one in self.samples]
        return _received, (*joined(self._tensors(), shared=True), names, about)

    def pin_memory(self) -> HostBatch:
        """The batch in memory from which a device copies while the host goes on."""
        return self._with(split(*joined(self._tensors(), pinned=True)))

    def _tensors(self) -> dict[str, Tensor]:
        """The batch's tensors, by field or `prepared.NAME`."""
        found = {name: getattr(self, name) for name in (*_ALWAYS, *_PACKED) if getattr(self, name) is not None}
        if self.features is not None:
            found |= {"hidden": self.features.hidden, "last_hidden": self.features.last_hidden}
        return found | {_PREPARED + name: tensor for name, tensor in self.prepared.items()}

    def _with(self, tensors: Mapping[str, Tensor]) -> HostBatch:
        """The batch with these tensors in the place of its own. The samples keep theirs."""
        return evolve(self, **_fields_of(tensors))

    def to_draft_batch(self, source: FeatureSource, device: torch.device) -> DraftBatch:
        """The batch on the device. `source` gives features that are missing."""
        input_ids = self.input_ids.to(device, non_blocking=True)
        attention_mask = self.attention_mask.to(device, non_blocking=True)
        features = self.features
        if features is None:
            features = self._taken(source, input_ids, attention_mask)
        batch = DraftBatch(
            input_ids=input_ids,
            loss_mask=self.loss_mask,
            attention_mask=attention_mask,
            features=features,
            prepared=self.prepared,
            position_ids=self.position_ids,
            document_ids=self.document_ids,
        )
        return batch.to(device)

    def _taken(self, source: FeatureSource, input_ids: Tensor, attention_mask: Tensor) -> TargetFeatures:
        """The features of this batch, from the source."""
        if self.position_ids is None or self.document_ids is None:
            return source.features(self.samples, input_ids, attention_mask)
        position_BT = self.position_ids.to(input_ids.device, non_blocking=True)
        document_BT = self.document_ids.to(input_ids.device, non_blocking=True)
        packed_features = getattr(source, "packed_features", None)
        if packed_features is not None:
            packed: TargetFeatures = packed_features(input_ids, attention_mask, position_BT, document_BT)
            return packed
        own_ids, own_mask = pad_ids(self.samples)
        apart = source.features(self.samples, own_ids.to(input_ids.device), own_mask.to(input_ids.device))
        padding_BT1 = ~attention_mask[..., None]
        at = document_BT.clamp(min=0), position_BT
        return TargetFeatures(
            hidden=apart.hidden[at].masked_fill(padding_BT1, 0),
            last_hidden=apart.last_hidden[at].masked_fill(padding_BT1, 0),
        )


def _fields_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of a HostBatch that hold tensors, from what `_tensors` gave."""
    fields: dict[str, Any] = {name: tensors.get(name) for name in (*_ALWAYS, *_PACKED)}
    fields["prepared"] = {
        name.removeprefix(_PREPARED): tensor for name, tensor in tensors.items() if name.startswith(_PREPARED)
    }
    fields["features"] = None
    if "hidden" in tensors:
        fields["features"] = TargetFeatures(hidden=tensors["hidden"], last_hidden=tensors["last_hidden"])
    return fields


def _received(
    buffer: Tensor,
    parts: Mapping[str, Part],
    names: Sequence[tuple[str, int, int]],
    about: Mapping[str, Any],
) -> HostBatch:
    """A batch that another process sent."""
    fields = _fields_of(split(buffer, parts))
    samples: list[Sample] = []
    rest = iter(names)
    for row, size in enumerate(about["row_sizes"] or [1] * len(names)):
        start = 0
        for _ in range(size):
            name, length, original_length = next(rest)
            at = row, slice(start, start + length)
            ids, mask = fields["input_ids"][at], fields["loss_mask"][at]
            samples.append(Sample(id=name, input_ids=ids, loss_mask=mask, original_length=original_length))
            start += length
    return HostBatch(samples=tuple(samples), **fields, **about)


def host_batch(
    prepared: Sequence[PreparedSample], preparation: Preparation, *, row_sizes: Sequence[int] | None = None
) -> HostBatch:
    """Pad prepared samples on the right into one batch. Either all of them carry features or none does.

    `row_sizes`: how many of them each row takes, in order; None: each has a row of its own.
    """
    samples = [one.sample for one in prepared]
    counts: Counter[str] = Counter()
    for one in prepared:
        counts.update(one.counts)
    stripped = tuple(evolve(sample, features=None) for sample in samples)
    if row_sizes is None:
        input_ids, attention_mask = pad_ids(samples)
        return HostBatch(
            samples=stripped,
            input_ids=input_ids,
            loss_mask=pad([sample.loss_mask for sample in samples]),
            attention_mask=attention_mask,
            features=pad_features(samples),
            prepared=preparation.collate(prepared),
            counts=dict(counts),
        )
    rows = [samples[end - size : end] for end, size in zip(accumulate(row_sizes), row_sizes, strict=True)]
    joined = [_joined(row) for row in rows]
    input_ids, attention_mask = pad_ids(joined)
    lengths = [len(sample.input_ids) for sample in samples]
    positions = [torch.arange(length) for length in lengths]
    documents = [torch.full((length,), number) for number, length in enumerate(lengths)]
    return HostBatch(
        samples=stripped,
        input_ids=input_ids,
        loss_mask=pad([row.loss_mask for row in joined]),
        attention_mask=attention_mask,
        features=pad_features(joined),
        prepared=preparation.collate(placed(prepared, row_sizes)),
        counts=dict(counts),
        row_sizes=tuple(row_sizes),
        position_ids=pad(_by_row(positions, row_sizes)),
        document_ids=pad(_by_row(documents, row_sizes)).masked_fill(~attention_mask, -1),
    )


def placed(prepared: Sequence[PreparedSample], row_sizes: Sequence[int]) -> list[PreparedSample]:
    """The samples, each with its row and the column of its first token."""
    found: list[PreparedSample] = []
    rest = iter(prepared)
    for row, size in enumerate(row_sizes):
        start = 0
        for _ in range(size):
            one = next(rest)
            found.append(evolve(one, row=row, start=start))
            start += len(one.sample.input_ids)
    assert len(found) == len(prepared), f"{len(prepared)} samples, in rows of {sum(row_sizes)}"
    return found


def _by_row(parts: Sequence[Tensor], row_sizes: Sequence[int]) -> list[Tensor]:
    ends = accumulate(row_sizes)
    return [torch.cat(list(parts[end - size : end])) for end, size in zip(ends, row_sizes, strict=True)]


def _joined(samples: Sequence[Sample]) -> Sample:
    """A row's samples as one, to be padded as one."""
    features = [sample.features for sample in samples if sample.features is not None]
    assert len(features) in (0, len(samples)), "some samples of a row have features, others have not"
    return evolve(
        samples[0],
        input_ids=torch.cat([sample.input_ids for sample in samples]),
        loss_mask=torch.cat([sample.loss_mask for sample in samples]),
        features=TargetFeatures(
            hidden=torch.cat([feature.hidden for feature in features]),
            last_hidden=torch.cat([feature.last_hidden for feature in features]),
        )
        if features
        else None,
    )
