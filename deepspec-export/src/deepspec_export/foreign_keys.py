"""Whether what a draft of another project says can be meant: the types and bounds of all that importing reads.

Checked before anything is built from it: a number that is damaged or meant to harm would take the machine's memory, and
a value of another type would end in the middle of the work. Knows names of keys, of config.json in every format and of
a GGUF file; not what a key means in a format.

Legend: D tokens of the draft, V of the target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from deepspec_core.checkpoints.config_numbers import check_numbers
from deepspec_core.checkpoints.draft_window import SLIDING
from deepspec_core.config.bounds import MANY
from deepspec_core.errors import CheckpointError
from deepspec_export.served import KNOWN, OFFSETS, Served
from deepspec_export.transformer_keys import FULL

_LAYERS, _WIDTH, _TOKENS = 10_000, 2**24, 1024
# The most of each whole number; the least is 1, of an id and a rank 0. The second half are a GGUF file's.
_MOST: Final = {
    "num_hidden_layers": _LAYERS, "num_target_layers": _LAYERS, "hidden_size": _WIDTH, "target_hidden_size": _WIDTH,
    "intermediate_size": _WIDTH, "num_attention_heads": _WIDTH, "num_key_value_heads": _WIDTH, "head_dim": _WIDTH,
    "vocab_size": MANY, "draft_vocab_size": MANY, "max_position_embeddings": MANY, "sliding_window": MANY,
    "block_size": _TOKENS, "speculative_tokens": _TOKENS, "mask_token_id": MANY, "markov_rank": _WIDTH,
    "num_aux_hidden_states": _LAYERS,
    "block_count": _LAYERS, "embedding_length": _WIDTH, "feed_forward_length": _WIDTH, "context_length": MANY,
    "attention.head_count": _WIDTH, "attention.head_count_kv": _WIDTH, "attention.key_length": _WIDTH,
    "attention.sliding_window": MANY, "tokenizer.ggml.mask_token_id": MANY,
}  # fmt: skip
_FROM_ZERO: Final = ("mask_token_id", "tokenizer.ggml.mask_token_id", "markov_rank")
_NUMBERS: Final = ("rms_norm_eps", "attention.layer_norm_rms_epsilon", "rope.freq_base")
_WORDS: Final = ("hidden_act", "rope_type", "type", "model_type", "markov_head_type", "name_or_path")
_TRUTHS: Final = (
    "is_causal", "causal", "attention.causal", "attention_bias", "sample_from_anchor", "norm_before_residual",
    "norm_before_fc", "norm_output", "fc_norm", "use_aux_norm", "enable_confidence_head", "has_confidence_head",
    "confidence_head_with_markov", "sliding_window_non_causal",
)  # fmt: skip
_TABLES: Final = (
    "rope_parameters", "rope_scaling", "dflash_config", "eagle_config", "transformer_layer_config",
    "speculators_config", "verifier",
)  # fmt: skip
_LAYER_LISTS: Final = (
    "target_layer_ids", "eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids", "target_layers",
)  # fmt: skip
_WORD_LISTS: Final = ("architectures", "layer_types")
# Of a GGUF file: whether each layer slides.
_WINDOWED: Final = "attention.sliding_window_pattern"


def _is_whole(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _rule(key: str) -> tuple[Callable[[Any], bool], str] | None:
    """Whether a value can be the key's, and which can; None for a key that is not read."""
    if key in _MOST:
        least, most = (0 if key in _FROM_ZERO else 1), _MOST[key]
        return lambda value: _is_whole(value, least, most), f"a whole number from {least} to {most:,}"
    if key in _NUMBERS:
        return lambda value: type(value) in (int, float) and 0 < value < 1e15, "a number above 0"
    if key in _WORDS:
        return lambda value: type(value) is str, "a text"
    if key in _TRUTHS:
        return lambda value: type(value) is bool, "true or false"
    if key in _TABLES:
        return lambda value: isinstance(value, Mapping), "a table"
    if key in _LAYER_LISTS:
        return _are_rising_layers, "a list of layer numbers in rising order, which drafts here read their features in"
    if key == _WINDOWED:
        return _are_all_alike, "true for all layers or false for all: a draft here has one window for all of them"
    if key in _WORD_LISTS:
        return lambda value: type(value) is list and all(type(word) is str for word in value), "a list of texts"
    return None


def _are_rising_layers(value: object) -> bool:
    if not isinstance(value, list) or not value or not all(_is_whole(layer, -1, _LAYERS) for layer in value):
        return False
    return all(one < next_one for one, next_one in pairwise(value))


def _are_all_alike(value: object) -> bool:
    return isinstance(value, list) and all(type(one) is bool for one in value) and len(set(value)) < 2


