"""A draft whose layers start as copies of the target's own: [draft] init = "target:last" or "target:taps".

A weight of a draft's layer is published under the name that the target's family has for it, so the names say which
weight of the target it starts from. The final norm starts from the target's too. Shapes do not say into how many heads
a matrix is cut, so the heads are compared as well. Knows runs, the names and shapes in the target's files, and the
layers that core builds drafts of. Does not know any algorithm or family.
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
from deepspec_core.contracts.target import AttentionProjections, TargetAdapter
from deepspec_core.diagnosis.draft_files import config_differences, expected_config
from deepspec_core.errors import ConfigError
from deepspec_core.layers.attention import DraftAttention
from deepspec_core.layers.decoder_layer import DraftLayer
from deepspec_core.layers.options import LayerOptions
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
_HEADS: Final = ("num_heads", "num_kv_heads", "head_dim")
_SHOWN: Final = 4
_FIX: Final = "Remove draft.init, or give the draft's layers the shape that the target's have."


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
    """Raise ConfigError if the draft's layers are not the target's in heads, names or shapes. `draft` may be on fake
    tensors.

    A warning where only numbers of the family differ, such as the rotary base: the weights fit, and training adapts
    them. Of a target on the Hub that is not here yet, names and shapes are known when training begins.
    """
    from deepspec_core.targets.opening import extra_weights_before

    target = _target_itself(run)
    _check_layers(run, draft, target)
    stored = extra_weights_before(run.target.where, ("",), revision=run.file.target.revision)
    if stored is None:
        log.info("whether the draft's layers can start from the target's is checked after the target's download")
    else:
        copies_of(run, draft, stored)
    differing = config_differences(expected_config(draft, target), expected_config(draft, run.target.draft_adapter))
    if differing:
        log.warning(
            "draft.init: the target's layers have %s; the draft's have %s. The target's weights "
            "are copied all the same",
            *(", ".join(f"{key} = {pair[side]}" for key, pair in differing.items()) for side in (0, 1)),
        )


def take_target_layers(run: Run, draft: DraftModel) -> None:
    """Copy the weights, and say which. ConfigError as in `check_target_start`."""
    from deepspec_core.targets.opening import fetched

    _check_layers(run, draft, _target_itself(run))
    copies = copies_of(run, draft, find_weights(fetched(run.target.where, run.file.target.revision), ("",)))
    weights = run.target.extra_weights(sorted(set(copies.weights.values())))
    own = draft.state_dict()
    with torch.no_grad():
        for name, of_target in copies.weights.items():
            own[name].copy_(weights[of_target])
    log.info(
        "draft.init: %d weights (%s parameters) were copied from the target's layers %s%s",
        len(copies.weights),
        f"{sum(own[name].numel() for name in copies.weights):,}",
        ", ".join(map(str, copies.layers)),
        f"; new in these layers: {', '.join(copies.new)}" if copies.new else "",
    )


def _target_itself(run: Run) -> TargetAdapter:
    """The target's adapter with layers of the target's own heads and rotary embedding."""
    from deepspec_core.targets.opening import open_adapter

    own = run.file.draft.layer
    return open_adapter(
        run.target.where,
        registry=run.plugins.registry,
        # Targets without dense layers have no width of their own, and a window is the draft's own choice.
        draft_layer=LayerOptions(intermediate_size=own.intermediate_size, window=own.window),
        trust_remote_code=run.file.target.trust_remote_code,
        revision=run.file.target.revision,
    )


def _check_layers(run: Run, draft: DraftModel, target: TargetAdapter) -> None:
    """Raise ConfigError for mistakes in the draft's layers that are known without the target's files."""
    layers = _layers(draft)
    if not layers:
        raise _refused(
            run,
            f"a draft of type {run.file.draft.type!r}",
            "a draft type with layers of the target's family",
            fix="Remove draft.init, or choose another draft.type.",
        )
    style, architecture = run.file.draft.layer.style, run.target.architecture
    family = run.plugins.registry.adapter_for(architecture.model_type).name
    if style not in (None, family):
        raise _refused(
            run,
            f"draft.layer.style = {style!r}",
            f"layers of the target's own family, {family!r}",
            fix="Remove draft.init, or remove draft.layer.style.",
        )
    if len(layers) > architecture.num_layers:
        raise _refused(run, f"{len(layers)} layers of the draft", f"at most the target's {architecture.num_layers}")
    if run.file.draft.init != LAST and not any(tap >= 0 for tap in run.file.target.layers):
        raise _refused(
            run,
            f"target.layers = {list(run.file.target.layers)}",
            "at least one tapped layer",
            fix='Tap a layer, or start from the target\'s last ones: draft.init = "target:last".',
        )
    with torch.device("meta"):
        heads = _heads(target.attention_projections(architecture.hidden_size))
    for place, layer in layers:
        width = getattr(layer.attention.query, "in_features", architecture.hidden_size)
        if width != architecture.hidden_size:
            raise _refused(
                run,
                f"{place}: its attention reads {width} numbers a token",
                f"the {architecture.hidden_size} that the target's attention reads",
                fix=f"Remove draft.init: drafts of type {run.file.draft.type!r} read more than the target's layers do, "
                "whatever their shape.",
            )
        own = _heads(layer.attention)
        differing = [name for name in _HEADS if own[name] != heads[name]]
        if differing:
            found, expected = (
                ", ".join(f"draft.layer.{name} = {sizes[name]}" for name in differing) for sizes in (own, heads)
            )
            raise _refused(run, found, f"{expected}, as the target has")


def _heads(attention: DraftAttention | AttentionProjections) -> dict[str, int]:
    return {name: getattr(attention, name) for name in _HEADS}


def _layers(draft: DraftModel) -> list[tuple[str, DraftLayer]]:
    """The draft's layers with their names, first to last."""
    return [(name, part) for name, part in draft.named_modules() if isinstance(part, DraftLayer)]


