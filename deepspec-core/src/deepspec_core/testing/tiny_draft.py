"""A tiny draft and a source of random features, for tests of training: no family, no algorithm, no target needed.

The draft predicts `block_size` tokens from each of a few drawn anchors, from the anchor's feature and token; it is
deterministic in its seed.

Legend: B sequences, T tokens, A anchors, K block size, N = B * A * K rows less dummies, H hidden size, C = taps * H,
V vocabulary, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from deepspec_core.contracts.draft import DraftBatch, DraftDescription, DraftModel, PreparedSample, Sample
from deepspec_core.contracts.proposer import Proposer
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.contracts.target import TargetFeatures

__all__ = ["TinyDraft", "TinyPreparation", "TinySource"]


class TinyPreparation:
    """Draws `num_anchors` anchors that have `block_size` tokens after them, and counts samples with fewer."""

    def __init__(self, *, num_anchors: int, block_size: int) -> None:
        self.num_anchors, self.block_size = num_anchors, block_size

    def prepare(self, sample: Sample, rng: np.random.Generator) -> PreparedSample:
        """The sample with `anchors` [A]; -1 stands for a missing one."""
        candidates = np.arange(max(0, sample.input_ids.numel() - self.block_size))
        drawn = np.sort(rng.permutation(candidates)[: self.num_anchors])
        anchors = np.full(self.num_anchors, -1, dtype=np.int64)
        anchors[: len(drawn)] = drawn
        return PreparedSample(
            sample=sample,
            tensors={"anchors": torch.from_numpy(anchors)},
            counts={"samples": 1, "short_samples": int(len(drawn) < self.num_anchors)},
        )

    def collate(self, prepared: Sequence[PreparedSample]) -> Mapping[str, Tensor]:
        """The `anchors` [B, A] of the batch."""
        return {"anchors": torch.stack([one.tensors["anchors"] for one in prepared])}


class TinyDraft(DraftModel):
    """A draft whose hidden state is tanh(project(feature) + embed(anchor token) + slot). `rank` adds a correction."""

    def __init__(
        self,
        *,
        vocab_size: int = 48,
        hidden_size: int = 16,
        taps: tuple[int, ...] = (0, 2),
        block_size: int = 3,
        num_anchors: int = 4,
        rank: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.taps, self.block_size = taps, block_size
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        self.project = nn.Linear(len(taps) * hidden_size, hidden_size)
        self.slots = nn.Parameter(torch.zeros(block_size, hidden_size))
        self.before = nn.Embedding(vocab_size, rank) if rank is not None else None
        self.after = nn.Linear(rank, vocab_size, bias=False) if rank is not None else None
        self.preparation = TinyPreparation(num_anchors=num_anchors, block_size=block_size)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.adopt(self.embed_tokens.weight.detach().clone(), self.lm_head.weight.detach().clone())

    def forward(self, batch: DraftBatch) -> Rows:
        """The rows of the blocks of all anchors, in the order of sequences and anchors."""
        sequence_M, which_M = torch.nonzero(batch.prepared["anchors"] >= 0, as_tuple=True)
        anchor_M = batch.prepared["anchors"][sequence_M, which_M]
        feature_MC = batch.features.hidden[sequence_M, anchor_M].to(self.slots.dtype)
        state_MH = self.project(feature_MC) + self.embed_tokens(batch.input_ids[sequence_M, anchor_M])
        hidden_MKH = torch.tanh(state_MH[:, None] + self.slots)
        slot_K = torch.arange(self.block_size, device=anchor_M.device)
        position_MK = anchor_M[:, None] + slot_K
        length = batch.input_ids.shape[1]
        label_MK = batch.input_ids[sequence_M[:, None], position_MK + 1]
        correction = None
        if self.before is not None:
            correction = self.before(batch.input_ids[sequence_M[:, None], position_MK]).flatten(0, 1)
        return Rows(
            hidden=hidden_MKH.flatten(0, 1),
            correction=correction,
            target_hidden=batch.features.last_hidden.flatten(0, 1),
            target_index=(sequence_M[:, None] * length + position_MK).flatten(),
            target_ids=label_MK.flatten(),
            weight=batch.loss_mask[sequence_M[:, None], position_MK + 1].flatten().to(torch.float32),
            slot=slot_K.repeat(anchor_M.numel()),
            block=torch.arange(anchor_M.numel(), device=anchor_M.device).repeat_interleave(self.block_size),
        )

    def heads(self) -> Heads:
        """The target's head, for draft and target."""
        head = self.lm_head.weight
        return Heads(draft=head, target=head, correction=None if self.after is None else self.after.weight)

    def proposer(self) -> Proposer:
        """This draft has no proposer, because it is for tests of training."""
        raise AssertionError("TinyDraft does not decode")

    def describe(self) -> DraftDescription:
        """Facts about this draft, which is never published."""
        return DraftDescription(
            algorithm="tiny",
            class_name="TinyDraft",
            taps=self.taps,
            max_tokens=self.block_size,
            num_layers=0,
            anchor_predicts=True,
            causal=True,
            weight_names={},
            config={},
        )


class TinySource:
    """A contracts.features.FeatureSource of random sequences. With `stored`, samples carry their features.

    `spoil` is a sample whose features are not finite. Features depend on the sample alone, not on its batch.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        vocab_size: int = 48,
        hidden_size: int = 16,
        num_taps: int = 2,
        lengths: tuple[int, int] = (6, 20),
        stored: bool = True,
        seed: int = 0,
        spoil: int | None = None,
    ) -> None:
        rng = np.random.default_rng(seed)
        self._lengths: list[int] = rng.integers(*lengths, size=num_samples).tolist()
        self._stored = stored
        self._samples: list[Sample] = []
        self._features: dict[str, TargetFeatures] = {}
        for index, length in enumerate(self._lengths):
            features = TargetFeatures(
                hidden=_normal(rng, length, num_taps * hidden_size), last_hidden=_normal(rng, length, hidden_size)
            )
            if index == spoil:
                features.hidden.fill_(float("nan"))
            sample = Sample(
                id=f"sample-{index}",
                input_ids=torch.from_numpy(rng.integers(0, vocab_size, size=length)),
                loss_mask=torch.arange(length) >= length // 3,
                original_length=length,
                features=features if stored else None,
            )
            self._samples.append(sample)
            self._features[sample.id] = features

    def __len__(self) -> int:
        return len(self._samples)

    def lengths(self) -> Sequence[int]:
        """The number of tokens of each sample."""
        return self._lengths

    def __getitem__(self, index: int) -> Sample:
        return self._samples[index]

    def features(self, samples: Sequence[Sample], input_ids: Tensor, attention_mask: Tensor) -> TargetFeatures:
        """The features that a target would compute, found by id. Padding is garbage that must not matter."""
        found = [self._features[sample.id] for sample in samples]
        length = input_ids.shape[1]
        return TargetFeatures(
            hidden=torch.stack([_padded(feature.hidden, length) for feature in found]).to(input_ids.device),
            last_hidden=torch.stack([_padded(feature.last_hidden, length) for feature in found]).to(input_ids.device),
        )


def _normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def _padded(feature_TC: Tensor, length: int) -> Tensor:
    return torch.cat((feature_TC, feature_TC.new_full((length - feature_TC.shape[0], feature_TC.shape[1]), 7.0)))