def check_keys(keys: Mapping[str, Any], path: Path, *, prefix: str = "") -> None:
    """CheckpointError, naming the key, where a key that importing reads has a value that none can be. Null is left out.

    `prefix` stands before the names of a GGUF file's own keys, and is not in the table of them.
    """
    for name, value in keys.items():
        rule = _rule(name.removeprefix(prefix))
        if rule is not None and value is not None and not rule[0](value):
            raise unusable(path, name, value, rule[1])
        if name in _TABLES and value:
            check_keys(value, path)
    check_numbers(keys, path)


def check_layer_types(layers: Mapping[str, Any], path: Path) -> None:
    """CheckpointError where `layer_types` gives the layers of a draft different kinds, or contradicts other keys.

    `layers`: The keys that describe layers. A draft here has one window for all of its layers, or none.
    """
    kinds, slides = layers.get("layer_types"), layers.get("use_sliding_window")
    if kinds is None:
        if slides and layers.get("sliding_window") is not None:
            found = f"none, with sliding_window = {layers['sliding_window']} and use_sliding_window = true"
            raise unusable(path, "layer_types", found, f"{FULL} or {SLIDING} for each layer")
        return
    if set(kinds) not in ({FULL}, {SLIDING}):
        expected = f"{FULL} for all layers or {SLIDING} for all: a draft here has one window for all of them"
        raise unusable(path, "layer_types", kinds, expected)
    if kinds[0] == SLIDING and slides is False:
        raise unusable(path, "use_sliding_window", slides, f"true, because layer_types says {SLIDING}")


def check_served(served: Served, path: Path) -> None:
    """CheckpointError where a number that every draft needs is left out or null, or numbers do not fit each other."""
    for name, value, most in (
        ("num_hidden_layers", served.num_layers, _LAYERS),
        ("hidden_size", served.hidden_size, _WIDTH),
        ("intermediate_size", served.intermediate_size, _WIDTH),
        ("num_attention_heads", served.num_heads, _WIDTH),
        ("num_key_value_heads", served.num_kv_heads, _WIDTH),
        ("head_dim", served.head_dim, _WIDTH),
        ("vocab_size", served.vocab_size, MANY),
        ("draft_vocab_size", served.draft_vocab_size, served.vocab_size),
    ):
        if not _is_whole(value, 1, most):
            raise unusable(path, name, value, f"a whole number from 1 to {most:,}")
    if served.num_heads % served.num_kv_heads:
        raise unusable(path, "num_key_value_heads", served.num_kv_heads, f"a divisor of {served.num_heads} heads")
    if served.head_dim % 2:
        raise unusable(path, "head_dim", served.head_dim, "an even number: the rotary embedding turns pairs")
    if type(served.norm_eps) not in (int, float):
        raise unusable(path, "rms_norm_eps", served.norm_eps, "a number above 0")
    if served.method == "eagle3":
        if served.proposes is not None and not _is_whole(served.proposes, 1, _TOKENS):
            raise unusable(path, "speculative_tokens", served.proposes, f"a whole number from 1 to {_TOKENS:,}")
        return
    if not _is_whole(served.proposes, 1, _TOKENS):
        raise unusable(path, "block_size", f"a block that proposes {served.proposes} tokens", f"1 to {_TOKENS:,}")
    if not _is_whole(served.mask_token_id, 0, served.vocab_size - 1):
        raise unusable(path, "mask_token_id", served.mask_token_id, f"a token below {served.vocab_size:,}")


def check_vocabulary(weights: Mapping[str, Tensor], served: Served) -> None:
    """CheckpointError where `d2t` is not [D] of int32 or int64, or `t2d` not [V] of truth values or whole numbers."""
    whole = (torch.int64, torch.int32)
    for name, length, kinds in (
        (OFFSETS, served.draft_vocab_size, whole),
        (KNOWN, served.vocab_size, (torch.bool, torch.uint8, *whole)),
    ):
        tensor = weights.get(name)
        if tensor is not None and (tuple(tensor.shape) != (length,) or tensor.dtype not in kinds):
            raise CheckpointError(
                "the draft's vocabulary cannot be read",
                where=name,
                found=f"{list(tensor.shape)} of {_word(tensor.dtype)}",
                expected=f"[{length}] of {' or '.join(map(_word, kinds))}",
            )


def _word(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def unusable(path: Path, key: str, found: object, expected: str) -> CheckpointError:
    """The refusal of one key's value."""
    return CheckpointError(
        f"{path.name} cannot be used", where=f"{path}: {key}", found=repr(found)[:80], expected=expected
    )
