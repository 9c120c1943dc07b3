"""Whether a draft type and a target family take the packed rows that [train] batching asks for. Imports no torch."""

from __future__ import annotations

from deepspec_core.config.schema import PACKED
from deepspec_core.errors import ConfigError, DeepSpecError
from deepspec_core.plugins.registry import Registry

WHERE = "train.batching"
_ASKED = f'"{PACKED}"'
_FIX = 'Set train.batching = "bucketed", which has less padding than "padded" and packs nothing.'


def require_packed_draft(algorithm: str, registry: Registry) -> None:
    """ConfigError if drafts of this type cannot be trained on packed rows, as far as their plugin says."""
    if registry.get("draft", algorithm).takes_packed:
        return
    able = [name for name in registry.trained_drafts() if registry.get("draft", name).takes_packed]
    raise ConfigError(
        f"drafts of type {algorithm!r} cannot be trained on packed rows",
        where=WHERE,
        found=_ASKED,
        expected=f"a draft of type {', '.join(able)}" if able else "a draft type that takes packed rows",
        fix=_FIX,
    )


def require_packed_target(model_type: str, registry: Registry) -> None:
    """ConfigError if targets of this family cannot compute features of packed rows, as far as their plugin says."""
    spec = registry.adapter_for(model_type)
    if spec.takes_packed:
        return
    raise ConfigError(
        f"targets of the family {spec.name!r} cannot compute features of packed rows",
        where=WHERE,
        found=f'{_ASKED}, with features.mode = "online"',
        expected='"padded" or "bucketed", or features.mode = "cached"',
        fix=_FIX,
    )


def not_apart(error: type[DeepSpecError], who: str, where: str, raised: str | None = None) -> DeepSpecError:
    """The error for a component that did not keep the conversations of a packed row separate when tried, or raised."""
    return error(
        f"{who} lets the conversations of a packed row influence each other",
        where=where,
        found=raised or "different results for a conversation when another conversation of its row is replaced",
        expected="each conversation computed as if it were alone",
        fix=_FIX,
    )
