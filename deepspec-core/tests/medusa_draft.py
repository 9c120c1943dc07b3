"""A Medusa-1 draft (arXiv 2401.10774), for tests of its training: a residual block and a vocabulary head for each slot.

It reads the output of the target's final norm at position t. The target's own head predicts token t + 1 from it, and
slot k predicts token t + 2 + k. Features while decoding do not have that output yet, so it does not decode here.

Legend: B sequences, T tokens, M blocks, K slots, H hidden size, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from attrs import frozen
from torch import Tensor, nn

from deepspec_core.contracts.draft import DraftBatch, DraftDescription, DraftModel, PreparedSample, Sample
from deepspec_core.contracts.proposer import Proposal, Proposer
from deepspec_core.contracts.rows import Heads, Rows
from deepspec_core.contracts.target import TargetAdapter


@frozen(kw_only=True)
class MedusaOptions:
    """The options of a Medusa draft.

    num_heads: Tokens proposed a round.
    """

    num_heads: int = 3


def options_of(config: Mapping[str, Any]) -> tuple[MedusaOptions, tuple[int, ...]]:
    """What a config.json describes."""
    return MedusaOptions(num_heads=config["medusa_num_heads"]), tuple(config["target_layer_ids"])


def is_medusa(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of such a draft."""
    return any(str(name).endswith("MedusaModel") for name in config.get("architectures") or ())


class MedusaPreparation:
    """Every position whose token after next is supervised begins a block."""

    def prepare(self, sample: Sample, rng: np.random.Generator) -> PreparedSample:
        """Nothing is drawn."""
        return PreparedSample(sample=sample, tensors={"positions": sample.loss_mask[2:].bool().nonzero()[:, 0]})

    def collate(self, prepared: Sequence[PreparedSample]) -> Mapping[str, Tensor]:
        """The sequence and the position of every block, [M] each."""
        positions = [one.tensors["positions"] for one in prepared]
        counts = torch.tensor([len(one) for one in positions])
        return {"sequence": torch.arange(len(counts)).repeat_interleave(counts), "position": torch.cat(positions)}


class Medusa(DraftModel):
    """A contracts.draft.DraftModel."""

    def __init__(self, options: MedusaOptions, adapter: TargetAdapter, taps: tuple[int, ...]) -> None:
        super().__init__()
        architecture = adapter.architecture
        self.options, self.taps, self.class_name = options, taps, adapter.class_prefix + "MedusaModel"
        hidden_size, vocab_size = architecture.hidden_size, architecture.vocab_size
        self.embed_tokens = adapter.embedding().requires_grad_(False)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False).requires_grad_(False)
        self.blocks = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(options.num_heads))
        self.slot_heads = nn.Parameter(torch.zeros(options.num_heads, vocab_size, hidden_size))
        self.preparation = MedusaPreparation()

    def adopt(self, embedding_VH: Tensor, head_VH: Tensor) -> None:
        """Each slot's head begins as the target's."""
        super().adopt(embedding_VH, head_VH)
        with torch.no_grad():
            self.slot_heads.copy_(head_VH)

    def forward(self, batch: DraftBatch) -> Rows:
        """A row for each slot of each block; those past the end or not supervised weigh 0."""
        sequence_M, position_M = batch.prepared["sequence"], batch.prepared["position"]
        slot_K = torch.arange(self.options.num_heads, device=position_M.device)
        num_tokens = batch.input_ids.shape[1]
        label_at_MK = position_M[:, None] + 2 + slot_K
        inside_MK, label_at_MK = label_at_MK < num_tokens, label_at_MK.clamp(max=num_tokens - 1)
        counted_MK = inside_MK & batch.loss_mask[sequence_M[:, None], label_at_MK].bool()
        hidden_MH = batch.features.last_hidden[sequence_M, position_M].to(self.slot_heads.dtype)
        hidden_MKH = torch.stack([hidden_MH + nn.functional.silu(block(hidden_MH)) for block in self.blocks], dim=1)
        return Rows(
            hidden=hidden_MKH.flatten(0, 1),
            target_hidden=batch.features.last_hidden.flatten(0, 1),
            target_index=(sequence_M[:, None] * num_tokens + label_at_MK - 1).flatten(),
            target_ids=batch.input_ids[sequence_M[:, None], label_at_MK].flatten(),
            weight=counted_MK.flatten().to(torch.float32),
            slot=slot_K.repeat(len(position_M)),
            block=torch.arange(len(position_M), device=position_M.device).repeat_interleave(len(slot_K)),
        )

    def heads(self) -> Heads:
        """A head for each slot."""
        return Heads(draft=self.slot_heads, target=self.lm_head.weight)

    def proposer(self) -> Proposer:
        """One that is not used."""
        return NoProposer(self)

    def describe(self) -> DraftDescription:
        """Facts about it."""
        return DraftDescription(
            algorithm="medusa",
            class_name=self.class_name,
            taps=self.taps,
            max_tokens=self.options.num_heads,
            num_layers=1,
            anchor_predicts=True,
            causal=True,
            weight_names={},
            config={"medusa_num_heads": self.options.num_heads, "target_layer_ids": list(self.taps)},
        )


class NoProposer:
    """Has what a proposer has."""

    def __init__(self, draft: Medusa) -> None:
        self.max_tokens, self.taps = draft.options.num_heads, draft.taps

    def open_slots(self, num_slots: int, max_length: int) -> None:
        """Not used."""
        raise NotImplementedError

    def start(self, *_: Tensor) -> None:
        """Not used."""
        raise NotImplementedError

    def propose(self, *_: Any) -> Proposal:
        """Not used."""
        raise NotImplementedError

    def accept(self, *_: Tensor) -> None:
        """Not used."""
        raise NotImplementedError

    def free(self, slots: Tensor) -> None:
        """Not used."""
        raise NotImplementedError
