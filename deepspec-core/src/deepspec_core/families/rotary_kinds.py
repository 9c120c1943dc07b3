"""Which kinds of rotary position embedding a target may have.

Decoding caches keys that were rotated when the sequence was shorter. If the angles depend on the sequence's length,
cached keys do not fit new ones. The same tokens then get other logits depending on how they were fed, verification
accepts other tokens than plain decoding draws, and plain decoding depends on the neighbours in a batch. Knows configs;
knows no family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from deepspec_core.errors import TargetError
from deepspec_core.layers.options import ROPE_READS, rope_problem

# The angle of a position is the same whatever comes after it.
FIXED: Final = frozenset({"default", "linear", "yarn", "llama3", "proportional"})
# Their factor multiplies the positions the target was first trained for.
_STRETCHING: Final = frozenset({"yarn", "llama3", "linear"})
# More than any model was stretched by.
_LARGEST_FACTOR: Final = 2**20


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
    stretches = _stretches(getattr(text, "rope_parameters", None))
    stretched = [int(factor * own) for factor, own in stretches if _is_factor(factor) and _is_positions(own)]
    return max([int(text.max_position_embeddings), *stretched])


def _stretches(entry: object) -> Iterator[tuple[Any, Any]]:
    """Factors and the positions they multiply, by their kinds. Those of `linear` that name no positions are left out:
    max_position_embeddings is the scaled number there. transformers fills the positions in for the others.
    """
    if isinstance(entry, Mapping):
        factor, original = entry.get("factor"), entry.get("original_max_position_embeddings")
        if entry.get("rope_type") in _STRETCHING and factor is not None and original is not None:
            yield factor, original
        for inner in entry.values():
            yield from _stretches(inner)


def senseless_rotary(text: Any) -> str | None:
    """Why the factor of a text config's rotary embedding, or the positions it multiplies, make no sense, or None."""
    for factor, original in _stretches(getattr(text, "rope_parameters", None)):
        if not _is_factor(factor):
            return f"the factor of the rotary embedding is {factor!r}, not a number from 1 to {_LARGEST_FACTOR:,}"
        if not _is_positions(original):
            return f"original_max_position_embeddings is {original!r}, not a whole number from 1"
    return None


def _is_factor(value: object) -> bool:
    return type(value) in (int, float) and 1 <= value <= _LARGEST_FACTOR  # type: ignore[operator]


def _is_positions(value: object) -> bool:
    return type(value) is int and value >= 1


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

    A draft's own kind keeps only the target's base: the other parameters belong to the target's kind. TargetError where
    the kind would not read a parameter, so that it changed nothing, or the parameters do not go together.
    """
    if "full_attention" in target:
        return {**target, "full_attention": with_rope(target["full_attention"], own)}
    kept = {"rope_theta": target["rope_theta"]} if "rope_type" in own else target
    whole = {name: int(value) for name, value in own.items() if name == "original_max_position_embeddings"}
    entry = {**kept, **own, **whole}
    kind = entry.get("rope_type", "default")
    # Of kinds that a draft cannot choose, those parameters are known that the target has.
    read = (*ROPE_READS.get(kind, target), "rope_type", "rope_theta")
    unread = [name for name in own if name not in read]
    problem = (
        f"not have {', '.join(unread)}, which rope_type {kind} does not read"
        if unread
        else rope_problem({name: value for name, value in entry.items() if name in read and value is not None})
    )
    if problem is not None:
        raise TargetError(
            f"the draft's rotary parameters must {problem}",
            where="[draft.layer] rope",
            found=", ".join(f"{name} = {value!r}" for name, value in own.items()),
            fix=f"Give them with a rope_type of the draft's own: {', '.join(ROPE_READS)}.",
        )
    return entry
