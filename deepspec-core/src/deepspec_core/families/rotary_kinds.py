"""Which kinds of rotary position embedding a target may have.

Decoding keeps keys that were rotated when the sequence was shorter. With a kind whose angles follow from the sequence's
length, they no longer fit those rotated now: the same tokens get other logits depending on how they were fed, a draft's
verification accepts other tokens than plain decoding draws, and plain decoding differs with the neighbours in a batch.
Knows configs; no family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

# The angle of a position is the same whatever comes after it.
FIXED: Final = frozenset({"default", "linear", "yarn", "llama3", "proportional"})
# Their factor multiplies the positions the target was first trained for.
_STRETCHING: Final = frozenset({"yarn", "llama3", "linear"})


def varying_rotary(text: Any) -> str | None:
    """Why the rotary embedding of a text config cannot be used, or None."""
    refused = sorted({repr(kind) for kind in _kinds(text) if kind not in FIXED})
    if not refused:
        return None
    return (
        f"the target's rotary embedding is of kind {', '.join(refused)}: its angles may follow from the sequence's "
        f"length, so that decoding is not lossless (known not to: {', '.join(sorted(FIXED))})"
    )


def positions(text: Any) -> int:
    """Positions that the target was made for: those its config names, or more where its embedding is stretched."""
    stretched = [int(factor * original) for factor, original in _stretches(getattr(text, "rope_parameters", None))]
    return max(int(text.max_position_embeddings), *stretched) if stretched else int(text.max_position_embeddings)


def _stretches(entry: object) -> Iterator[tuple[float, int]]:
    if isinstance(entry, Mapping):
        factor, original = entry.get("factor"), entry.get("original_max_position_embeddings")
        if entry.get("rope_type") in _STRETCHING and factor and original:
            yield factor, original
        for inner in entry.values():
            yield from _stretches(inner)


def _kinds(text: Any) -> Iterator[object]:
    """The kinds a config names, in newer or older spelling, for all layers or by layer type."""
    for attribute in ("rope_parameters", "rope_scaling"):
        yield from _named(getattr(text, attribute, None))


def _named(entry: object) -> Iterator[object]:
    if isinstance(entry, Mapping):
        yield from (entry[key] for key in ("rope_type", "type") if entry.get(key) is not None)
        for inner in entry.values():
            yield from _named(inner)


def with_rope(target: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A config's `rope_parameters` with a draft's own, which are those of full attention where layer types differ.

    A draft's own kind keeps only the target's base: the other parameters belong to the target's kind.
    """
    if "full_attention" in target:
        return {**target, "full_attention": with_rope(target["full_attention"], own)}
    kept = {"rope_theta": target["rope_theta"]} if "rope_type" in own else target
    whole = {name: int(value) for name, value in own.items() if name == "original_max_position_embeddings"}
    return {**kept, **own, **whole}
