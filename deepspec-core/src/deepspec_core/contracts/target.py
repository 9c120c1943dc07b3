"""What a target family provides, and what a loaded target can do.

Knows shapes and slots; does not know any family, any algorithm, or how a target is stored. Families live in plugins.

Legend: B sequences or slots, T tokens, H hidden size, C = taps * H, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from attrs import field, frozen
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
]


@frozen(kw_only=True)
class TargetArchitecture:
    """What a draft, a cache or a report needs to know of a target. `mask_token_id` is None where there is none.

    `name`: the Hub id or directory its config was read from, "" for one made in memory. `known_taps`: the layers that
    published drafts of this very target tap, () where there are none or nothing is known of them.
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


@frozen(kw_only=True)
class SpecialTokens:
    """Ids read from a target's files: where answers stop, what pads, what masks (None = nothing does)."""

    stop: tuple[int, ...]
    pad: int
    mask: int | None = None


@frozen(kw_only=True)
class TargetFeatures:
    """What drafts see of a target.

    hidden [B, T, C]: outputs of the tapped decoder layers, concatenated in increasing layer order;
    last_hidden [B, T, H]: output of the final norm, the input of lm_head. Rows past a sequence's length are undefined.
    """

    hidden: Tensor
    last_hidden: Tensor


@frozen(kw_only=True)
class TargetStep:
    """One incremental step: logits [B, T, V] (soft-capped) and tapped features [B, T, C] of the new tokens."""

    logits: Tensor
    hidden: Tensor


@frozen(kw_only=True, eq=False)
class AttentionProjections:
    """The family's attention, without its pattern: the algorithm decides who attends to whom.

    query [in -> num_heads * head_dim], key and value [in -> num_kv_heads * head_dim], out [num_heads * head_dim -> H].
    `value` is None where the (unnormed, unrotated) key projection serves as values. query_norm, key_norm and value_norm
    act on [..., head_dim] and are Identity where absent. `scale` multiplies q.k. `names` maps the slots to the names
    published checkpoints use, e.g. {"query": "q_proj"}.
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
    names: Mapping[str, str]


@frozen(kw_only=True, eq=False)
class LayerNorms:
    """The norms around one layer, named by position because families reuse each other's names for different places.

    Each acts on [..., H]. `names` maps slots to published parameter names under `layers.i.`, e.g.
    {"before_mlp": "post_attention_layernorm.weight"}; a slot that is Identity has no entry.
    """

    before_attention: nn.Module = field(factory=nn.Identity)
    after_attention: nn.Module = field(factory=nn.Identity)
    before_mlp: nn.Module = field(factory=nn.Identity)
    after_mlp: nn.Module = field(factory=nn.Identity)
    output_scale: nn.Module = field(factory=nn.Identity)
    names: Mapping[str, str]


@frozen(kw_only=True)
class SamplingDefaults:
    """How the family's makers recommend to sample; used for regeneration where the run file is silent."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


@frozen(kw_only=True)
class ConversationFormat:
    """Where the assistant speaks in rendered text, and the family's sampling defaults.

    An answer starts right after `assistant_start` and ends with one of `assistant_ends` (inclusive).
    """

    assistant_start: str
    assistant_ends: tuple[str, ...]
    sampling: SamplingDefaults = field(factory=SamplingDefaults)


@runtime_checkable
class TargetModel(Protocol):
    """A loaded, frozen target with a cache of `slots`, one sequence each.

    Every method runs under no_grad. Positions are absolute and start at 0.
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
        """One forward over right-padded sequences [B, T]; untapped layers are not kept, logits not formed.

        attention_mask [B, T] is true on real tokens. Where document_ids [B, T] is given (packed rows), tokens attend
        within their document only.
        """
        ...

    def open_slots(self, num_slots: int, max_length: int) -> None:
        """Make room for num_slots sequences of at most max_length tokens; forgets what was held before."""
        ...

    def decode(
        self, slots: Tensor, input_ids: Tensor, positions: Tensor, taps: Sequence[int], *, last_only: bool = False
    ) -> TargetStep:
        """Feed new tokens [B, T] to slots [B] (ascending), on top of what each slot has committed.

        positions [B, T] continue each slot from its committed length; -1 marks padding on the right. With `last_only`
        the logits are those of each row's last real token, [B, 1, V] (prefill needs no others); features cover all T.
        Nothing is committed: a second call without `commit` overwrites.
        """
        ...

    def commit(self, slots: Tensor, lengths: Tensor) -> None:
        """Keep the first lengths[b] tokens of slots[b]; 0 frees the slot."""
        ...

    def embedding_weight(self) -> Tensor:
        """[V, H], dequantised, frozen; shared with drafts."""
        ...

    def head_weight(self) -> Tensor:
        """[V, H], dequantised, frozen; shared with drafts and used to recompute target logits."""
        ...


@runtime_checkable
class TargetAdapter(Protocol):
    """A family. Made from a transformers config (and the draft's own shape); loads targets and hands out blocks.

    The block methods return new modules with new weights, in the draft's own shape.
    """

    architecture: TargetArchitecture
    class_prefix: str

    def load(
        self, where: str | Path, *, dtype: torch.dtype, device: torch.device | str, trust_remote_code: bool = False
    ) -> TargetModel:
        """The target of a local directory. TargetError where its weights do not fit its config."""
        ...

    def skeleton(self, *, dtype: torch.dtype) -> TargetModel:
        """The target's modules without its weights, plain where it is quantised: for counting, made under a mode in
        which tensors take no memory."""
        ...

    def conversation_format(self) -> ConversationFormat: ...

    def attention_projections(self, in_features: int) -> AttentionProjections: ...

    def layer_norms(self) -> LayerNorms: ...

    def norm(self, size: int | None = None, *, scale: bool = True) -> nn.Module: ...

    def mlp(self) -> nn.Module: ...

    def rotary(self) -> nn.Module:
        """A module: (x, position_ids [B, T]) -> (cos, sin), each [B, T, head_dim], in the rotate-half convention."""
        ...

    def embedding(self) -> nn.Module:
        """Token ids -> [..., H], the family's embedding scale inside; its parameter is `weight` [V, H]."""
        ...

    def draft_config(self, layers: int, extra: Mapping[str, Any]) -> Any:
        """What config.json of a draft says: a transformers PretrainedConfig, `extra` at top level."""
        ...

    def unsupported(self) -> str | None:
        """Why this target (or a draft in its shape) cannot be handled, or None."""
        ...
