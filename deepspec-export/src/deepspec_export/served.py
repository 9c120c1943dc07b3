"""A draft in the terms that engines share: `Served`. What the draft is, what an export says, and whether they agree.

Every format is written from a Served, and read back to one by the rules of its engine (vllm.py, sglang.py,
speculators.py), with the engine's defaults for keys that are absent. Knows the conventions that differ between engines
by name; not where any engine keeps them.

Legend: H hidden size, V the target's vocabulary, D the draft's, r rank of the Markov head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

import attrs
from attrs import field, frozen

from deepspec_core.contracts.export import ExportFacts

Method = Literal["eagle3", "dflash", "dspark"]

SHARED: Final = ("embed_tokens.weight", "lm_head.weight")
"""Weights that are the target's own: an engine shares them with the target where an export leaves them out."""
HEAD: Final = SHARED[1]
OFFSETS, KNOWN = "d2t", "t2d"
"""Of a reduced vocabulary: [D] int64, the target's token of column i less i; [V] bool, which tokens the draft knows."""
STAND_IN_RANK: Final = 1
"""The rank of the Markov head of zeros that a draft without one is given, where an engine asks for one."""
BLOCK: Final[Mapping[str, Any]] = {
    "head_norms": True,
    "norm_before_residual": None,
    "norm_before_fc": None,
    "norm_output": None,
}
"""The fields of Served that are the same for every draft of blocks, DFlash and DSpark."""
DFLASH: Final[Mapping[str, Any]] = {
    **BLOCK,
    "method": "dflash",
    "anchor_predicts": False,
    "markov_rank": 0,
    "markov_head": None,
    "confidence": False,
    "confidence_with_markov": False,
}
"""The fields of Served that are the same for every draft that an engine runs as DFlash."""


@frozen(kw_only=True)
class Served:
    """A draft as an engine understands it.

    method: The algorithm that the engine runs.
    feature_layers: The zero-based decoder layers of the target whose outputs it reads, in the order of `fc`'s input.
    anchor_predicts: Whether slot 0 of a block is a prediction; None for a draft without blocks.
    block_causal: Whether a slot sees only earlier slots of its block; None for a draft without blocks.
    proposes: The tokens of a round; None if the export leaves it to the command line.
    window: The positions that a layer sees, its own included; None: all.
    head_norms: Whether queries and keys are normed head by head.
    norm_before_residual, norm_before_fc, norm_output: Where Eagle3's hidden state is normed besides; None elsewhere.
    markov_rank: 0 without a Markov head.
    """

    method: Method
    feature_layers: tuple[int, ...]
    anchor_predicts: bool | None
    block_causal: bool | None
    proposes: int | None
    mask_token_id: int | None
    window: int | None
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    norm_eps: float
    activation: str
    attention_bias: bool
    head_norms: bool
    rope: Mapping[str, Any] = field(hash=False)
    norm_before_residual: bool | None
    norm_before_fc: bool | None
    norm_output: bool | None
    markov_rank: int
    markov_head: str | None
    confidence: bool
    confidence_with_markov: bool

    @property
    def reduced(self) -> bool:
        """Whether the draft knows some of the target's tokens only, and so has an lm_head of its own."""
        return self.draft_vocab_size < self.vocab_size

    def weights(self) -> dict[str, tuple[int, ...]]:
        """The weights that the engine needs of an export, by name, without those that it shares with the target."""
        hidden, heads = self.hidden_size, self.num_heads * self.head_dim
        kv_heads, inner = self.num_kv_heads * self.head_dim, self.intermediate_size
        eagle3 = self.method == "eagle3"
        needed: dict[str, tuple[int, ...]] = {
            "fc.weight": (hidden, len(self.feature_layers) * hidden),
            "norm.weight": (hidden,),
            ("layers.0.hidden_norm.weight" if eagle3 else "hidden_norm.weight"): (hidden,),
        }
        for index in range(self.num_layers):
            layer = f"layers.{index}"
            inputs = 2 * hidden if eagle3 and index == 0 else hidden
            needed |= {
                f"{layer}.input_layernorm.weight": (hidden,),
                f"{layer}.post_attention_layernorm.weight": (hidden,),
                f"{layer}.self_attn.q_proj.weight": (heads, inputs),
                f"{layer}.self_attn.k_proj.weight": (kv_heads, inputs),
                f"{layer}.self_attn.v_proj.weight": (kv_heads, inputs),
                f"{layer}.self_attn.o_proj.weight": (hidden, heads),
                f"{layer}.mlp.gate_proj.weight": (inner, hidden),
                f"{layer}.mlp.up_proj.weight": (inner, hidden),
                f"{layer}.mlp.down_proj.weight": (hidden, inner),
            }
            if self.head_norms:
                needed |= {f"{layer}.self_attn.{name}_norm.weight": (self.head_dim,) for name in "qk"}
        if self.reduced:
            needed[HEAD] = (self.draft_vocab_size, hidden)
            needed |= {OFFSETS: (self.draft_vocab_size,), KNOWN: (self.vocab_size,)}
        return needed | self._heads()

    def _heads(self) -> dict[str, tuple[int, ...]]:
        rank, hidden = self.markov_rank, self.hidden_size
        needed: dict[str, tuple[int, ...]] = {}
        if rank:
            needed["markov_head.markov_w1.weight"] = (self.vocab_size, rank)
            needed["markov_head.markov_w2.weight"] = (self.draft_vocab_size, rank)
        if self.markov_head == "gated":
            needed |= {"markov_head.gate_proj.weight": (rank, hidden + rank), "markov_head.gate_proj.bias": (rank,)}
        if self.markov_head == "rnn":
            needed["markov_head.joint_proj.weight"] = (3 * rank, 2 * rank + hidden)
            needed["markov_head.joint_proj.bias"] = (3 * rank,)
        if self.confidence:
            features = hidden + (rank if self.confidence_with_markov else 0)
            needed |= {"confidence_head.proj.weight": (1, features), "confidence_head.proj.bias": (1,)}
        return needed


