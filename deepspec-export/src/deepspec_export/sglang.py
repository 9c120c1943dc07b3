"""SGLang's format: a transformers config whose `architectures` names one of SGLang's draft classes.

Knows the keys and defaults of SGLang 0.5.23. Not weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from deepspec_core.contracts.export import ExportFacts
from deepspec_core.families.styled import TARGET_FAMILY
from deepspec_export import layers, transformer_keys
from deepspec_export.served import BLOCK, DFLASH, Served

NAME: Final = "sglang"
WRITTEN_FOR: Final = {"sglang": "0.5.23"}
_ENGINE: Final = "SGLang"
_DFLASH, _DSPARK, _EAGLE3 = "DFlashDraftModel", "Qwen3DSparkModel", "LlamaForCausalLMEagle3"
_HEADS: Final = ("vanilla", "gated", "rnn")
_EAGLE3_INSTEAD: Final = 'Train an Eagle3 draft with [draft.layer] style = "llama"'
# By its classes of targets, which tests/test_sglang_package.py asks: they give outputs of layers to Eagle3 only.
_WITHOUT_BLOCK_TAPS: Final = {
    "qwen2": f"{_EAGLE3_INSTEAD}, or export to vllm.",
    "gemma3": f"{_EAGLE3_INSTEAD}.",
    "gemma3_text": f"{_EAGLE3_INSTEAD}.",
}

# Its other classes give the inputs of layers, so not what the last one puts out.
_GIVES_ALL_LAYERS: Final = "gemma"


def unservable(facts: ExportFacts) -> str | None:
    """Why SGLang cannot serve the draft, and the nearest alternative, or None."""
    if facts.description.algorithm != "eagle3" and (
        reason := layers.unread_target(facts, engine=f"{_ENGINE}, for DFlash and DSpark,", without=_WITHOUT_BLOCK_TAPS)
    ):
        return reason
    family = str(facts.config.get(TARGET_FAMILY, facts.config["model_type"]))
    if (last := layers.last_layer_read(facts)) is not None and not family.startswith(_GIVES_ALL_LAYERS):
        return (
            f"the draft reads the output of the target's last layer, {last}. SGLang gives the inputs of layers of "
            f"{family} targets, and that output is no layer's input. Train with target.layers up to {last - 1}, or "
            "export to vllm."
        )
    if facts.description.algorithm != "eagle3":
        if reason := layers.block_draft_unlike_engine(facts, engine=_ENGINE):
            return reason
        target = layers.scales_embedding(facts)
        return target and (
            f"the target's family, {target}, scales its embedding, and SGLang gives DFlash and DSpark drafts the "
            "scaled one. This draft, in another family's style, was trained on the embedding as it is. Export to "
            "vllm or gguf, or train an Eagle3 draft."
        )
    if reason := layers.unlike_any_engine(facts, engine=_ENGINE):
        return reason
    if layers.has_head_norms(facts):
        return (
            "SGLang's Eagle3 has Llama's layers: it would drop this draft's norms of queries and keys without a word. "
            "Train with [draft] qk_norm = false, or export to vllm."
        )
    if facts.description.num_layers > 1:
        return (
            f"the draft has {facts.description.num_layers} layers, and SGLang's Eagle3 norms later ones otherwise than "
            "they were trained. Train with [draft] num_layers = 1, or export to vllm."
        )
    if facts.description.window is not None:
        return (
            "SGLang reads the window of an Eagle3 draft from its command line only. Train without [draft.layer] "
            "window, or export to vllm."
        )
    return None


def config(served: Served, facts: ExportFacts) -> dict[str, Any]:
    """The whole config.json."""
    keys = transformer_keys.written(served, facts)
    if served.method == "eagle3":
        return keys | {
            "architectures": [_EAGLE3],
            # None: the target's lm_head.
            "draft_vocab_size": served.draft_vocab_size if served.reduced else None,
            "eagle_config": {
                "use_aux_hidden_state": True,
                "eagle_aux_hidden_state_layer_ids": list(served.feature_layers),
                "norm_before_fc": served.norm_before_fc,
            },
            "num_aux_hidden_states": len(served.feature_layers),
            "target_hidden_size": served.hidden_size,
            "norm_output": served.norm_output,
        }
    assert served.proposes is not None
    layer_ids = {"target_layer_ids": list(served.feature_layers), "mask_token_id": served.mask_token_id}
    if served.method == "dflash":
        # The verify window: what is proposed, and the anchor.
        return keys | {"architectures": [_DFLASH], "block_size": served.proposes + 1, "dflash_config": layer_ids}
    return (
        keys
        | layer_ids
        | {
            "architectures": [_DSPARK],
            # The number of proposals, whether the anchor's slot is one of them or not.
            "block_size": served.proposes,
            "sample_from_anchor": served.anchor_predicts,
            "markov_rank": served.markov_rank,
            "markov_head_type": served.markov_head,
            "enable_confidence_head": served.confidence,
            "confidence_head_with_markov": served.confidence_with_markov,
        }
    )


def read(keys: Mapping[str, Any]) -> Served:
    """What SGLang makes of a config.json. KeyError where a key that it needs is absent."""
    (architecture,) = keys["architectures"]
    shape = transformer_keys.read(keys)
    if architecture == _EAGLE3:
        eagle = keys["eagle_config"]
        ids = eagle["eagle_aux_hidden_state_layer_ids"]
        if keys.get("num_aux_hidden_states", len(ids)) != len(ids) or keys.get("fc_norm") or keys.get("use_aux_norm"):
            raise KeyError("num_aux_hidden_states")
        return Served(
            method="eagle3",
            feature_layers=tuple(ids),
            anchor_predicts=None,
            block_causal=None,
            proposes=None,
            mask_token_id=None,
            head_norms=False,
            # The residual stream is always the hidden state before its norm.
            norm_before_residual=False,
            norm_before_fc=bool(eagle.get("norm_before_fc", keys.get("norm_before_fc", False))),
            norm_output=bool(keys.get("norm_output", False)),
            markov_rank=0,
            markov_head=None,
            confidence=False,
            confidence_with_markov=False,
            draft_vocab_size=keys["draft_vocab_size"] or keys["vocab_size"],
            **(shape | {"window": None}),
        )
    inner = keys.get("dflash_config") or keys
    shape |= {
        "feature_layers": tuple(inner["target_layer_ids"]),
        "block_causal": transformer_keys.causal(keys),
        "mask_token_id": inner["mask_token_id"],
        "draft_vocab_size": keys["vocab_size"],
    }
    if architecture != _DSPARK:
        return Served(proposes=keys["block_size"] - 1, **shape, **DFLASH)
    head = str(keys.get("markov_head_type", "vanilla")).lower()
    if head not in _HEADS or keys["markov_rank"] < 1:
        raise KeyError("markov_head_type")
    confidence = bool(keys.get("enable_confidence_head", True))
    return Served(
        method="dspark",
        anchor_predicts=bool(keys.get("sample_from_anchor", True)),
        proposes=keys["block_size"],
        markov_rank=keys["markov_rank"],
        markov_head=head,
        confidence=confidence,
        confidence_with_markov=confidence and bool(keys.get("confidence_head_with_markov", True)),
        **shape,
        **BLOCK,
    )


def notes(served: Served) -> list[str]:
    """What whoever serves the export should know."""
    if served.method != "dspark" or served.confidence:
        return []
    return [
        "SGLang serves a DSpark draft without a confidence head in its default verify mode only "
        "(SGLANG_RAGGED_VERIFY_MODE=static), whatever enable_confidence_head says."
    ]


def command(served: Served, *, target: str, draft: str) -> str:
    """The line that serves the export."""
    line = f"python -m sglang.launch_server --model-path {target} --speculative-algorithm {served.method.upper()}"
    line += f" --speculative-draft-model-path {draft}"
    if served.method != "eagle3":
        return line
    assert served.proposes is not None
    return (
        f"{line} --speculative-num-steps {served.proposes} --speculative-eagle-topk 1 "
        f"--speculative-num-draft-tokens {served.proposes + 1}"
    )
