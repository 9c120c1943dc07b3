"""Reads a target's embedding and lm_head without the rest of it: all that training on stored features needs.

Only these tensors are read from the safetensors files. Knows transformers' conventions of names; no family.

Legend: V vocabulary, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from deepspec_core.contracts.target import TargetVocabulary
from deepspec_core.errors import TargetError
from deepspec_core.targets.extra_weights import find_weights, read_weights

__all__ = ["read_vocabulary"]


def read_vocabulary(
    where: Path, text: Any, *, renamed: Mapping[str, str], dtype: torch.dtype, device: torch.device | str
) -> TargetVocabulary | None:
    """The embedding and the lm_head of a directory, in `dtype` on `device`. None if the files do not name them so.

    `text` is the config of the text part. `renamed` are patterns of names in the files and what they are called in that
    part. TargetError where a weight is of another shape than the config says.
    """
    with torch.device("meta"):  # the names and shapes, without a number
        model = AutoModelForCausalLM.from_config(text, dtype=dtype)
    embedding, head = model.get_decoder().get_input_embeddings(), model.get_output_embeddings()
    parts = {"embedding": embedding.weight, "head": head.weight}
    names = {id(weight): name for name, weight in model.named_parameters()}
    stored: dict[str, str] = {}
    found = find_weights(where, [""])
    for in_file in found:
        name = str(in_file)
        for pattern, replacement in renamed.items():
            name = re.sub(pattern, replacement, name)
        stored[name] = in_file
    tied = parts["embedding"] is parts["head"] or bool(getattr(text, "tie_word_embeddings", False))
    wanted = {part: stored.get(names[id(weight)]) for part, weight in parts.items() if part == "embedding" or not tied}
    if None in wanted.values():
        return None
    for part, place in wanted.items():
        assert place is not None
        if found[place].shape != tuple(parts[part].shape):
            raise TargetError(
                "the target's weights do not fit its config.json",
                where=where,
                found=f"{place} {found[place].shape}",
                expected=f"{tuple(parts[part].shape)}",
                fix="Check that config.json and the weight files come from the same model, completely copied.",
            )
    read = read_weights({name: found[name] for name in wanted.values() if name is not None})

    def taken(part: str) -> Tensor:
        # Copied: the tensors of a file are the file, mapped into memory, and it may change.
        return read[str(wanted[part])].to(device, dtype, copy=True)

    embedding_VH = taken("embedding")
    return TargetVocabulary(embedding=embedding_VH, head=embedding_VH if tied else taken("head"))
