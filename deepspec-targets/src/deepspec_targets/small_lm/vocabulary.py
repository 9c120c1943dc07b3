"""Whether two tokenizers are one: the same ids for the same tokens.

Embeddings are padded to sizes that computers like, so models with one tokenizer have vocabularies of different sizes.
Only the tokenizers are compared. Knows maps from tokens to ids; not models.
"""

from __future__ import annotations

from collections.abc import Mapping

_SHOWN = 3


def differences(mine: Mapping[str, int], others: Mapping[str, int]) -> str | None:
    """How the draft's map differs from the target's, in words; None if they are equal."""
    if mine == others:
        return None
    both = [token for token in mine if token in others and mine[token] != others[token]]
    parts = {
        "with another id (the draft's, the target's)": [
            f"{token!r} is {mine[token]}, {others[token]}" for token in both
        ],
        "only in the draft's": [repr(token) for token in mine if token not in others],
        "only in the target's": [repr(token) for token in others if token not in mine],
    }
    return "; ".join(f"{len(found):,} {what}: {_listed(found)}" for what, found in parts.items() if found)


def _listed(found: list[str]) -> str:
    return ", ".join(found[:_SHOWN]) + (" ..." if len(found) > _SHOWN else "")
