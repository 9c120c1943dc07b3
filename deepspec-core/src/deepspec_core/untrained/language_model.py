"""A language model that a draft uses, found as a target is: a directory, a Hub id or builtin:NAME.

Knows how models are opened. Does not know what the draft does with it. Code of a model's own repository is never run.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen

from deepspec_core.checkpoints.weight_file import read_header
from deepspec_core.contracts.target import TargetAdapter, TargetArchitecture, TargetModel
from deepspec_core.errors import CheckpointError, TargetError
from deepspec_core.plugins.registry import Registry
from deepspec_core.targets.opening import (
    fetched,
    fingerprint,
    load_target,
    open_target_alone,
    resolve_model,
    tokenizer_for,
)


@frozen(kw_only=True, eq=False)
class FoundModel:
    """A contracts.untrained.LanguageModel."""

    name: str
    tokenizer: Any = field(repr=False)
    _where: str | Path
    _revision: str | None
    _adapter: TargetAdapter
    _dtype: torch.dtype
    _device: torch.device

    @property
    def architecture(self) -> TargetArchitecture:
        """Sizes and special tokens."""
        return self._adapter.architecture

    def digest(self) -> str:
        """The fingerprint that a target has."""
        return fingerprint(self._where, revision=self._revision)

    def load(self) -> TargetModel:
        """The model with its weights."""
        return load_target(self._adapter, self._where, dtype=self._dtype, device=self._device, revision=self._revision)

    def parameters(self) -> int:
        """As many numbers as the headers of its weight files say."""
        folder = fetched(self._where, self._revision)
        shapes = (read_header(path).shapes.values() for path in sorted(folder.glob("*.safetensors")))
        return sum(prod(shape) for found in shapes for shape in found)


def open_language_model(
    name: str, revision: str | None, *, base: Path, registry: Registry, dtype: torch.dtype, device: torch.device
) -> FoundModel:
    """The model of that name, without its weights. CheckpointError where it cannot be had, or no family covers it."""
    try:
        where = resolve_model(name, base=base, registry=registry, revision=revision)
        adapter, _ = open_target_alone(where, registry=registry, revision=revision)
        tokenizer = tokenizer_for(where, revision=revision)
    except TargetError as error:
        # The same words are about the target elsewhere.
        raise CheckpointError(
            f"the model that is to draft cannot be opened: {error.problem}",
            where=error.where,
            found=error.found,
            expected=error.expected,
            fix=error.fix,
        ) from error
    return FoundModel(
        name=name, tokenizer=tokenizer, where=where, revision=revision, adapter=adapter, dtype=dtype, device=device
    )
