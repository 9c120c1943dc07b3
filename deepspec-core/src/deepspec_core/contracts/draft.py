"""What an algorithm provides: preparation on the host, a network without side effects, and facts about itself.

`Preparation` has no parameters and runs in loader workers. It does everything that is random or of varying length. Its
random numbers follow from (seed, epoch, sample id), so padding, batch size and the number of workers do not change
them. `DraftModel` is the network. This file knows no algorithm and no family.

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

    input_ids [T] int64. loss_mask [T] bool is true on supervised tokens. `features` are [T, C] and [T, H], without a
    batch dimension; None if they are computed online. `original_length` counts the tokens of the conversation before it
    was cut after its last supervised token.
    """

    id: str
    input_ids: Tensor
    loss_mask: Tensor
    original_length: int
    features: TargetFeatures | None = None


@frozen(kw_only=True, eq=False)
class PreparedSample:
    """A sample and what the algorithm drew for it.

    The algorithm defines `tensors` and collates them itself. `counts` are summed up in the run's report.

    row, start: Where core lays the sample in a packed batch, said before `collate` is called: its row, and the column
        of its first token. `row` is None where samples are not packed; then each has a row of its own, from column 0.
    """

    sample: Sample
    tensors: Mapping[str, Tensor]
    counts: Mapping[str, int] = field(factory=dict)
    row: int | None = None
    start: int = 0


@runtime_checkable
class Preparation(Protocol):
    """The half of an algorithm that runs on the host. It can be pickled and has no parameters."""

    def prepare(self, sample: Sample, rng: np.random.Generator) -> PreparedSample:
        """Draw what is random, such as anchors, and lay out what has varying length."""
        ...

    def collate(self, prepared: Sequence[PreparedSample]) -> Mapping[str, Tensor]:
        """The algorithm's own tensors of a batch, in the order of `prepared`. Core pads ids, masks and features.

        Where samples are packed, rows follow each other in `prepared`, and in a row its samples from left to right.
        """
        ...


@frozen(kw_only=True, eq=False)
class DraftBatch:
    """The right-padded sequences of one micro-batch, on the device.

    input_ids, loss_mask and attention_mask are [B, T]. features are [B, T, C] and [B, T, H], in the dtype they were
    captured in. `prepared` is what `Preparation.collate` returned. `on_host` are pairs of its tensors and their copies
    in the host's memory, where reading a number does not wait for the device. A draft hands them on to its rows.

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
    window: How many positions the draft's attention sees, in training and in decoding; None if it sees all. It must be
        the `window` of the adapter's attention projections; a run that asks for another is refused.
    target_weights: Beginnings of names of weights in the target's checkpoint, such as "mtp.", that the draft asks for
        beside the embedding and lm_head. They are handed to `adopt_weights` before training.
    gives_confidence: Whether its proposals carry confidence; None if the algorithm does not say.
    weight_names: Published names of parameters, by the draft's own names or their prefixes. The longest match counts.
    config: The keys that the algorithm adds to config.json.
    training_keys: Those of them that say how the draft was trained, not what it is. A run that begins with its
        checkpoint ([draft] init) may have other values.
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


class DraftModel(nn.Module, ABC):
    """Base class of algorithms' networks. Their `embed_tokens` and `lm_head` share the target's weights, frozen.

    Subclasses set `embed_tokens` (an adapter's embedding) and `lm_head` (nn.Linear without bias), and implement the
    methods below. `forward` draws no random numbers and does no work on the host.

    A draft that knows some of the target's tokens sets `vocabulary` and gives `lm_head` as many rows. Before training
    core chooses the tokens: those that answers have most of.
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
        """The same, proposing trees of at most `nodes` tokens ([draft] tree). It has `max_nodes`.

        Only of algorithms whose DraftModelSpec says `proposes_trees`.
        """
        raise NotImplementedError(f"{type(self).__name__} proposes chains only")

    @abstractmethod
    def describe(self) -> DraftDescription:
        """Facts about this draft."""

    def spread(self, logits_D: Tensor) -> Tensor:
        """Logits of the draft's tokens [..., D] among all of the target's [..., V]: -inf for those it does not know."""
        return logits_D if self.vocabulary is None else self.vocabulary.spread(logits_D)

    def shared_heads(self, *, softcap: float | None = None, correction: Tensor | None = None) -> Heads:
        """The heads of a draft whose lm_head is the target's, or the rows of it that its vocabulary has."""
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
        """Take the target's embedding and lm_head, frozen. They stay the target's memory, and keep its dtype.

        So what `embed_tokens` gives may be of another dtype than the draft's weights. Of the lm_head, a reduced
        vocabulary has copies of its rows; the whole one is kept beside them.
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
        """Texts to train on in place of the data's. Drafts that train on what they write themselves override it.

        Called in every micro-batch, without gradients, before labels are laid out and features are taken: the target is
        run on what it returns (on-policy distillation, arXiv 2306.13649 and 2310.08461). Texts keep their lengths:
        input_ids and loss_mask may change, padding does not count. uniforms [B, T], float64 in [0, 1), are the only
        source of randomness. A row of them follows from the seed, the epoch and the sample's id, so it does not depend
        on the batch. Features must be computed while training (features.mode = "online").
        """
        return texts

    def adopt_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Copy weights that `describe().target_weights` asked for. Drafts that ask for some implement it.

        `weights` are by their names in the target's checkpoint, on the CPU, in the shapes and dtypes stored there. Each
        prefix has at least one. Before a run's first stage it is called with tensors that have no numbers.
        """
        raise NotImplementedError(f"{type(self).__name__} asks for weights of the target, and does not adopt them")
