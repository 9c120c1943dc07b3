"""Targets and drafts for a notebook: opened by name, checked against each other, ready to decode.

Knows how names become loaded models; not what is done with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from attrs import field, frozen

from deepspec_core.checkpoints import published
from deepspec_core.checkpoints.opening import check_same_target, draft_adapter, resolve_draft
from deepspec_core.contracts.draft import DraftDescription, DraftModel
from deepspec_core.contracts.target import TargetAdapter, TargetArchitecture, TargetModel
from deepspec_core.dtypes import torch_dtype
from deepspec_core.errors import ConfigError
from deepspec_core.plugins.discovery import Plugins, load_plugins
from deepspec_core.targets.opening import load_target as load_weights
from deepspec_core.targets.opening import open_target_alone, resolve_model, tokenizer_for


@frozen(kw_only=True, eq=False)
class Target:
    """A loaded target. `name` is what it was asked for; `tokenizer` is transformers' own."""

    name: str
    adapter: TargetAdapter
    model: TargetModel
    tokenizer: Any = field(repr=False)
    plugins: Plugins = field(repr=False)

    @property
    def architecture(self) -> TargetArchitecture:
        """Sizes and special tokens."""
        return self.adapter.architecture

    def __repr__(self) -> str:
        a = self.architecture
        sizes = f"{a.num_layers} layers, hidden size {a.hidden_size}, vocabulary {a.vocab_size:,}"
        return f"<Target {self.name}: {a.model_type}, {sizes}, {self.model.dtype} on {self.model.device}>"


@frozen(kw_only=True, eq=False)
class Draft:
    """A loaded draft of a target. `path` is its directory, `description` says what it is."""

    path: Path
    model: DraftModel = field(repr=False)
    description: DraftDescription

    def __repr__(self) -> str:
        said = self.description
        return f"<Draft {self.path}: {said.algorithm}, {said.num_layers} layers, {said.max_tokens} tokens a round>"


def load_target(
    name: str,
    *,
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Target:
    """The target of a directory, a Hub id or `builtin:NAME`, with its weights and its tokenizer.

    `dtype` is "float32", "bfloat16" or "float16"; left out, it is float32 on a CPU, where results are exact, and
    bfloat16 elsewhere. `device` is PyTorch's name of a device; left out, the accelerator if there is one. `revision` is
    a branch, tag or commit on the Hub. Raises DeepSpecError where there is no such target, or no plugin covers it.
    """
    plugins = load_plugins()
    where_to = _device(device)
    numbers = torch_dtype(dtype or ("float32" if where_to.type == "cpu" else "bfloat16"))
    where = resolve_model(name, base=Path.cwd(), registry=plugins.registry, revision=revision)
    adapter, _ = open_target_alone(
        where, registry=plugins.registry, trust_remote_code=trust_remote_code, revision=revision
    )
    model = load_weights(
        adapter, where, dtype=numbers, device=where_to, trust_remote_code=trust_remote_code, revision=revision
    )
    tokenizer = tokenizer_for(where, trust_remote_code, revision=revision)
    return Target(name=name, adapter=adapter, model=model, tokenizer=tokenizer, plugins=plugins)


def load_draft(name: str | Path, target: Target) -> Draft:
    """The draft of a directory or a Hub id, in the target's dtype and on its device.

    Raises DeepSpecError where there is no such checkpoint, no installed algorithm knows it, its weights are damaged, or
    it was made for a target of other sizes.
    """
    registry = target.plugins.registry
    folder = resolve_draft(name, base=Path.cwd())
    adapter = draft_adapter(folder, registry=registry)
    check_same_target(folder, adapter.architecture, target.architecture)
    model = published.load_draft(
        folder, registry=registry, adapter=adapter, dtype=target.model.dtype, device=target.model.device
    )
    return Draft(path=folder, model=model, description=model.describe())


def _device(name: str | None) -> torch.device:
    if name is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return torch.device("cpu") if found is None else found
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            "no such device", where="load_target(device=...)", found=name, expected="such as cpu, cuda or cuda:1"
        ) from error
