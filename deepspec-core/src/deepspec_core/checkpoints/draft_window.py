"""How a draft checkpoint's config.json says that its attention slides over the context.

Families whose sliding layers are built as their full ones say it as their targets do: every entry of `layer_types` is
`sliding_attention`, and `sliding_window` is the number. Elsewhere those keys would announce layers of another shape,
and the number stands under `draft_window` alone. Config files without `layer_types`, as older libraries write them,
leave which layers slide to their family, so they are refused where some might. Knows these keys; not families, nor what
a window does.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspec_core.errors import CheckpointError

__all__ = ["DRAFT_WINDOW", "SLIDING", "window_of"]

DRAFT_WINDOW = "draft_window"
"""The key of the window where `layer_types` cannot say it."""
SLIDING = "sliding_attention"
"""The entry of `layer_types` for a layer that slides."""

_MOST = 2**20


def window_of(config: Mapping[str, Any], path: Path) -> int | None:
    """Positions that each of the draft's layers sees, its own included; None if all.

    CheckpointError, naming the key, where the number makes no sense, only some layers slide, or the keys do not say
    whether they do. `path`: config.json.
    """
    layer_types = config.get("layer_types")
    kinds = set(map(str, layer_types)) if isinstance(layer_types, list) else set()
    if SLIDING in kinds and len(kinds) > 1:
        raise CheckpointError(
            "some of the draft's layers have sliding attention and some have full attention",
            where=f"{path}: layer_types",
            found=", ".join(sorted(kinds)),
            expected=f"one kind for all layers, full_attention or {SLIDING}",
        )
    if SLIDING in kinds and config.get("use_sliding_window") is False:
        raise CheckpointError(
            "config.json contradicts itself about sliding attention",
            where=f"{path}: use_sliding_window",
            found=f"false, with {SLIDING} in layer_types",
            expected="keys that agree",
        )
    if layer_types is None and _may_slide(config):
        raise CheckpointError(
            "config.json has a window, but does not say which layers use it",
            where=f"{path}: layer_types",
            found=f"none, with sliding_window = {config['sliding_window']!r}",
            expected=f"full_attention or {SLIDING} for each layer",
        )
    key = "sliding_window" if SLIDING in kinds else DRAFT_WINDOW
    window = config.get(key)
    if window is None and key == DRAFT_WINDOW:
        return None
    if type(window) is not int or not 1 <= window <= _MOST:
        raise CheckpointError(
            f"{path.name} cannot be used",
            where=f"{path}: {key}",
            found=repr(window)[:80],
            expected=f"the positions a layer sees, from 1 to {_MOST:,}",
        )
    return window


def _may_slide(config: Mapping[str, Any]) -> bool:
    """Whether a family would take some layers to slide, by `sliding_window` and the keys that limit it."""
    layers, first = config.get("num_hidden_layers"), config.get("max_window_layers")
    beyond = type(first) is int and type(layers) is int and first >= layers
    return config.get("sliding_window") is not None and config.get("use_sliding_window") is not False and not beyond
