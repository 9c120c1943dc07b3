"""Chooses the family style of a new run's draft so that some serving engine supports it, by asking installed exporters.

The draft is built on the meta device in the style of each family. Knows no format, no family and no engine. If only
formats that accept every draft accept the target's own style, no engine serves that style.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attrs import evolve, frozen

from deepspec_core.checkpoints.export_facts import facts_of
from deepspec_core.checkpoints.exports import Format
from deepspec_core.contracts.export import TargetName
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.errors import DeepSpecError
from deepspec_core.layers.options import LayerOptions
from deepspec_core.plugins.registry import Registry
from deepspec_core.targets.opening import open_adapter


@frozen(kw_only=True)
class ServedStyle:
    """A style, the target opened with it, and the formats that take a draft in it and not in the target's own."""

    style: str
    adapter: TargetAdapter
    formats: tuple[str, ...]


def served_style(
    algorithm: str,
    options: Any,
    adapter: TargetAdapter,
    taps: tuple[int, ...],
    *,
    where: str | Path,
    layer: LayerOptions,
    tokenizer: Callable[[], Any],
    registry: Registry,
) -> ServedStyle | None:
    """The style that most installed formats take; None where the target's own is served, or no other is either.

    `adapter` is the target's, opened with `layer`; `options` are the draft type's.
    """
    styles: dict[str, TargetAdapter] = {}
    for name in registry.names("target"):
        try:
            styles[name] = open_adapter(where, registry=registry, draft_layer=evolve(layer, style=name))
        except DeepSpecError:
            continue  # the family has no layers of these sizes, or is not whole
    formats = _formats(algorithm, registry)

    def taken(by: TargetAdapter) -> set[str]:
        try:
            with torch.device("meta"):
                draft = registry.load("draft", algorithm)(options, by, taps)
            facts = facts_of(draft, by, target=TargetName(name="target"), tokenizer=tokenizer)
        except DeepSpecError:
            return set()
        return {form.name for form in formats if _takes(form, facts)}

    own = taken(adapter)
    each = {name: taken(by) for name, by in styles.items()}
    of_any = set.intersection(own, *each.values())
    best = max(each, key=lambda name: len(each[name]), default=None)
    if own != of_any or best is None or not each[best] > own:
        return None
    return ServedStyle(style=best, adapter=styles[best], formats=tuple(sorted(each[best] - own)))


def _formats(algorithm: str, registry: Registry) -> list[Format]:
    found = []
    for name in registry.names("exporter"):
        if algorithm in registry.algorithms("exporter", name):
            try:
                found.append(Format.of(name, algorithm, registry))
            except DeepSpecError:
                continue  # `deepspec plugins` says what is wrong with it
    return found


def _takes(form: Format, facts: Any) -> bool:
    try:
        form.check(facts, where="a new run file")
    except DeepSpecError:
        return False
    return True
