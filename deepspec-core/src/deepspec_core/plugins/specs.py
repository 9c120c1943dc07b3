"""What a plugin offers: small frozen records, with the heavy part named as text.

`build` is "module:attribute" and is imported when the component is first used, so listing plugins and checking a run
file never import torch. `options` is a frozen keyword-only attrs class whose module imports attrs only; it is the typed
section a run file gives the component. This file imports attrs and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from attrs import Attribute, field, frozen, has
from attrs.validators import deep_iterable, instance_of, is_callable, matches_re

_REFERENCE = matches_re(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_NAME = matches_re(r"[a-z0-9][a-z0-9_.-]*")


def _attrs_class(_spec: object, _attribute: Attribute[type | None], value: type | None) -> None:
    if value is not None and not (isinstance(value, type) and has(value)):
        raise TypeError(f"'options' must be an attrs class: {value!r}")


def _nothing(_config: Mapping[str, Any]) -> bool:
    return False


@frozen(kw_only=True)
class ComponentSpec:
    """Any named component: a loss term, a weighting, a cache format, a feature source.

    `name` is what run files say; `summary` is one line for `deepspec plugins`; `build` is called as the contract of its
    kind says (contracts/), with the options object first where `options` is given.
    """

    name: str = field(validator=_NAME)
    summary: str = field(validator=instance_of(str))
    build: str = field(validator=_REFERENCE)
    options: type | None = field(default=None, validator=_attrs_class)


@frozen(kw_only=True)
class DraftModelSpec(ComponentSpec):
    """An algorithm. `build(options, adapter, taps)` returns a contracts.draft.DraftModel with new weights.

    `class_suffix`: published class names are the adapter's prefix plus this.
    `recognise(config)`: whether a checkpoint's config.json (as a mapping) is one of this algorithm's.
    `options_of(config)`: "module:attribute" of a function that reads the options and taps back from such a config.json;
    it returns (options, taps).
    `default_loss`: keys of [loss], as a run file would write them, where it does not; e.g. {"terms": {"ce": 1.0}}.
    """

    class_suffix: str = field(validator=instance_of(str))
    recognise: Callable[[Mapping[str, Any]], bool] = field(default=_nothing, validator=is_callable())
    options_of: str = field(validator=_REFERENCE)
    default_loss: Mapping[str, Any] = field(factory=dict, hash=False)


@frozen(kw_only=True)
class TargetAdapterSpec(ComponentSpec):
    """A family. `build(config, draft_layer, tokens)` returns a contracts.target.TargetAdapter of a transformers config.

    `model_types`: the values of config.model_type it covers. `draft_layer` holds the run file's overrides of the
    draft's own shape ([draft.layer]), or None; `tokens` (contracts.target.SpecialTokens) the ids read from the target's
    directory, or None to take the config's. Both are optional arguments.
    """

    model_types: tuple[str, ...] = field(validator=deep_iterable(instance_of(str), instance_of(tuple)))


@frozen(kw_only=True)
class BuiltinSpec(ComponentSpec):
    """Something a plugin ships under `builtin:NAME`.

    kind "model": `build()` returns the path of a Hugging Face directory. kind "prompts": `build(split, seed)` yields
    mappings with `id` and `messages`, for split "train" or "held_out", which share no prompt.
    """

    kind: Literal["model", "prompts"]


@frozen(kw_only=True)
class TaskSpec(ComponentSpec):
    """An evaluation task. `build(limit, seed)` yields mappings with `id` and `messages` (or `turns`)."""


@frozen(kw_only=True)
class ExportSpec(ComponentSpec):
    """One (format, algorithm) pair. `build()` returns a contracts.export.Exporter; `algorithm`: a draft type."""

    algorithm: str = field(validator=_NAME)


@frozen(kw_only=True)
class ImportSpec(ComponentSpec):
    """Reads a foreign checkpoint as a draft of type `algorithm`; names are unique within (name, algorithm).

    `recognise(config)` as for drafts; `build(path)` returns (options, taps, weights).
    """

    algorithm: str = field(validator=_NAME)
    recognise: Callable[[Mapping[str, Any]], bool] = field(default=_nothing, validator=is_callable())
