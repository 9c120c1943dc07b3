"""What an algorithm provides: preparation on the host, a pure network, and facts about itself.

`Preparation` has no parameters and runs in loader workers: everything random or ragged happens there, keyed by (seed,
epoch, sample id), so neither padding, nor batch size, nor the number of workers changes the draw. `DraftModel` is the
network. This file knows no algorithm and no family.

Legend: B sequences, T tokens, C = taps * H, H hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from attrs import field, frozen
from torch import Tensor, nn

from deepspec_core.contracts.proposer import Proposer
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.contracts.target import TargetFeatures

__all__ = ["DraftBatch", "DraftDescription", "DraftModel", "Preparation", "PreparedSample", "Sample"]


@frozen(kw_only=True, eq=False)
class Sample:
    """One tokenised conversation. input_ids [T] int64; loss_mask [T] bool, true on supervised tokens.

    `features` ([T, C] and [T, H], no batch dimension) is None where they are computed online.
    `original_length` counts the tokens before sequences were cut after their last supervised token.
    """

    id: str
    input_ids: Tensor
    loss_mask: Tensor
    original_length: int
    features: TargetFeatures | None = None


@frozen(kw_only=True, eq=False)
class PreparedSample:
    """A sample and what the algorithm drew for it.

    `tensors` belong to the algorithm and are collated by it. `counts` are summed into the run's report.
    """

    sample: Sample
    tensors: Mapping[str, Tensor]
    counts: Mapping[str, int] = field(factory=dict)


@runtime_checkable
class Preparation(Protocol):
    """Host half of an algorithm: picklable, without parameters."""

    def prepare(self, sample: Sample, rng: np.random.Generator) -> PreparedSample:
        """Draw what is random and lay out what is ragged."""
        ...

    def collate(self, prepared: Sequence[PreparedSample]) -> Mapping[str, Tensor]:
        """The algorithm's own tensors for a batch, in the order of `prepared`; core pads ids, masks and features."""
        ...


@frozen(kw_only=True, eq=False)
class DraftBatch:
    """Right-padded sequences of one micro-batch, on the device.

    input_ids, loss_mask, attention_mask [B, T]; position_ids and document_ids [B, T] where rows are packed, else None;
    features [B, T, C] and [B, T, H] in the dtype they were captured in; `prepared` as `Preparation.collate` returned
    it.
    """

    input_ids: Tensor
    loss_mask: Tensor
    attention_mask: Tensor
    features: TargetFeatures
    prepared: Mapping[str, Tensor]
    position_ids: Tensor | None = None
    document_ids: Tensor | None = None

    def to(self, device: torch.device | str) -> DraftBatch:
        """The same batch with every tensor on `device`."""

        def move(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, non_blocking=True)

        return DraftBatch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            loss_mask=self.loss_mask.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            features=TargetFeatures(
                hidden=self.features.hidden.to(device, non_blocking=True),
                last_hidden=self.features.last_hidden.to(device, non_blocking=True),
            ),
            prepared={name: tensor.to(device, non_blocking=True) for name, tensor in self.prepared.items()},
            position_ids=move(self.position_ids),
            document_ids=move(self.document_ids),
        )


@frozen(kw_only=True)
class DraftDescription:
    """Neutral facts that checkpoints, exporters and reports translate.

    `anchor_predicts`: slot 0 of a block is itself a prediction. `max_tokens`: proposals of one round at most.
    `gives_confidence`: its proposals carry confidence; None where it does not say.
    `weight_names`: own parameter-name prefixes (or whole names) -> published ones, longest match wins.
    `config`: what the algorithm adds to config.json.
    """

    algorithm: str
    class_name: str
    taps: tuple[int, ...]
    max_tokens: int
    num_layers: int
    anchor_predicts: bool
    causal: bool
    weight_names: Mapping[str, str]
    config: Mapping[str, Any]
    gives_confidence: bool | None = None


class DraftModel(nn.Module, ABC):
    """Base class of algorithms' networks. Parameters of `embed_tokens` and `lm_head` are the target's, frozen.

    Subclasses set `embed_tokens` (an adapter's embedding) and `lm_head` (nn.Linear without bias), and implement the
    methods below. `forward` is pure: no random numbers, no host work.
    """

    embed_tokens: nn.Module
    lm_head: nn.Linear
    preparation: Preparation

    @abstractmethod
    def forward(self, batch: DraftBatch) -> Rows:
        """The network: a batch to its supervised rows."""

    @abstractmethod
    def heads(self) -> Heads:
        """The projections the rows are to be sent through."""

    @abstractmethod
    def proposer(self) -> Proposer:
        """The decoding side, sharing these weights."""

    @abstractmethod
    def describe(self) -> DraftDescription:
        """Facts about this draft."""

    def adopt(self, embedding_VH: Tensor, head_VH: Tensor) -> None:
        """Copy the target's embedding and lm_head into the draft and freeze them."""
        own_VH = self.embed_tokens.weight
        assert isinstance(own_VH, Tensor), "an embedding has a weight"
        with torch.no_grad():
            own_VH.copy_(embedding_VH)
            self.lm_head.weight.copy_(head_VH)
        self.embed_tokens.requires_grad_(False)
        self.lm_head.requires_grad_(False)
