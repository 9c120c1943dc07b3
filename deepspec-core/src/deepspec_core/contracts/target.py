"""The contracts of target families and of loaded targets.

Knows shapes and slots. Does not know any family, any algorithm, or how a target is stored. Families are plugins.

Legend: B sequences or slots, T tokens, H hidden size, C = taps * H, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from attrs import Factory, field, frozen
from torch import Tensor, nn

__all__ = [
    "AttentionProjections",
    "ConversationFormat",
    "LayerNorms",
    "SamplingDefaults",
    "SpecialTokens",
    "TargetAdapter",
    "TargetArchitecture",
    "TargetFeatures",
    "TargetModel",
    "TargetStep",
    "TargetVocabulary",
]


@frozen(kw_only=True)
class TargetArchitecture:
    """The facts of a target that drafts, caches and reports need.

    mask_token_id: None if the target has no mask token.
    name: The Hub id or directory that its config was read from; "" if it was made in memory.
    known_taps: The taps of published drafts for exactly this target; () if none are known.
    draft_softcap: The soft cap of the draft's logits, if its layers are another family's. Left out: `logit_softcap`.
    """

    model_type: str
    hidden_size: int
    vocab_size: int
    num_layers: int
    stop_token_ids: tuple[int, ...]
    pad_token_id: int
    mask_token_id: int | None
    logit_softcap: float | None
    initializer_range: float
    max_positions: int
    dense: bool = True
    name: str = ""
    known_taps: tuple[int, ...] = ()
    draft_softcap: float | None = Factory(lambda self: self.logit_softcap, takes_self=True)


@frozen(kw_only=True)
class SpecialTokens:
    """Token ids read from a target's files: those that end answers, the padding token and the mask token, if any."""

    stop: tuple[int, ...]
    pad: int
    mask: int | None = None


@frozen(kw_only=True)
class TargetFeatures:
    """The outputs of a target that drafts read.

    hidden: [B, T, C], the outputs of the tapped decoder layers, concatenated in increasing layer order.
    last_hidden: [B, T, H], the output of the final norm, which is the input of lm_head.

    Values at padding, after a sequence's end, are undefined.
    """

    hidden: Tensor
    last_hidden: Tensor


@frozen(kw_only=True, eq=False)
class TargetVocabulary:
    """The parts of a target that drafts share: embedding and lm_head, [V, H], dequantised and frozen. If tied, both are
    one tensor."""

    embedding: Tensor
    head: Tensor


@frozen(kw_only=True)
class TargetStep:
    """The target's outputs for the new tokens of one decoding step: soft-capped logits [B, T, V], and features.

    hidden [B, T, C] and last_hidden [B, T, H] are as in TargetFeatures. last_hidden costs nothing extra, because the
    logits are computed from it.
    """

    logits: Tensor
    hidden: Tensor
    last_hidden: Tensor


@frozen(kw_only=True, eq=False)
class AttentionProjections:
    """The modules of a family's attention. The algorithm chooses which position attends to which.

    query [in -> num_heads * head_dim], key and value [in -> num_kv_heads * head_dim], out [num_heads * head_dim -> H].
    If `value` is None, the output of the key projection, before its norm and rotation, serves as values. query_norm,
    key_norm and value_norm take and return [..., heads, head_dim], so a norm may act on each head or across all heads;
    a norm that the family lacks is Identity. `scale` multiplies q.k. `window` is the number of positions that a query
    sees, its own included, as set in the run file; None: it sees all positions before it. `names` gives the name of
    each module, or of a module inside it, in published checkpoints, e.g. {"query": "q_proj", "query_norm.norm":
    "q_norm"}.
    """

    query: nn.Module
    key: nn.Module
    value: nn.Module | None
    out: nn.Module
    query_norm: nn.Module = field(factory=nn.Identity)
    key_norm: nn.Module = field(factory=nn.Identity)
    value_norm: nn.Module = field(factory=nn.Identity)
    scale: float
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None = None
    names: Mapping[str, str]


@frozen(kw_only=True, eq=False)
class LayerNorms:
    """The norms of one layer, named by their position, because families use one name for different positions.

    Each acts on [..., H]. `names` gives the name of each norm's parameter in published checkpoints, under `layers.i.`,
    e.g. {"before_mlp": "post_attention_layernorm.weight"}. A norm that is Identity has no entry.
    """

    before_attention: nn.Module = field(factory=nn.Identity)
    after_attention: nn.Module = field(factory=nn.Identity)
    before_mlp: nn.Module = field(factory=nn.Identity)
    after_mlp: nn.Module = field(factory=nn.Identity)
    output_scale: nn.Module = field(factory=nn.Identity)
    names: Mapping[str, str]