def draft_as_served(facts: ExportFacts) -> Served:
    """What a draft is. A block draft whose anchor predicts is served as DSpark, which is DFlash with a Markov head.

    `facts` are of a draft that layers.unlike_any_engine has nothing against.
    """
    config, description = facts.config, facts.description
    blocks = description.algorithm != "eagle3"
    markov_rank = int(config.get("markov_rank") or 0) if blocks else 0
    confidence = bool(blocks and config.get("enable_confidence_head"))
    dspark = blocks and (description.algorithm == "dspark" or description.anchor_predicts)
    return Served(
        method=("dspark" if dspark else "dflash") if blocks else "eagle3",
        feature_layers=description.taps,
        anchor_predicts=description.anchor_predicts if blocks else None,
        block_causal=description.causal if blocks else None,
        proposes=description.max_tokens,
        mask_token_id=config["mask_token_id"] if blocks else None,
        window=description.window,
        num_layers=description.num_layers,
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        vocab_size=config["vocab_size"],
        draft_vocab_size=config.get("draft_vocab_size") or config["vocab_size"],
        norm_eps=config["rms_norm_eps"],
        activation=config["hidden_act"],
        attention_bias=bool(config.get("attention_bias")),
        head_norms="layers.0.self_attn.q_norm.weight" in facts.shapes,
        rope=dict(config["rope_parameters"]),
        norm_before_residual=None if blocks else False,
        norm_before_fc=None if blocks else False,
        norm_output=None if blocks else False,
        markov_rank=markov_rank or (STAND_IN_RANK if dspark else 0),
        markov_head=(config.get("markov_head_type", "vanilla") if markov_rank else "vanilla") if dspark else None,
        confidence=confidence,
        confidence_with_markov=confidence and bool(config.get("confidence_head_with_markov")),
    )


def disagreements(found: Served, expected: Served) -> list[str]:
    """What an export says otherwise than the draft is, field by field. A number left to the command line agrees."""
    different = []
    for attribute in attrs.fields(Served):
        mine, theirs = getattr(found, attribute.name), getattr(expected, attribute.name)
        if mine != theirs and not (attribute.name == "proposes" and mine is None):
            different.append(f"{attribute.name}: the export says {mine}, the draft has {theirs}")
    return different
