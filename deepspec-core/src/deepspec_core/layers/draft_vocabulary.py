"""The vocabulary of a draft that knows some of the target's tokens: which they are, and their logits among all others.

Knows token ids and logits. Does not know which tokens are best (data/frequent_tokens.py counts them), or any algorithm.

Legend: D tokens of the draft, V tokens of the target, H hidden size, ... any leading dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepspec_core.contracts.target import TargetArchitecture
from deepspec_core.errors import ConfigError

__all__ = ["KEY", "DraftVocabulary"]

KEY = "draft_ids"
"""The published name of the ids in a checkpoint."""


class DraftVocabulary(nn.Module):
    """`size` tokens of a target. They are a buffer, so a checkpoint has them; set by `choose` before training.

    ids: [D] int64, the tokens in increasing order. New: the first D.
    target_head: [V, H], the target's whole head, while training; else on the meta device, a shape without numbers.
    """

    ids: Tensor
    target_head: Tensor

    def __init__(self, size: int, architecture: TargetArchitecture, *, where: str = "[draft] vocab_size") -> None:
        """ConfigError, at `where`, if the target has fewer tokens, or needs more of them to end an answer."""
        super().__init__()
        self.target_size = architecture.vocab_size
        least = len(set(architecture.stop_token_ids))
        if not least <= size <= self.target_size:
            raise ConfigError(
                "a draft cannot have a vocabulary of this size",
                where=where,
                found=f"{size:,}",
                expected=f"from {least} (the target's stop tokens) to {self.target_size:,} (all of its tokens)",
            )
        self.register_buffer("ids", torch.arange(size))
        # Not a buffer: it is the target's own memory, and no part of a checkpoint.
        self.target_head = torch.empty(self.target_size, architecture.hidden_size, device="meta")

    def choose(self, ids_D: Tensor) -> None:
        """Take these tokens, [D] int64, increasing."""
        with torch.no_grad():
            self.ids.copy_(ids_D)

    def spread(self, logits_D: Tensor) -> Tensor:
        """Logits of the draft's tokens [..., D] among all of the target's [..., V]; those of others are -inf."""
        logits_V = logits_D.new_full((*logits_D.shape[:-1], self.target_size), -torch.inf)
        return logits_V.index_copy(-1, self.ids, logits_D)

    def problem(self) -> str | None:
        """What is wrong with the ids, as a checkpoint may hold them, or None."""
        ids_D = self.ids
        if bool(((ids_D < 0) | (ids_D >= self.target_size)).any()):
            return f"from {int(ids_D.min())} to {int(ids_D.max())}"
        return None if bool((ids_D[1:] > ids_D[:-1]).all()) else "ids that do not increase"
