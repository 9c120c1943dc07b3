"""A target of given shapes with random weights, and the built-in target's tokenizer, for measuring speed and memory.

    python tests/benchmarks/gpu/random_target.py FOLDER SHAPE

SHAPE is a name of SHAPES. A folder that is whole is left as it is. Nothing such a target says means anything.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from deepspec_core.plugins.discovery import load_plugins

# Hidden size, MLP width, layers, heads, key and value heads, head size, vocabulary, tied.
SHAPES = {
    "tiny": (64, 128, 4, 4, 2, 16, 2048, True),
    "0.6b": (1024, 3072, 28, 16, 8, 128, 151_936, True),
    "4b": (2560, 9728, 36, 32, 8, 128, 151_936, True),
    "8b": (4096, 12_288, 36, 32, 8, 128, 151_936, False),
}


def main(folder: Path, shape: str) -> None:
    if (folder / "whole").is_file():
        return
    shutil.rmtree(folder, ignore_errors=True)
    hidden, mlp, layers, heads, kv_heads, head_dim, vocabulary, tied = SHAPES[shape]
    config = Qwen3Config(
        hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=vocabulary, tie_word_embeddings=tied,
        max_position_embeddings=40_960, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    builtin = Path(load_plugins().registry.load("builtin", "tiny-qwen3")())
    for path in builtin.iterdir():
        if "token" in path.name or path.name.endswith(".jinja"):
            shutil.copy(path, folder / path.name)
    (folder / "whole").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
