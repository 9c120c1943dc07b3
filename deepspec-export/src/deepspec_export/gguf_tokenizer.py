"""The tokenizer's keys of a GGUF file, from the target's tokenizer as transformers has it.

A draft's file holds its target's tokens, of which llama.cpp takes the number and the mask token: text is split by the
target's own file. Knows byte-level BPE, which all targets have whose drafts llama.cpp serves with query and key norms.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

_PREFIX: Final = "tokenizer.ggml."
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
DEFAULT: Final = "default"
"""What llama.cpp calls no way to split text in particular."""
# How these tokenizers split text before BPE, by a piece of the pattern that no other of them has.
_SPLITS: Final = {
    r"?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|": "qwen2",
    r"?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|": "qwen35",
    r"?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|": "llama-bpe",
}
_GPT2: Final = "gpt-2"


def unwritable(tokenizer: Any) -> str | None:
    """Why the tokenizer cannot be written, and what to do instead, or None."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    table = {} if backend is None else json.loads(backend.to_str())
    kind = table.get("model", {}).get("type")
    if kind == "BPE" and not table["model"].get("byte_fallback") and _is_byte_level(table):
        return None
    return (
        f"the file holds the target's tokenizer, and this one is {kind or 'none of the tokenizers package'}"
        f"{'' if kind != 'BPE' else ' without bytes as its letters'}, not byte-level BPE. Export to vllm, and convert "
        "that folder with llama.cpp's convert_hf_to_gguf.py --target-model-dir."
    )


def keys(tokenizer: Any, vocab_size: int) -> dict[str, Any]:
    """The keys of a tokenizer that `unwritable` has nothing against, padded to `vocab_size` tokens."""
    table = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for text, index in table["model"]["vocab"].items():
        if index < vocab_size:
            tokens[index], types[index] = text, _NORMAL
    for added in table["added_tokens"]:
        if added["id"] < vocab_size:
            tokens[added["id"]] = added["content"]
            types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in table["model"]["merges"]]
    found: dict[str, Any] = {
        "model": "gpt2",
        "pre": split_name(tokenizer),
        "tokens": tokens,
        "token_type": types,
        "merges": merges,
    }
    for name in ("bos", "eos", "pad"):
        if (token_id := getattr(tokenizer, f"{name}_token_id")) is not None:
            found[name + "_token_id" if name != "pad" else "padding_token_id"] = int(token_id)
    found["add_bos_token"] = _adds_bos(tokenizer)
    return {_PREFIX + key: value for key, value in found.items()}


def split_name(tokenizer: Any) -> str:
    """llama.cpp's name of how the tokenizer splits text, DEFAULT where it is none of those known here."""
    stages = _stages(json.loads(tokenizer.backend_tokenizer.to_str()).get("pre_tokenizer"))
    patterns = [str(stage.get("pattern", {}).get("Regex", "")) for stage in stages if stage["type"] == "Split"]
    if not patterns:
        return _GPT2 if any(stage.get("use_regex") for stage in stages) else DEFAULT
    found = {name for part, name in _SPLITS.items() if part in patterns[0]}
    return found.pop() if len(patterns) == len(found) == 1 else DEFAULT


def _is_byte_level(table: Mapping[str, Any]) -> bool:
    return any(stage["type"] == "ByteLevel" for stage in _stages(table.get("pre_tokenizer")))


def _stages(stage: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if stage is None:
        return []
    return list(stage["pretokenizers"]) if stage["type"] == "Sequence" else [stage]


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
