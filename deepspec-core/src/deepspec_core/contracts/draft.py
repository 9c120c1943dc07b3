"""What an algorithm provides: preparation on the host, a network without side effects, and a description of itself.

`Preparation` runs in loader workers and has no trainable parameters. All random and variable-length work is done there.
Its random numbers are derived from (seed, epoch, sample id), so padding, batch size and the number of workers do not
change them. `DraftModel` is the network. This file knows no algorithm and no family.

Legend: B sequences, T tokens, C = taps * H, H hidden size, V the target's vocabulary, D the draft's, r rank of the
correction.
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
from deepspec_core.layers.draft_vocabulary import DraftVocabulary

__all__ = ["DraftBatch", "DraftDescription", "DraftModel", "Preparation", "PreparedSample", "Sample", "Texts"]


@frozen(kw_only=True, eq=False)
class Sample:
    """One tokenised conversation.

    input_ids: [T] int64.
    loss_mask: [T] bool, true on supervised tokens.
    features: [T, C] and [T, H], without a batch dimension; None if they are computed online.
    original_length: The number of tokens of the conversation before it was cut after its last supervised token.
    """

    id: str
    input_ids: Tensor
    loss_mask: Tensor
    original_length: int
    features: TargetFeatures | None = None


@frozen(kw_only=True, eq=False)
class PreparedSample:
    """A sample and what the algorithm drew for it.

    tensors: The algorithm's own tensors, which its `collate` makes into a batch.
    counts: Numbers that the run's report sums over samples.
    row, start: The sample's place in a packed batch: its row, and the column of its first token. Core sets both before
        it calls `collate`. `row` is None if samples are not packed; then each has a row of its own, from column 0.
    """

    sample: Sample
    tensors: Mapping[str, Tensor]
    counts: Mapping[str, int] = field(factory=dict)
    row: int | None = None
    start: int = 0


@runtime_checkable
class Preparation(Protocol):
    """The part of an algorithm that runs on the host. It can be pickled and has no trainable parameters."""

    def prepare(self, sample: Sample, rng: np.random.Generator) -> PreparedSample:
        """Draw the sample's random choices, such as anchors, and lay out its parts of variable length."""
        ...

    def collate(self, prepared: Sequence[PreparedSample]) -> Mapping[str, Tensor]:
        """The algorithm's own tensors of a batch, in the order of `prepared`. Core pads ids, masks and features.

        If samples are packed, `prepared` lists them row by row, and from left to right within a row.
        """
        ...


@frozen(kw_only=True, eq=False)
class DraftBatch:
    """The right-padded sequences of one micro-batch, on the device.

    input_ids, loss_mask and attention_mask are [B, T]. features are [B, T, C] and [B, T, H], in the dtype in which they
    were captured or cached. It may differ from that of the draft's weights: the draft casts them. `prepared` is what
    `Preparation.collate` returned. `on_host` holds pairs: a tensor of `prepared`, and its copy in the host's memory,
    which can be read without waiting for the device. A draft passes `on_host` on to its rows.

    If sequences are packed, a row holds several conversations one after another, and position_ids and document_ids are
    [B, T]: a token's position in its own conversation, and the conversation's number in the order of `prepared`, -1 on
    padding. Otherwise they are None. Core packs only for draft types whose DraftModelSpec says `takes_packed`. Such a
    draft's rows are the same as without packing: no token attends to another conversation, and no label, correction or
    target position comes from one.
    """

    input_ids: Tensor
    loss_mask: Tensor
    attention_mask: Tensor
    features: TargetFeatures
    prepared: Mapping[str, Tensor]
    position_ids: Tensor | None = None
    document_ids: Tensor | None = None
    on_host: tuple[tuple[Tensor, Tensor], ...] = ()

    def to(self, device: torch.device | str) -> DraftBatch:
        """The same batch with every tensor on `device`."""

        def move(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device, non_blocking=True)

        prepared = {name: tensor.to(device, non_blocking=True) for name, tensor in self.prepared.items()}
        pairs = ((prepared[name], tensor) for name, tensor in self.prepared.items())
        return DraftBatch(
            input_ids=self.input_ids.to(device, non_blocking=True),
            loss_mask=self.loss_mask.to(device, non_blocking=True),
            attention_mask=self.attention_mask.to(device, non_blocking=True),
            features=TargetFeatures(
                hidden=self.features.hidden.to(device, non_blocking=True),
                last_hidden=self.features.last_hidden.to(device, non_blocking=True),
            ),
            prepared=prepared,
            position_ids=move(self.position_ids),
            document_ids=move(self.document_ids),
            on_host=tuple((of, tensor) for of, tensor in pairs if tensor.device.type == "cpu") or self.on_host,
        )


@frozen(kw_only=True, eq=False)
class Texts:
    """The right-padded sequences of a micro-batch before their features are taken, on the device.

    input_ids [B, T] int64. loss_mask [B, T] bool is true on supervised tokens, attention_mask [B, T] on real ones.
    """

    input_ids: Tensor
    loss_mask: Tensor
    attention_mask: Tensor


