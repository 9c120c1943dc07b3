"""A draft whose layers start as copies of the target's own: [draft] init = "target:last" or "target:taps".

A weight of a draft's layer is published under the name that the target's family has for it, so the names say which
weight of the target it starts from. The final norm starts from the target's too. Knows runs, the names and shapes in
the target's files, and the layers that core builds drafts of. Does not know any algorithm or family.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Final

import torch
from attrs import frozen

from deepspec_core.checkpoints.published import published_name
from deepspec_core.config.draft_start import LAST, TARGET_STARTS
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.errors import ConfigError
from deepspec_core.layers.decoder_layer import DraftLayer
from deepspec_core.pipeline.run import Run
from deepspec_core.targets.extra_weights import StoredWeight, find_weights

log = logging.getLogger("deepspec")

# What every layer of a family has. An algorithm's own parts of a layer start new.
_FAMILYS: Final = (
    "before_attention.",
    "after_attention.",
    "before_mlp.",
    "after_mlp.",
    "output_scale.",
    "attention.",
    "mlp.",
)
_NORM: Final = "norm.weight"
_LAYER: Final = re.compile(r"(.*?)layers\.(\d+)\.")
_SHOWN: Final = 4


@frozen(kw_only=True)
class Copies:
    """weights: Names in the target's files, by the draft's own names. layers: The target's layer of each draft layer.
    new: The draft's own names of what starts new in these layers."""

    weights: Mapping[str, str]
    layers: tuple[int, ...]
    new: tuple[str, ...]


def begins_with_target(run: Run) -> bool:
    """Whether the run's draft starts from layers of the target."""
    return run.file.draft.init in TARGET_STARTS


def layers_of(start: str, *, draft_layers: int, taps: tuple[int, ...], target_layers: int) -> tuple[int, ...]:
    """The target's layer that each of a draft's layers starts from, first to last.

    "target:last": the target's last ones, in order. "target:taps": those whose outputs are tapped, spread over the
    draft's layers by their order; a draft of one layer starts from the last of them.
    """
    if start == LAST:
        return tuple(range(target_layers - draft_layers, target_layers))
    tapped = [tap for tap in taps if tap >= 0]
    most = len(tapped) - 1
    if draft_layers == 1:
        return (tapped[-1],)
    return tuple(
        tapped[(2 * index * most + draft_layers - 1) // (2 * (draft_layers - 1))] for index in range(draft_layers)
    )


def check_target_start(run: Run, draft: DraftModel) -> None:
    """ConfigError where the draft's layers are not the target's in names or shapes. `draft` may be on fake tensors.

    Of a target on the Hub that is not here yet, it is known when training begins.
    """
    from deepspec_core.targets.opening import extra_weights_before

    stored = extra_weights_before(run.target.where, ("",), revision=run.file.target.revision)
    if stored is None:
        log.info("that the draft's layers can start from the target's is not known before the target is downloaded")
        return
    copies_of(run, draft, stored)


def take_target_layers(run: Run, draft: DraftModel) -> None:
    """Copy the weights, and say which. ConfigError as in `check_target_start`."""
    from deepspec_core.targets.opening import fetched

    copies = copies_of(run, draft, find_weights(fetched(run.target.where, run.file.target.revision), ("",)))
    weights = run.target.extra_weights(sorted(set(copies.weights.values())))
    own = draft.state_dict()
    with torch.no_grad():
        for name, of_target in copies.weights.items():
            own[name].copy_(weights[of_target])
    log.info(
        "draft.init: %d weights with %s numbers are those of the target's layers %s%s",
        len(copies.weights),
        f"{sum(own[name].numel() for name in copies.weights):,}",
        ", ".join(map(str, copies.layers)),
        f"; new in these layers: {', '.join(copies.new)}" if copies.new else "",
    )


def copies_of(run: Run, draft: DraftModel, stored: Mapping[str, StoredWeight]) -> Copies:
    """Which weight of the target each of the draft's starts from."""
    layers = [(name, part) for name, part in draft.named_modules() if isinstance(part, DraftLayer)]
    if not layers:
        raise _refused(
            run, f"a draft of type {run.file.draft.type!r}", "a draft type with layers of the target's family"
        )
    if run.file.draft.layer.style is not None:
        raise _refused(run, f"draft.layer.style = {run.file.draft.layer.style!r}", "layers of the target's own family")
    count = run.target.architecture.num_layers
    if len(layers) > count:
        raise _refused(run, f"{len(layers)} layers of the draft", f"at most the target's {count}")
    if run.file.draft.init != LAST and not any(tap >= 0 for tap in run.file.target.layers):
        raise _refused(run, f"target.layers = {list(run.file.target.layers)}", "at least one tapped layer")
    start = run.file.draft.init
    assert start is not None
    chosen = layers_of(start, draft_layers=len(layers), taps=run.file.target.layers, target_layers=count)
    names = draft.describe().weight_names
    wanted: dict[str, tuple[int, str]] = {}
    new: list[str] = []
    for index, (place, part) in enumerate(layers):
        for inner in part.state_dict():
            own = f"{place}.{inner}"
            rest = published_name(own, names).removeprefix(f"layers.{index}.")
            if inner.startswith(_FAMILYS):
                wanted[own] = (chosen[index], rest)
            else:
                new.append(own)
    before = _place_of_layers(stored, {rest for _, rest in wanted.values()})
    weights = {own: f"{before}layers.{layer}.{rest}" for own, (layer, rest) in wanted.items()}
    norm = next((own for own in draft.state_dict() if published_name(own, names) == _NORM), None)
    if norm is not None and f"{before}{_NORM}" in stored:
        weights[norm] = f"{before}{_NORM}"
    shapes = {own: tuple(value.shape) for own, value in draft.state_dict().items()}
    unfit = list(_unfit(weights, shapes, stored))
    if unfit:
        more = f" and {len(unfit) - _SHOWN} more" if len(unfit) > _SHOWN else ""
        found = "; ".join(f"{name} {one}" for name, one, _ in unfit[:_SHOWN]) + more
        raise _refused(run, found, "; ".join(f"{name} {other}" for name, _, other in unfit[:_SHOWN]) + more)
    return Copies(weights=weights, layers=chosen, new=tuple(new))


def _place_of_layers(stored: Mapping[str, StoredWeight], wanted: set[str]) -> str:
    """What stands before "layers." in the names of the target's language model: where most of what is wanted is."""
    counts: dict[str, int] = {}
    for name in stored:
        if (found := _LAYER.match(name)) is not None:
            counts[found[1]] = counts.get(found[1], 0) + (name[found.end() :] in wanted)
    return max(counts, key=counts.__getitem__, default="")


def _unfit(
    weights: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredWeight]
) -> Iterator[tuple[str, str, str]]:
    """(the target's name, what the target has, what the draft has) of each weight that is not there or does not fit."""
    for own, name in weights.items():
        one = stored.get(name)
        if one is None:
            yield name, "is not in the target's files", f"{list(shapes[own])}"
        elif one.shape != shapes[own]:
            yield name, f"{list(one.shape)}", f"{list(shapes[own])}"
        elif not one.dtype.is_floating_point or one.dtype.itemsize < 2:
            yield name, f"quantised ({one.dtype})", "a floating-point weight of 16 bits or more"


def _refused(run: Run, found: str, expected: str) -> ConfigError:
    return ConfigError(
        "the draft's layers cannot start from the target's",
        where=f"{run.path}: draft.init = {run.file.draft.init!r}",
        found=found,
        expected=expected,
        fix="Remove draft.init, or give the draft the shape of the target's layers.",
    )
