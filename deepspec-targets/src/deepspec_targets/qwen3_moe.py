"""The qwen3_moe family: mixture-of-experts targets whose drafts are dense layers of the qwen3 family.

Knows how the target's config becomes a dense one; the blocks are the qwen3 family's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Qwen3Config

from deepspec_targets.qwen3 import Qwen3Adapter


class Qwen3MoeAdapter(Qwen3Adapter):
    """Qwen3 mixture-of-experts targets. The draft is a Qwen3 model and saved as one; [draft.layer] gives its MLP."""

    draft_class = Qwen3Config

    def not_dense(self) -> str | None:
        """Experts: a draft cannot take its MLP's size from them."""
        return f"{self.text.num_experts} experts a layer (num_experts)"

    def draft_shape(self, sizes: Mapping[str, Any]) -> Any:
        """A dense config with what the target's config has in common with one; no layer slides."""
        return super().draft_shape({"layer_types": None, "use_sliding_window": False, **sizes})
