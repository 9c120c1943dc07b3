"""The window of a draft's attention: how many positions each of its layers sees.

Knows a draft's layers and how much it proposes in one round. Which positions a window hides, in training and in
decoding, is in each algorithm's attention.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepspec_core.errors import ConfigError
from deepspec_core.layers.decoder_layer import DraftLayer

__all__ = ["window_of_layers"]


def window_of_layers(layers: Sequence[DraftLayer], *, least: int, because: str) -> int | None:
    """Positions that every layer sees, its own included; None if all.

    ConfigError where the window is smaller than `least`; `because` says what needs so many, such as "block_size".
    """
    (window,) = {layer.attention.window for layer in layers}
    if window is not None and window < least:
        raise ConfigError(
            "the draft's window is smaller than what it proposes in one round",
            where="[draft.layer] window",
            found=window,
            expected=f"at least {because} = {least}",
            fix="Choose a larger window, or leave it out: the whole context.",
        )
    return window
