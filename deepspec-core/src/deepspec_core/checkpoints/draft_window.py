"""How a draft checkpoint's config.json says that its attention slides over the context.

Families whose sliding layers are built as their full ones say it as their targets do: every entry of `layer_types` is
`sliding_attention`, and `sliding_window` is the number. Elsewhere those keys would announce layers of another shape,
and the number stands under `draft_window` alone. Knows these keys; not families, nor what a window does.
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

    CheckpointError, naming the key, where the number makes no sense, or only some layers slide. `path`: config.json.
    """
    layer_types = config.get("layer_types")
    kinds = set(map(str, layer_types)) if isinstance(layer_types, list) else set()
    if SLIDING in kinds and len(kinds) > 1:
        raise CheckpointError(
            "some of the draft's layers slide and some do not",
            where=f"{path}: layer_types",
            found=", ".join(sorted(kinds)),
            expected=f"one kind for all layers, full_attention or {SLIDING}",
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
