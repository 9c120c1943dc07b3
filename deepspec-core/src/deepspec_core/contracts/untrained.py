"""The contract of drafts that are not trained: they are made from their options, and describe themselves.

Such a draft has no checkpoint and no train stage. It needs no embedding, head or taps of the target. Core makes it when
it evaluates or generates. This file knows no algorithm and no family.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from attrs import frozen

from deepspec_core.contracts.proposer import Proposer
from deepspec_core.contracts.target import TargetArchitecture, TargetModel

__all__ = ["LanguageModel", "Surroundings", "UntrainedDescription", "UntrainedDraft"]


@runtime_checkable
class LanguageModel(Protocol):
    """A causal language model of an installed family. Only `load` reads its weights.

    `tokenizer` is the transformers tokenizer.
    """

    @property
    def name(self) -> str: ...

    @property
    def architecture(self) -> TargetArchitecture: ...

    @property
    def tokenizer(self) -> Any: ...

    def digest(self) -> str:
        """Identifies the model: the commit of a Hub id; for a directory, a digest in which every byte of its weights
        counts."""
        ...

    def load(self) -> TargetModel:
        """The model with its weights and a key-value cache of its own, in the dtype and on the device of the target."""
        ...

    def parameters(self) -> int:
        """The number of parameters in its weight files. Downloads the files if they are on the Hub."""
        ...


@frozen(kw_only=True, eq=False)
class Surroundings:
    """The target, and access to other models, for a draft that is not trained.

    architecture, tokenizer (from transformers), dtype and device are the target's. `open_model(name, revision)` finds a
    language model by directory, Hub id or builtin:NAME. Relative paths start where the user's other paths start: at the
    run file's folder, or at the working directory. It raises DeepSpecError if there is no such model, or no installed
    family covers it. `revision` may be None.
    """

    architecture: TargetArchitecture
    tokenizer: Any
    dtype: torch.dtype
    device: torch.device
    open_model: Callable[[str, str | None], LanguageModel]


@frozen(kw_only=True)
class UntrainedDescription:
    """Facts about a draft that is not trained.

    algorithm: The draft type.
    max_tokens: The largest number of tokens that it proposes in one round.
    num_layers: The number of decoder layers that it runs; 0 for a draft without a network.
    gives_confidence: Whether its proposals carry confidence.
    remarks: Sentences that users must know, such as when the draft proposes nothing. They are shown as warnings.
    """

    algorithm: str
    max_tokens: int
    num_layers: int = 0
    gives_confidence: bool = False
    remarks: tuple[str, ...] = ()


@runtime_checkable
class UntrainedDraft(Protocol):
    """A draft that is not trained.

    `build(options, surroundings)` of its spec makes it. `build` raises DeepSpecError if the draft does not fit the
    target, for instance because it has another tokenizer. `build` reads no weights, because core calls it before the
    first stage.
    """

    def describe(self) -> UntrainedDescription:
        """Facts about this draft. Reads no weights."""
        ...

    def digest(self) -> str:
        """A digest of everything beside the options that proposals depend on, such as the files that it reads; "" if
        there is nothing."""
        ...

    def proposer(self) -> Proposer:
        """The proposer. The first call reads the weights. All calls may return the same proposer."""
        ...

    def parameters(self) -> int:
        """The number of its parameters; 0 for a draft without a network. Called after `proposer`."""
        ...
