"""What an algorithm provides whose drafts are not trained: a draft made from its options, and facts about itself.

Such a draft has no checkpoint and no train stage. It needs no embedding, head or taps of the target. Core makes it
where it evaluates or generates. This file knows no algorithm and no family.
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
    """A causal language model that an installed family covers. Only `load` reads its weights.

    `tokenizer` is transformers' own.
    """

    @property
    def name(self) -> str: ...

    @property
    def architecture(self) -> TargetArchitecture: ...

    @property
    def tokenizer(self) -> Any: ...

    def digest(self) -> str:
        """Differs for every other model: of a directory, every byte of its weights counts; of a Hub id, the commit."""
        ...

    def load(self) -> TargetModel:
        """The model with its weights and a key-value cache of its own, in the dtype and on the device of the target."""
        ...

    def parameters(self) -> int:
        """How many numbers its weight files hold. From the Hub they are fetched for it."""
        ...


@frozen(kw_only=True, eq=False)
class Surroundings:
    """What a draft that is not trained is made for.

    architecture, tokenizer (transformers' own), dtype and device are the target's. `open_model(name, revision)` finds a
    language model by directory, Hub id or builtin:NAME; relative paths start where those of the user start. It raises
    DeepSpecError where there is none, or no installed family covers it. `revision` may be None.
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
    num_layers: The decoder layers that it runs; 0 for a draft without a network.
    gives_confidence: Whether its proposals carry confidence.
    remarks: Sentences that users have to know, such as where it proposes nothing. They are shown as warnings.
    """

    algorithm: str
    max_tokens: int
    num_layers: int = 0
    gives_confidence: bool = False
    remarks: tuple[str, ...] = ()


@runtime_checkable
class UntrainedDraft(Protocol):
    """A draft that is not trained.

    `build(options, surroundings)` of its spec makes it. It raises DeepSpecError where the draft does not fit the
    target, such as one with another tokenizer. Making it reads no weights, because it is made before the first stage.
    """

    def describe(self) -> UntrainedDescription:
        """Facts about this draft. Reads no weights."""
        ...

    def digest(self) -> str:
        """Differs where proposals may differ though the options are the same: of the files that it reads, or ""."""
        ...

    def proposer(self) -> Proposer:
        """The decoding side. Weights are read at the first call. All calls may return the same proposer."""
        ...

    def parameters(self) -> int:
        """How many numbers it computes with; 0 for a draft without a network. Called after `proposer`."""
        ...
