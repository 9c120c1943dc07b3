"""A target's embedding and lm_head without the rest of it, from wherever the target is stored.

Knows places, as opening.py does. Whether and how the two can be read apart is the adapter's business.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deepspec_core.contracts.target import TargetAdapter, TargetVocabulary
from deepspec_core.targets.opening import fetched

if TYPE_CHECKING:
    import torch


def load_vocabulary(
    adapter: TargetAdapter,
    where: str | Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> TargetVocabulary | None:
    """The target's embedding and lm_head without the rest of it; None if only the whole target has them."""
    read = getattr(adapter, "vocabulary", None)
    if read is None:
        return None
    found: TargetVocabulary | None = read(fetched(where, revision, trust_remote_code), dtype=dtype, device=device)
    return found