def copies_of(run: Run, draft: DraftModel, stored: Mapping[str, StoredWeight]) -> Copies:
    """Which weight of the target each of the draft's starts from. Raises ConfigError if one is not there or does not
    fit.

    The draft is one that `_check_layers` accepts.
    """
    layers, count = _layers(draft), run.target.architecture.num_layers
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
        found, expected = ("; ".join(f"{one[0]} {one[side]}" for one in unfit[:_SHOWN]) + more for side in (1, 2))
        width = run.file.draft.layer.intermediate_size
        if width is not None and any(".mlp." in name for name, _, _ in unfit):
            found = f"draft.layer.intermediate_size = {width}: {found}"
        raise _refused(run, found, expected)
    return Copies(weights=weights, layers=chosen, new=tuple(new))


def _place_of_layers(stored: Mapping[str, StoredWeight], wanted: set[str]) -> str:
    """The prefix before "layers." in the names of the target's weights: the one with most wanted weights."""
    counts: dict[str, int] = {}
    for name in stored:
        if (found := _LAYER.match(name)) is not None:
            counts[found[1]] = counts.get(found[1], 0) + (name[found.end() :] in wanted)
    return max(counts, key=counts.__getitem__, default="")


def _unfit(
    weights: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, StoredWeight]
) -> Iterator[tuple[str, str, str]]:
    """(the target's name, what the draft has, what the target has) of each weight that is not there or does not fit."""
    for own, name in weights.items():
        one, shape = stored.get(name), list(shapes[own])
        if one is None:
            yield name, f"{shape}", "is not in the target's files"
        elif one.shape != shapes[own]:
            yield name, f"{shape}", f"{list(one.shape)}"
        elif not one.dtype.is_floating_point or one.dtype.itemsize < 2:
            yield name, "a floating-point weight of 16 bits or more", f"quantised ({one.dtype})"


def _refused(run: Run, found: str, expected: str, *, fix: str = _FIX) -> ConfigError:
    return ConfigError(
        "the draft's layers cannot start from the target's",
        where=f"{run.path}: draft.init = {run.file.draft.init!r}",
        found=found,
        expected=expected,
        fix=fix,
    )
