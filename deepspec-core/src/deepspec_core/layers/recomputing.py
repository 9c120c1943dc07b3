"""Activation checkpointing: a draft's layers keep their inputs, and compute the rest again in backward.

Results stay the same. A step takes the time of the layers' forward pass once more, and the memory of one layer's
activations in place of all. Knows decoder layers and their slot `run`. Does not know algorithms; the row engine keeps
no logits, so it has nothing to recompute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, Final

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deepspec_core.errors import ConfigError
from deepspec_core.layers.decoder_layer import DraftLayer
from deepspec_core.plugins.origin import component_of, package_of

__all__ = ["recompute_layers"]

# What stands around the forward pass that is running. It stands around its recomputation too.
_AROUND: Final[ContextVar[Callable[[], AbstractContextManager[None]]]] = ContextVar("around", default=nullcontext)


@contextmanager
def around_layers(context: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Inside, `context()` is entered: now, and again in backward where a layer of this pass is computed again."""
    before = _AROUND.set(context)
    try:
        with context():
            yield
    finally:
        _AROUND.reset(before)


def recompute_layers(draft: nn.Module) -> None:
    """Let every DraftLayer of the draft compute its activations again in backward.

    ConfigError if it has none: layers of another make have no slot for it.
    """
    layers = [part for part in draft.modules() if isinstance(part, DraftLayer)]
    if not layers:
        raise ConfigError(
            "the draft's activations cannot be computed again",
            where="train.checkpoint_activations",
            found=f"{package_of(draft)}, {component_of(draft)}, without such layers",
            expected="a draft of deepspec_core.layers.decoder_layer.DraftLayer",
            fix="Set it to false.",
        )
    for layer in layers:
        layer.run = _recomputed


def _recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    if not torch.is_grad_enabled():
        return function(*arguments)
    around = _AROUND.get()
    # Layers draw no random numbers, so the generators' states need not be kept.
    return checkpoint(
        function,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=lambda: (nullcontext(), around()),
    )
