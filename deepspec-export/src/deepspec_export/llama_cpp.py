"""llama.cpp's drafts in GGUF: the architecture `dflash`, of DFlash and DSpark alike, and the architecture `eagle3`.

Knows the keys, the names of tensors and the conventions that llama.cpp's server reads, of build 11434. Not the file
itself (gguf_file.py), nor the tokenizer's fields (gguf_tokenizer.py).

Legend: H hidden size, N rows of a projection, r rank of the Markov head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from attrs import evolve
from torch import Tensor

from deepspec_core.contracts.export import ExportFacts
from deepspec_export import layers
from deepspec_export.served import HEAD, KNOWN, OFFSETS, SHARED, Served

NAME: Final = "gguf"
WRITTEN_FOR: Final = {"llama.cpp": "build 11434", "gguf": "0.19.0"}
DFLASH, EAGLE3 = "dflash", "eagle3"
MASK: Final = "tokenizer.ggml.mask_token_id"
"""The draft's mask token. It stands among the tokenizer's keys, and no other key of theirs says anything of a draft."""
TARGET: Final = "TARGET.gguf"
"""The target's file in the line that serves a draft."""
_ENGINE: Final = "llama.cpp"
_EAGLE3_TAPS: Final = 3
# Of these targets llama.cpp does not keep the inputs of layers, which a draft reads: the server ends at its first
# request. By the source of build 11434; tried with Qwen2 in build 11549.
_WITHOUT_TAPS: Final = {"qwen2": "Export to vllm.", "gemma3": layers.NO_ENGINE, "gemma3_text": layers.NO_ENGINE}
_W1, _CONFIDENCE = "markov_head.markov_w1.weight", "confidence_head.proj.weight"
_NAMES: Final = {
    "fc.weight": "fc.weight",
    "norm.weight": "output_norm.weight",
    "hidden_norm.weight": "enc.output_norm.weight",
    HEAD: "output.weight",
    OFFSETS: "d2t",
    _W1: "markov_w1.weight",
    "markov_head.markov_w2.weight": "markov_w2.weight",
    _CONFIDENCE: "conf_proj.weight",
    "confidence_head.proj.bias": "conf_proj.bias",
}
_LAYER_NAMES: Final = {
    "input_layernorm": "attn_norm",
    "hidden_norm": "attn_norm_2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def unservable(facts: ExportFacts) -> str | None:
    """Why llama.cpp cannot serve the draft, and the nearest alternative, or None. The tokenizer is not looked at."""
    if reason := layers.unread_target(facts, engine=_ENGINE, without=_WITHOUT_TAPS):
        return reason
    eagle3 = facts.description.algorithm == "eagle3"
    reason = _unlike_eagle3(facts) if eagle3 else _unlike_dflash(facts)
    if reason is not None:
        return reason
    rope = facts.config["rope_parameters"]
    if rope.get("rope_type", "default") != "default" or set(rope) - {"rope_type", "rope_theta"}:
        return (
            f"the draft's rotary embedding is of the type {rope.get('rope_type')}, and whether llama.cpp computes the "
            "same was not tried. Train with another [draft.layer] rope, or export to vllm."
        )
    if (last := layers.last_layer_read(facts)) is not None:
        return (
            f"the draft reads the output of the target's last layer, {last}; {_ENGINE} gives the inputs of layers, "
            f"and that output is no layer's input. Train with target.layers up to {last - 1}, or export to vllm."
        )
    return None


def _unlike_dflash(facts: ExportFacts) -> str | None:
    if reason := layers.block_draft_unlike_engine(facts, engine=_ENGINE):
        return reason
    head = facts.config.get("markov_head_type", "vanilla")
    if facts.config.get("markov_rank") and head != "vanilla":
        return (
            f"{_ENGINE} has the vanilla Markov head only, and this one is {head}; export to sglang, which has all "
            'three heads, or train with [draft] markov.head = "vanilla".'
        )
    return None


def _unlike_eagle3(facts: ExportFacts) -> str | None:
    if reason := layers.unlike_any_engine(facts, engine=_ENGINE):
        return reason
    description = facts.description
    if layers.has_head_norms(facts):
        return (
            f"{_ENGINE} builds an Eagle3 draft from Llama's layer, which has no norms of queries and keys, and this "
            "draft has them. Train with [draft] qk_norm = false, or export to vllm."
        )
    if len(description.taps) != _EAGLE3_TAPS:
        return (
            f"the draft reads {len(description.taps)} of the target's layers, and {_ENGINE}'s Eagle3 reads exactly "
            f"{_EAGLE3_TAPS}. Train with target.layers = [a, b, c], or export to vllm."
        )
    if description.num_layers != 1:
        return (
            f"the draft has {description.num_layers} layers, and {_ENGINE}'s Eagle3 has one. Train with "
            "[draft] num_layers = 1, or export to vllm."
        )
    if description.window is not None:
        return (
            f"the draft sees a window of {description.window} positions, and {_ENGINE}'s Eagle3 sees all. Train "
            "without [draft.layer] window, or export to vllm."
        )
    return None


def as_written(served: Served) -> Served:
    """The draft as the file has it: numbers in fp32, and a confidence head that always reads the Markov embedding."""
    return evolve(
        served,
        norm_eps=_fp32(served.norm_eps),
        rope={"rope_type": "default", "rope_theta": _fp32(served.rope["rope_theta"])},
        confidence_with_markov=served.confidence,
    )


def architecture(served: Served) -> str:
    """What llama.cpp calls the draft: `general.architecture`."""
    return EAGLE3 if served.method == "eagle3" else DFLASH


def fields(served: Served, facts: ExportFacts) -> dict[str, Any]:
    """The file's keys, but for the tokenizer's."""
    name = architecture(served)
    found: dict[str, Any] = {
        "context_length": facts.config["max_position_embeddings"],
        "embedding_length": served.hidden_size,
        "block_count": served.num_layers,
        "feed_forward_length": served.intermediate_size,
        "attention.head_count": served.num_heads,
        "attention.head_count_kv": served.num_kv_heads,
        "attention.key_length": served.head_dim,
        "attention.value_length": served.head_dim,
        "attention.layer_norm_rms_epsilon": served.norm_eps,
        "rope.dimension_count": served.head_dim,
        "rope.freq_base": float(served.rope["rope_theta"]),
        "vocab_size": served.vocab_size,
        # The input of layer L + 1 is the output of layer L.
        "target_layers": [layer + 1 for layer in served.feature_layers],
    }
    if served.method == "eagle3":
        found |= {
            "target_hidden_size": served.hidden_size,
            "norm_before_residual": served.norm_before_residual,
            "norm_before_fc": served.norm_before_fc,
        }
        return {f"{name}.{key}": value for key, value in found.items()}
    assert served.proposes is not None
    found |= {
        "block_size": served.proposes if served.anchor_predicts else served.proposes + 1,
        "attention.causal": served.block_causal,
        "hidden_act": served.activation,
    }
    if served.method == "dspark":
        found |= {"sample_from_anchor": served.anchor_predicts, "has_confidence_head": served.confidence}
    if served.window is not None:
        found["attention.sliding_window"] = served.window
        found["attention.sliding_window_pattern"] = [True] * served.num_layers
    return {f"{name}.{key}": value for key, value in found.items()} | {MASK: served.mask_token_id}


def read(name: str, keys: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Served:
    """What llama.cpp makes of a file's architecture, keys and tensors. KeyError where one that it needs is absent."""
    eagle3 = name == EAGLE3
    own = {key.removeprefix(f"{name}."): value for key, value in keys.items() if key.startswith(f"{name}.")}
    dspark = "markov_w1.weight" in tensors
    anchor_predicts = dspark and bool(own.get("sample_from_anchor", True))
    confidence = "conf_proj.weight" in tensors
    windows = own.get("attention.sliding_window_pattern", [])
    windowed = "attention.sliding_window" in own and len(windows) == own["block_count"] and all(windows)
    if dspark and bool(own.get("has_confidence_head", True)) != confidence:
        raise KeyError("conf_proj.weight")
    return Served(
        method="eagle3" if eagle3 else "dspark" if dspark else "dflash",
        feature_layers=tuple(layer - 1 for layer in own["target_layers"]),
        anchor_predicts=None if eagle3 else anchor_predicts,
        block_causal=None if eagle3 else bool(own.get("attention.causal", False)),
        # Eagle3 leaves it to the command line. A file without a block's size is read as one of 16.
        proposes=None if eagle3 else own.get("block_size", 16) - (0 if anchor_predicts else 1),
        mask_token_id=None if eagle3 else keys[MASK],
        window=own["attention.sliding_window"] if windowed else None,
        num_layers=own["block_count"],
        hidden_size=own["embedding_length"],
        intermediate_size=own["feed_forward_length"],
        num_heads=own["attention.head_count"],
        num_kv_heads=own["attention.head_count_kv"],
        head_dim=own["attention.key_length"],
        vocab_size=own["vocab_size"],
        draft_vocab_size=len(tensors["d2t"]) if "d2t" in tensors else own["vocab_size"],
        norm_eps=own["attention.layer_norm_rms_epsilon"],
        activation=own.get("hidden_act", "silu"),
        attention_bias=False,
        head_norms=not eagle3,
        rope={"rope_type": "default", "rope_theta": own["rope.freq_base"]},
        norm_before_residual=bool(own.get("norm_before_residual", False)) if eagle3 else None,
        norm_before_fc=bool(own.get("norm_before_fc", False)) if eagle3 else None,
        norm_output=False if eagle3 else None,
        markov_rank=tensors["markov_w1.weight"].shape[1] if dspark else 0,
        markov_head="vanilla" if dspark else None,
        confidence=confidence,
        confidence_with_markov=confidence,
    )


def prepared(weights: Mapping[str, Tensor], served: Served) -> dict[str, Tensor]:
    """The export's weights by published name, as llama.cpp computes with them: norms and biases in fp32.

    A confidence head without the Markov embedding gets columns of zeros for it, which add nothing.
    """
    found = {
        name: tensor.float() if tensor.ndim == 1 and tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
        if name != KNOWN
    }
    if served.confidence and found[_CONFIDENCE].shape[1] == served.hidden_size:
        head_1H = found[_CONFIDENCE]
        found[_CONFIDENCE] = torch.cat([head_1H, head_1H.new_zeros(1, found[_W1].shape[1])], -1)
    return found


def named(weights: Mapping[str, Tensor], served: Served) -> dict[str, Tensor]:
    """Prepared weights by llama.cpp's names, in its layout."""
    found = {}
    for name, tensor in weights.items():
        if name == OFFSETS:
            # The tokens themselves.
            tensor = tensor + torch.arange(len(tensor))
        if heads := _rotated_heads(name, served):
            tensor = _halves_interleaved(tensor, heads)
        found[_name_in_file(name)] = tensor
    return found


def published(tensors: Mapping[str, Tensor], served: Served) -> dict[str, Tensor]:
    """The inverse of `named`. A tensor that llama.cpp does not know keeps its name."""
    names = {_name_in_file(name): name for name in served.weights()}
    found = {}
    for stored, tensor in tensors.items():
        name = names.get(stored, stored)
        if name == OFFSETS:
            tensor = tensor - torch.arange(len(tensor))
        if heads := _rotated_heads(name, served):
            rows = tensor.view(heads, -1, tensor.shape[1])
            # Even rows of a head are the first halves of the pairs that are rotated together, odd rows the second.
            tensor = torch.cat([rows[:, 0::2], rows[:, 1::2]], 1).reshape(tensor.shape)
        found[name] = tensor
    return found


def plain(served: Served, tensors: Mapping[str, Tensor]) -> Served:
    """The inverse of `as_written`: numbers in their shortest form, and a Markov part of zeros is none."""
    head_1F = tensors.get("conf_proj.weight")
    return evolve(
        served,
        norm_eps=_shortest(served.norm_eps),
        rope={"rope_type": "default", "rope_theta": _shortest(served.rope["rope_theta"])},
        confidence_with_markov=head_1F is not None and bool(head_1F[:, served.hidden_size :].any()),
    )


def unprepared(weights: Mapping[str, Tensor], served: Served) -> dict[str, Tensor]:
    """The inverse of `prepared`: norms and biases in the dtype of the matrices, where that holds their numbers."""
    shared = {"token_embd.weight": SHARED[0], "output.weight": SHARED[1]}
    found = {shared.get(name, name): tensor for name, tensor in weights.items()}
    stored = found["fc.weight"].dtype if "fc.weight" in found else torch.float32
    for name, tensor in found.items():
        if tensor.ndim == 1 and tensor.is_floating_point() and torch.equal(tensor.to(stored).to(tensor.dtype), tensor):
            found[name] = tensor.to(stored)
    if served.confidence and not served.confidence_with_markov:
        found[_CONFIDENCE] = found[_CONFIDENCE][:, : served.hidden_size].contiguous()
    return found


def _rotated_heads(name: str, served: Served) -> int | None:
    """The heads of a projection whose rows the file has in another order: Eagle3's queries and keys.

    Its layer is Llama's, whose rotary embedding pairs neighbours there, and not the two halves of a head.
    """
    if served.method != "eagle3":
        return None
    return {"q_proj": served.num_heads, "k_proj": served.num_kv_heads}.get(name.removesuffix(".weight").split(".")[-1])


def _halves_interleaved(weight_NH: Tensor, heads: int) -> Tensor:
    per_head = weight_NH.shape[0] // heads
    place = torch.arange(per_head).view(2, -1).T.flatten()
    rows = torch.arange(heads)[:, None] * per_head + place
    return weight_NH[rows.flatten()].contiguous()


def _name_in_file(name: str) -> str:
    if not name.startswith("layers."):
        return _NAMES.get(name, name)
    _, index, inner = name.removesuffix(".weight").split(".", 2)
    return f"blk.{index}.{_LAYER_NAMES[inner]}.weight"


def _fp32(number: float) -> float:
    return float(torch.tensor(number, dtype=torch.float32))


def _shortest(number: float) -> float:
    """The number with the fewest digits that fp32 holds as this one."""
    return next(short for digits in range(1, 18) if _fp32(short := float(f"{number:.{digits}g}")) == _fp32(number))


def notes(served: Served) -> list[str]:
    """What whoever serves the export should know."""
    found = [
        "The file is for llama.cpp's build 11434 or later. The target is a GGUF file too: its `convert_hf_to_gguf.py` "
        f"makes {TARGET} of a folder."
    ]
    if served.confidence and not served.confidence_with_markov:
        found.append(
            "The confidence head reads no Markov embedding, and llama.cpp's always does: zeros stand in its place."
        )
    return found


def command(served: Served, *, target: str, draft: str) -> str:
    """The line that serves the export."""
    kind = f"--spec-type draft-{served.method} --spec-draft-n-max {served.proposes}"
    return f"llama-server -m {target} -md {draft}/draft.gguf {kind}"
