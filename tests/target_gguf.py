"""A Qwen3 target as a GGUF file for llama.cpp, for tests and trials: `python tests/target_gguf.py TARGET_DIR OUT.gguf`.

llama.cpp's own converter knows tokenizers by name, and the built-in target's is none of them. Knows Qwen3's weights.
Prompts go to the server as token ids, so how it would split text does not matter.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from deepspec_export import gguf_file, gguf_tokenizer

LAYER = {
    "input_layernorm": "attn_norm",
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
OUTER = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def write_target(folder: Path, out: Path) -> None:
    """The file in fp32, with the chat template and without other fields than the engine needs."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    tensors = {_name(name): value.to(torch.float32) for name, value in weights.items()}
    if config["tie_word_embeddings"]:
        # A draft shares the target's head by its own name.
        tensors["output.weight"] = tensors["token_embd.weight"]
    keys: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }
    named = {f"qwen3.{key}": value for key, value in keys.items()}
    spoken = gguf_tokenizer.keys(tokenizer, config["vocab_size"])
    if tokenizer.chat_template:
        spoken["tokenizer.chat_template"] = tokenizer.chat_template
    gguf_file.write(out, "qwen3", named | spoken, tensors)


def _name(name: str) -> str:
    if name in OUTER or not name.startswith("model.layers."):
        return OUTER.get(name, name.replace("lm_head", "output"))
    index, _, inner = name.removeprefix("model.layers.").removesuffix(".weight").partition(".")
    return f"blk.{index}.{LAYER[inner]}.weight"


if __name__ == "__main__":
    write_target(Path(sys.argv[1]), Path(sys.argv[2]))
