"""[draft.layer]: the draft's own shape, if it differs from the target's. Imports attrs and core's bounds only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from attrs import Attribute, evolve, field, frozen
from attrs.validators import instance_of, optional

from deepspec_core.config.bounds import whole

__all__ = ["ROPE_READS", "LayerOptions", "rope_problem"]

_SIZES = 2**20
_HEADS = 2**12
_MOST: Final = 1e15

# What a model's config.json calls these keys, and people write by habit.
CONFIG_NAMES: Final = {"num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads"}
ROPE_READS: Final[dict[str, tuple[str, ...]]] = {
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "yarn": ("rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
    "llama3": ("rope_theta", "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
"""The kinds of rotary embedding that a draft may be given, and the parameters that each reads."""
_ROPE_NEEDS: Final[dict[str, tuple[str, ...]]] = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
_ROPE_NUMBERS: Final = tuple(dict.fromkeys(name for names in ROPE_READS.values() for name in names))
# The frequencies between which an embedding is stretched in part: the name of the lower, of the higher, defaults.
_ROPE_RANGES: Final = (("beta_slow", "beta_fast", 1.0, 32.0), ("low_freq_factor", "high_freq_factor", 0.0, _MOST))


def _rotary(_options: object, attribute: Attribute[Any], given: dict[str, float | str]) -> None:
    """Known names, numbers that make sense, and what the kind reads and needs, where it is given."""
    for name, value in given.items():
        if name == "rope_type":
            if value not in _ROPE_NEEDS:
                raise ValueError(f"'{attribute.name}.rope_type' must be one of {', '.join(_ROPE_NEEDS)}: {value}")
        elif name not in _ROPE_NUMBERS:
            raise ValueError(f"'{attribute.name}' must have names among rope_type, {', '.join(_ROPE_NUMBERS)}: {name}")
        elif type(value) not in (int, float) or not 0 < float(value) <= _MOST:
            raise ValueError(f"'{attribute.name}.{name}' must be a number above 0: {value}")
        elif name == "factor" and float(value) < 1:
            raise ValueError(f"'{attribute.name}.{name}' must be a number >= 1: {value}")
        elif name == "rope_theta" and float(value) <= 1:
            raise ValueError(f"'{attribute.name}.{name}' must be a number above 1: {value}")
        elif name == "original_max_position_embeddings" and not float(value).is_integer():
            raise ValueError(f"'{attribute.name}.{name}' must be a whole number: {value}")
    problem = None if "rope_type" not in given else rope_problem(given)
    if problem is not None:
        raise ValueError(f"'{attribute.name}' must {problem}")


def rope_problem(entry: Mapping[str, Any]) -> str | None:
    """What `rope_parameters` must have instead, in words, where its kind is among ROPE_READS; None if all is well."""
    kind = str(entry.get("rope_type", "default"))
    missing = [name for name in _ROPE_NEEDS.get(kind, ()) if name not in entry]
    if missing:
        return f"have {', '.join(missing)} for rope_type {kind}"
    unread = [name for name in entry if name in _ROPE_NUMBERS and name not in ROPE_READS.get(kind, _ROPE_NUMBERS)]
    if unread:
        return f"not have {', '.join(unread)}, which rope_type {kind} does not read"
    for slow, fast, lowest, highest in _ROPE_RANGES:
        if not entry.get(slow, lowest) < entry.get(fast, highest):
            return f"have a {slow} below {fast}: {entry.get(slow, lowest):g} and {entry.get(fast, highest):g}"
    return None


@frozen(kw_only=True)
class LayerOptions:
    """[draft.layer]: the shape of the draft's layers. A key that is left out takes the target's value.

    style: The family whose layers the draft has (projections, norms, MLP, rotary embedding), by its name in
        `deepspec plugins`. The sizes are still the target's. The draft then also embeds tokens and forms logits as that
        family does, with the target's weights. Serving engines support draft layers of few families. Left out: the
        target's own family.
    intermediate_size: The width of the MLP. Required for targets without dense layers.
    num_heads: The number of query heads.
    num_kv_heads: The number of key and value heads.
    head_dim: The size of a head.
    rope: Parameters of the rotary embedding that differ from the target's, by their names in the `rope_parameters` of
        config.json, such as {rope_type = "yarn", factor = 4.0, original_max_position_embeddings = 32768}. With a
        `rope_type`, only the base (`rope_theta`) is taken from the target. Without one, only parameters that the
        target's `rope_type` reads are allowed.
    window: The number of positions that each of the draft's attention layers sees, the query's own included, in
        training as in decoding. The cost of the draft's decoding and its cache then stop growing with the context. It
        must be at least the number of tokens that the draft proposes in one round. Left out: the whole context.
    """

    style: str | None = field(default=None, validator=optional(instance_of(str)))
    intermediate_size: int | None = field(default=None, validator=optional(whole(1, _SIZES)))
    num_heads: int | None = field(default=None, validator=optional(whole(1, _HEADS)))
    num_kv_heads: int | None = field(default=None, validator=optional(whole(1, _HEADS)))
    head_dim: int | None = field(default=None, validator=optional(whole(1, _SIZES)))
    rope: dict[str, float | str] | None = field(default=None, validator=optional(_rotary))
    window: int | None = field(default=None, validator=optional(whole(1, _SIZES)))

    def for_target(self, family: str) -> LayerOptions:
        """The same for a target of `family`: a style that is its own is none, so that its config's other keys count."""
        return evolve(self, style=None) if self.style == family else self
