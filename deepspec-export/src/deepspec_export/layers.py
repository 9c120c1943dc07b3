"""Whether engines have a draft's layers: they implement their own kind, whatever the target's family is.

Block drafts (DFlash, DSpark) have Qwen3's layers, with norms of queries and keys. Eagle3 has Llama's, or Qwen3's where
the engine says so. Knows names of weights and keys of config.json; not any engine's format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from deepspec_core.contracts.export import ExportFacts
from deepspec_core.families.styled import TARGET_FAMILY

_OURS: Final = (
    'Train with [draft.layer] style = "qwen3", which gives the draft layers that engines have. Its checkpoint, which '
    "`deepspec evaluate` decodes with, needs no export."
)
NO_ENGINE: Final = (
    "No engine is known that gives them. The checkpoint, which `deepspec evaluate` decodes with, needs no export."
)
_NORMS: Final = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_LAYER: Final = frozenset(
    {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
    }
)
# Families whose layers have the same names and compute otherwise are told apart by these.
_PLAIN_FAMILIES: Final = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
# Families of targets whose embedding is multiplied by a number before the first layer.
_SCALED: Final = "gemma"


def unread_target(facts: ExportFacts, *, engine: str, without: Mapping[str, str]) -> str | None:
    """Why an engine cannot run the draft beside its target, or None.

    `without`: the families of targets whose layers' outputs the engine does not give, and what to do instead.
    """
    family = facts.config.get(TARGET_FAMILY, facts.config["model_type"])
    if family not in without:
        return None
    return (
        f"{engine} gives no outputs of layers of {family} targets. The draft reads them, so it cannot be served there, "
        f"whatever its own layers are. {without[family]}"
    )


def unlike_any_engine(facts: ExportFacts, *, engine: str) -> str | None:
    """Why no engine's draft layers compute what this draft's do, and the nearest alternative; None if some may."""
    config, family = facts.config, facts.config["model_type"]
    if facts.softcap is not None:
        return f"{engine} does not soft-cap a draft's logits as the {family} family does. {_OURS}"
    own = {name.removeprefix("layers.0.") for name in facts.shapes if name.startswith("layers.0.")}
    biases = sorted(name for name in own if name.endswith(".bias"))
    if biases:
        return (
            f"the draft's layers have biases ({', '.join(biases)}), as the {family} family's, and {engine}'s draft "
            f"layers have none. {_OURS}"
        )
    strange = sorted(own - _LAYER - set(_NORMS) - {"hidden_norm.weight"})
    missing = sorted(_LAYER - own)
    if strange or missing or family not in _PLAIN_FAMILIES:
        return (
            f"the draft's layers are the {family} family's"
            + (f", with {', '.join(strange)}" if strange else "")
            + (f", without {', '.join(missing)}" if missing else "")
            + f"; {engine} builds a draft from Qwen3's or Llama's. {_OURS}"
        )
    if config["hidden_act"] != "silu":
        return f"{engine} computes a draft's MLP with silu, and this draft's is {config['hidden_act']}. {_OURS}"
    if min(facts.description.taps) < 0:
        return (
            f"the draft reads the target's embedding (layer -1), and {engine} gives outputs of decoder layers only. "
            "Train with target.layers from 0."
        )
    return None


def scales_embedding(facts: ExportFacts) -> str | None:
    """The target's family, where a draft in another family's style was trained without the scale of its embedding."""
    target = facts.config.get(TARGET_FAMILY)
    return str(target) if target is not None and str(target).startswith(_SCALED) else None


def last_layer_read(facts: ExportFacts) -> int | None:
    """The target's last layer, where the draft reads its output: no layer's input, which is what some engines give."""
    count = facts.config.get("num_target_layers")
    return None if not count or max(facts.description.taps) < count - 1 else int(count) - 1


def has_head_norms(facts: ExportFacts) -> bool:
    """Whether queries and keys are normed, as in Qwen3's layers and not in Llama's."""
    return all(f"layers.0.{name}" in facts.shapes for name in _NORMS)


def block_draft_unlike_engine(facts: ExportFacts, *, engine: str) -> str | None:
    """As unlike_any_engine, for DFlash and DSpark, whose layers are Qwen3's in every engine."""
    if reason := unlike_any_engine(facts, engine=engine):
        return reason
    if facts.config.get("draft_vocab_size"):
        return (
            f"whether {engine} maps the tokens of a DFlash or DSpark draft's reduced vocabulary as this one's was not "
            "tried. Train without [draft] vocab_size, or export an Eagle3 draft."
        )
    if has_head_norms(facts):
        return None
    return (
        f"{engine} builds DFlash and DSpark drafts from Qwen3's layers, with norms of queries and keys, and layers of "
        f'the {facts.config["model_type"]} family have none. Train with [draft.layer] style = "qwen3", or train an '
        "Eagle3 draft."
    )
