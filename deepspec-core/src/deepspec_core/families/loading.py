"""Loads a transformers causal LM from a directory, and refuses one whose weights do not fit its config.

transformers only warns of missing weights and fills them with random numbers; a target like that would be wrong in
silence. Reads safetensors only, never the network. Knows no family.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from deepspec_core.errors import TargetError

__all__ = ["load_causal_lm"]


def load_causal_lm(
    where: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    trust_remote_code: bool = False,
    config: Any = None,
    renamed: Mapping[str, str] | None = None,
    ignored: Sequence[str] = (),
) -> Any:
    """The model of a Hugging Face directory, on `device`.

    `config` instead of the directory's own, where only a part of the model is wanted; `renamed` are patterns of names
    in the files and what they are called in that part. `ignored`: patterns (re.match) of weights in the files that the
    family knows not to need. TargetError where files cannot be read, or weights are missing, unexpected, or of other
    shapes than the config says.
    """
    given = {key: value for key, value in (("config", config), ("key_mapping", dict(renamed or {}))) if value}
    try:
        with _quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                where,
                **given,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # damaged files surface as errors of many libraries
        raise TargetError(
            "the target's weights cannot be loaded",
            where=where,
            found=f"{type(error).__name__}: {_first_line(error)}",
            expected="a config.json and the safetensors files it describes",
            fix="Check that the directory is complete; download or copy it again.",
        ) from error
    unexpected = [name for name in info["unexpected_keys"] if not any(re.match(p, name) for p in ignored)]
    mismatched = [f"{name} {tuple(found)}, not {tuple(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    problems = [
        f"{kind}: {_listed(names)}"
        for kind, names in (
            ("missing", info["missing_keys"]),
            ("not in the model", unexpected),
            ("of another shape", mismatched),
        )
        if names
    ]
    if problems:
        raise TargetError(
            "the target's weights do not fit its config.json",
            where=where,
            found="; ".join(problems),
            expected="exactly the weights the config describes",
            fix="Check that config.json and the weight files come from the same model, completely copied.",
        )
    return model.to(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no warnings of what is reported as an error here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _listed(names: Iterable[str], shown: int = 5) -> str:
    names = sorted(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