@frozen(kw_only=True)
class DraftDescription:
    """Facts about a draft, in terms that checkpoints, exporters and reports share.

    anchor_predicts: Whether slot 0 of a block is itself a prediction.
    max_tokens: The largest number of tokens that the draft proposes in one round.
    window: The number of positions that the draft's attention sees, in training and in decoding; None if it sees all.
        It must be the `window` of the adapter's attention projections; a run that asks for another is refused.
    target_weights: Prefixes of the names of weights in the target's checkpoint, such as "mtp.", that the draft needs
        in addition to the embedding and lm_head. Core passes these weights to `adopt_weights` before training.
    gives_confidence: Whether its proposals carry confidence; None if the algorithm does not say.
    weight_names: Published names of parameters, by the draft's own names or their prefixes. The longest match counts.
    config: The keys that the algorithm adds to config.json.
    training_keys: The keys of `config` that describe how the draft was trained, not what it is. A run that starts from
        this checkpoint ([draft] init) may have other values of them.
    unread_options: Names of options that the finished draft does not read, such as "head.kind": only training reads
        them, or another option turns them off. A checkpoint gives back every other option as the run has it; these it
        need not give back.
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
    window: int | None = None
    gives_confidence: bool | None = None
    target_weights: tuple[str, ...] = ()
    training_keys: tuple[str, ...] = ()
    unread_options: tuple[str, ...] = ()


class DraftModel(nn.Module, ABC):
    """Base class of algorithms' networks. Their `embed_tokens` and `lm_head` share the target's weights, frozen.

    Subclasses set `embed_tokens` (an adapter's embedding) and `lm_head` (nn.Linear without bias), and implement the
    methods below. `forward` draws no random numbers and does no work on the host.

    A draft with a reduced vocabulary sets `vocabulary`, and its `lm_head` has one row for each token of it. Core
    chooses these tokens before training: the most frequent ones in the answers.
    """

    embed_tokens: nn.Module
    lm_head: nn.Linear
    preparation: Preparation
    vocabulary: DraftVocabulary | None

    def __init__(self) -> None:
        super().__init__()
        self.vocabulary = None

    @abstractmethod
    def forward(self, batch: DraftBatch) -> Rows:
        """The supervised rows of a batch."""

    @abstractmethod
    def heads(self) -> Heads:
        """The projections that turn the rows into logits."""

    @abstractmethod
    def proposer(self) -> Proposer:
        """The decoding side of the algorithm. It shares the weights of this network."""

    def tree_proposer(self, nodes: int) -> Proposer:
        """A proposer of trees of at most `nodes` tokens ([draft] tree). It has the attribute `max_nodes`.

        Core calls this only for algorithms whose DraftModelSpec sets `proposes_trees`.
        """
        raise NotImplementedError(f"{type(self).__name__} proposes chains only")

    @abstractmethod
    def describe(self) -> DraftDescription:
        """Facts about this draft."""

    def spread(self, logits_D: Tensor) -> Tensor:
        """The draft's logits [..., D] spread over the target's vocabulary [..., V], with -inf for all other tokens."""
        return logits_D if self.vocabulary is None else self.vocabulary.spread(logits_D)

    def shared_heads(self, *, softcap: float | None = None, correction: Tensor | None = None) -> Heads:
        """The heads of a draft whose lm_head is the target's, or the target's rows for a reduced vocabulary."""
        head, vocabulary = self.lm_head.weight, self.vocabulary
        if vocabulary is None:
            return Heads(draft=head, target=head, correction=correction, softcap=softcap)
        return Heads(
            draft=head,
            target=vocabulary.target_head,
            correction=correction,
            softcap=softcap,
            draft_ids=vocabulary.ids,
        )

    def adopt(self, embedding_VH: Tensor, head_VH: Tensor) -> None:
        """Share the target's embedding and lm_head, frozen. They stay in the target's memory and keep its dtype.

        The output of `embed_tokens` may therefore have another dtype than the draft's weights. With a reduced
        vocabulary, `lm_head` holds copies of the rows of its tokens, and the whole lm_head is kept beside them.
        """
        own_VH = self.embed_tokens.weight
        assert isinstance(own_VH, Tensor), "an embedding has a weight"
        assert own_VH.shape == embedding_VH.shape, f"{list(embedding_VH.shape)}, not {list(own_VH.shape)}"
        rows_DH = head_VH.detach()
        if self.vocabulary is not None:
            self.vocabulary.target_head = rows_DH
            rows_DH = rows_DH[self.vocabulary.ids.to(head_VH.device)]
        own_DH = self.lm_head.weight
        assert own_DH.shape == rows_DH.shape, f"{list(rows_DH.shape)}, not {list(own_DH.shape)}"
        self.embed_tokens.weight = nn.Parameter(embedding_VH.detach(), requires_grad=False)
        self.lm_head.weight = nn.Parameter(rows_DH, requires_grad=False)
        self.embed_tokens.requires_grad_(False)
        self.lm_head.requires_grad_(False)

    def rollout(self, texts: Texts, uniforms: Tensor) -> Texts:
        """Texts to train on in place of the data's. Drafts that train on texts of their own override this method.

        Core calls it in every micro-batch, without gradients, before labels are laid out and features are computed. The
        target then runs on the returned texts (on-policy distillation, arXiv 2306.13649 and 2310.08461). Lengths must
        not change; input_ids and loss_mask may, and their values at padding are ignored. uniforms [B, T], float64 in
        [0, 1), are the only source of randomness. Each row of them is derived from the seed, the epoch and the sample's
        id, so it does not depend on the batch. Features must be computed during training (features.mode = "online").
        """
        return texts

    def adopt_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights that `describe().target_weights` names. Drafts that name some implement this method.

        `weights` maps names in the target's checkpoint to tensors on the CPU, in the shapes and dtypes stored there.
        Each prefix has at least one weight. Before a run's first stage, core also calls this method with meta tensors,
        which have a shape but no values.
        """
        raise NotImplementedError(f"{type(self).__name__} asks for weights of the target, and does not adopt them")
