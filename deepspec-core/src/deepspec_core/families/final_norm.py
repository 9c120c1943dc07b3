"""Reads a target's final norm without the rest of the target, for servers that return states from before the norm.

Knows transformers' conventions: the norm is the one norm that is the decoder's own child. Knows no family.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from deepspec_core.errors import TargetError
from deepspec_core.targets.extra_weights import find_weights, read_weights


def read_final_norm(where: Path, text: Any, *, renamed: Mapping[str, str]) -> nn.Module | None:
    """The norm before the lm_head, of a directory, in float32 on the CPU. None where it cannot be told which that is.

    `text` and `renamed` are as for families.vocabulary.read_vocabulary. TargetError where a weight is of another shape
    than the config says.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text, dtype=torch.float32)
    norms = [module for module in model.get_decoder().children() if "norm" in type(module).__name__.lower()]
    if len(norms) != 1:
        return None
    (norm,) = norms
    names = {id(weight): name for name, weight in model.named_parameters()}
    found = find_weights(where, [""])
    stored = {}
    for in_file in found:
        name = str(in_file)
        for pattern, replacement in renamed.items():
            name = re.sub(pattern, replacement, name)
        stored[name] = in_file
    wanted = {own: stored.get(names[id(weight)]) for own, weight in norm.named_parameters()}
    if None in wanted.values():
        return None
    places = {own: place for own, place in wanted.items() if place is not None}
    for own, place in places.items():
        if found[place].shape != tuple(norm.get_parameter(own).shape):
            raise TargetError(
                "the target's weights do not fit its config.json",
                where=where,
                found=f"{place} {found[place].shape}",
                expected=f"{tuple(norm.get_parameter(own).shape)}",
                fix="Check that config.json and the weight files come from the same model, completely copied.",
            )
    read = read_weights({place: found[place] for place in places.values()})
    made: nn.Module = copy.deepcopy(norm).to_empty(device="cpu")
    # Copied: the tensors of a file are the file, mapped into memory, and it may change.
    made.load_state_dict({own: read[place].to(torch.float32, copy=True) for own, place in places.items()})
    return made.eval().requires_grad_(False)