@frozen(kw_only=True)
class SamplingDefaults:
    """The sampling that the family's makers recommend. Regeneration uses it for keys that the run file leaves out."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@frozen(kw_only=True)
class ConversationFormat:
    """The markers that enclose the assistant's answers in rendered text, and the family's sampling defaults.

    An answer starts right after `assistant_start`. It ends with one of `assistant_ends`; this end marker is part of the
    answer.
    """

    assistant_start: str
    assistant_ends: tuple[str, ...]
    sampling: SamplingDefaults = field(factory=SamplingDefaults)


@runtime_checkable
class TargetModel(Protocol):
    """A loaded, frozen target, with a key-value cache of slots. Each slot holds one sequence.

    Every method runs under no_grad. Positions are absolute and start at 0. All modules are in evaluation mode. The
    target draws no random numbers and does not write into what it is given. `dtype` is the number format of its weights
    and features.
    """

    architecture: TargetArchitecture
    device: torch.device
    dtype: torch.dtype

    def features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None,
        document_ids: Tensor | None,
        taps: Sequence[int],
    ) -> TargetFeatures:
        """One forward pass over right-padded sequences [B, T]. It keeps only the outputs of taps and forms no logits.

        attention_mask [B, T] is true on real tokens. If document_ids [B, T] is given (packed sequences), tokens attend
        only to tokens of their own document.
        """
        ...

    def open_slots(self, num_slots: int, max_length: int) -> None:
        """Make room for num_slots sequences of at most max_length tokens. All earlier sequences are forgotten."""
        ...

    def decode(
        self,
        slots: Tensor,
        input_ids: Tensor,
        positions: Tensor,
        taps: Sequence[int],
        *,
        last_only: bool = False,
        sees: Tensor | None = None,
    ) -> TargetStep:
        """Feed new tokens [B, T] to slots [B] (ascending), after the tokens that each slot has committed.

        positions [B, T] continue from each slot's committed length; -1 marks padding on the right. With `last_only`,
        logits are [B, 1, V], of each sequence's last real token: prefill needs no others. Features are still those of
        all T tokens. The new tokens are not committed: without `commit`, the next call overwrites them.

        The engine passes `sees` [B, T, T] only for trees. sees[b, t, u] is true if new token t attends to new token u;
        u is at most t. All new tokens attend to the committed tokens, as far as a layer's window reaches. A token's
        position is the committed length plus the number of other new tokens that it sees, so several tokens may have
        the same position. A window counts positions. None: every token sees all tokens before it.
        """
        ...

    def commit(self, slots: Tensor, lengths: Tensor, kept: Tensor | None = None) -> None:
        """Commit tokens, so that slots[b] holds its first lengths[b] tokens; 0 frees the slot.

        A smaller length than before removes tokens. A small language model as a draft needs this after each rejection.

        `kept` [B, N] are the committed columns of the last `decode`, which had the same slots, in the order of the
        text. Of kept[b], as many columns count as the slot grows by. None: the first columns of the last `decode`. The
        engine passes it only after a `decode` with `sees`.
        """
        ...

    def embedding_weight(self) -> Tensor:
        """[V, H], dequantised and frozen. Drafts share it."""
        ...

    def head_weight(self) -> Tensor:
        """[V, H], dequantised and frozen. Drafts share it, and training computes the target's logits with it."""
        ...


@runtime_checkable
class TargetAdapter(Protocol):
    """A target family. It loads targets, and makes the modules that drafts are built from.

    It is made from a transformers config and from the shape of the draft's layers. The methods that return modules
    return new modules with new weights, in the draft's shape.

    An adapter may have `vocabulary(where, *, dtype, device)`. It returns the TargetVocabulary of a directory without
    loading the rest of the target, or None if the target must be loaded whole. Training on stored features calls it.

    An adapter may have `final_norm(where)`. It returns the norm before the lm_head of a directory, in float32 on the
    CPU, or None if the norm cannot be read by itself. If servers deliver hidden states from before the final norm,
    core applies this norm to them.
    """

    architecture: TargetArchitecture
    class_prefix: str

    def load(
        self, where: str | Path, *, dtype: torch.dtype, device: torch.device | str, trust_remote_code: bool = False
    ) -> TargetModel:
        """The target of a local directory. TargetError if its weights do not fit its config."""
        ...

    def skeleton(self, *, dtype: torch.dtype) -> TargetModel:
        """The target's modules with neither its weights nor its quantisation.

        Core calls it in a mode in which tensors take no memory, to estimate what a forward pass takes.
        """
        ...

    def conversation_format(self) -> ConversationFormat: ...

    def attention_projections(self, in_features: int) -> AttentionProjections: ...

    def layer_norms(self) -> LayerNorms: ...

    def norm(self, size: int | None = None, *, scale: bool = True) -> nn.Module:
        """The family's norm over `size` features; None: H. Without `scale` it has no weights."""
        ...

    def mlp(self) -> nn.Module: ...

    def rotary(self) -> nn.Module:
        """A module that maps (x, position_ids [B, T]) to (cos, sin), each [B, T, head_dim], for rotate-half."""
        ...

    def embedding(self) -> nn.Module:
        """A module that maps token ids to [..., H], scaled as the family does. Its parameter is `weight` [V, H]."""
        ...

    def draft_config(self, layers: int, extra: Mapping[str, Any]) -> Any:
        """The config.json of a draft, as a transformers PretrainedConfig. The keys of `extra` are at its top level."""
        ...

    def unsupported(self) -> str | None:
        """Why this target (or a draft in its shape) cannot be handled, or None."""
        ...
