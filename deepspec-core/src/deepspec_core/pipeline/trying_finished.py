"""Tries, before a run's first stage, what the finished draft must do: its checkpoint is recognised, and it decodes.

Knows the config.json that saving will write, and the draft's proposer. Trains nothing and writes nothing.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from deepspec_core.checkpoints.draft_window import window_of
from deepspec_core.checkpoints.options_back import lost_option
from deepspec_core.checkpoints.published import config_text
from deepspec_core.contracts.draft import DraftDescription, DraftModel
from deepspec_core.contracts.proposer import Proposer
from deepspec_core.errors import DeepSpecError, PluginError
from deepspec_core.estimating.memory import fake_tensors, without_torch_messages
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.trying import reads_numbers
from deepspec_core.plugins.references import FAILURES, blame, resolve

log = logging.getLogger("deepspec")

# Of the tree that is asked for to see whether there is one.
_NODES = 8


def try_finished(run: Run, draft: DraftModel, description: DraftDescription) -> None:
    """Raise PluginError if the draft's checkpoint would not be recognised as its type's alone, or not opened as what
    was trained, or would not say the window that the run asks for, or where the draft has no proposer.

    `draft` is one on fake tensors.
    """
    config = _try_recognition(run, draft, description)
    _try_opening(run, draft, description, config)
    _try_window(run, description, config)
    _try_proposer(run, draft)


def _try_recognition(run: Run, draft: DraftModel, description: DraftDescription) -> dict[str, Any]:
    """The config.json that saving will write."""
    kind, registry = run.file.draft.type, run.plugins.registry
    package = registry.provider("draft", kind)
    try:
        config = json.loads(config_text(draft, description, run.target.draft_adapter))
    except DeepSpecError:
        raise
    except FAILURES as error:
        raise PluginError(
            f"the config.json of draft type {kind!r} cannot be written", where=package, found=blame(error)
        ) from error
    try:
        found = registry.recognise(config).name
    except PluginError as error:
        problem = f"{error.problem} ({error.found})" if error.found else error.problem
        raise _not_recognised(kind, package, problem) from error
    if found != kind:
        raise _not_recognised(kind, package, f"draft type {found!r} of {registry.provider('draft', found)} does")
    return cast(dict[str, Any], config)


def _try_opening(run: Run, draft: DraftModel, description: DraftDescription, config: dict[str, Any]) -> None:
    """Read the options back, build the draft that config.json describes, and compare its weights' names and shapes."""
    kind, registry = run.file.draft.type, run.plugins.registry
    package = registry.provider("draft", kind)
    try:
        options, taps = resolve(registry.get("draft", kind).options_of)(config)
        found = None if tuple(taps) == tuple(description.taps) else f"taps {tuple(taps)}"
        found = found or lost_option(run.file.draft.options, options, description.unread_options)
        if found is None:
            with fake_tensors():
                again: DraftModel = registry.load("draft", kind)(options, run.target.draft_adapter, tuple(taps))
            found = _other_weights(draft, again)
    except DeepSpecError as error:
        raise _not_opened(kind, package, f"{error.problem} ({error.found})") from error
    except FAILURES as error:
        raise _not_opened(kind, package, blame(error)) from error
    if found is not None:
        raise _not_opened(kind, package, found)


def _other_weights(draft: DraftModel, again: DraftModel) -> str | None:
    mine, theirs = ({name: list(value.shape) for name, value in one.state_dict().items()} for one in (draft, again))
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            return f"{name} is {theirs.get(name) or 'not there'}, where training has {mine.get(name) or 'none'}"
    return None


def _not_opened(kind: str, package: str, found: str) -> PluginError:
    return PluginError(
        f"the checkpoint of draft type {kind!r} would not open as the draft that was trained",
        where=package,
        found=found,
        expected="the taps, options and weights of the trained draft",
        fix="Compare `describe().config` with `options_of` of the draft type. Options that the finished draft does not "
        "read belong into `describe().unread_options`.",
    )


def _not_recognised(kind: str, package: str, found: str) -> PluginError:
    return PluginError(
        f"draft type {kind!r} would not be recognised by its own checkpoint's config.json",
        where=package,
        found=found,
        expected=f"{kind!r} recognises it, and no other draft type",
        fix="Compare `describe()` with `recognise` of the draft type, or leave the other out (--no-plugin NAME).",
    )


def _try_window(run: Run, description: DraftDescription, config: dict[str, Any]) -> None:
    """Whether the family hands the run's window on, the draft keeps to it, and config.json says it."""
    asked, registry, adapter = run.file.draft.layer.window, run.plugins.registry, run.target.draft_adapter
    with fake_tensors():
        handed = adapter.attention_projections(adapter.architecture.hidden_size).window
    written = window_of(config, Path("config.json"))
    style = run.file.draft.layer.style
    family = registry.get("target", style) if style else registry.adapter_for(adapter.architecture.model_type)
    for what, package, found in (
        (f"target family {family.name!r}", registry.provider("target", family.name), handed),
        (f"draft type {run.file.draft.type!r}", registry.provider("draft", run.file.draft.type), description.window),
        (f"the config.json of target family {family.name!r}", registry.provider("target", family.name), written),
    ):
        if found != asked:
            raise PluginError(
                f"{what} does not use the window of [draft.layer]",
                where=package,
                found="no window" if found is None else found,
                expected="no window" if asked is None else asked,
                fix="Leave the window out, or use a release that knows it.",
            )


def _try_proposer(run: Run, draft: DraftModel) -> None:
    _try_made(run, draft.proposer)
    if run.plugins.registry.get("draft", run.file.draft.type).proposes_trees:
        made = _try_made(run, partial(draft.tree_proposer, _NODES))
        if made is not None and getattr(made, "max_nodes", None) != _NODES:
            raise PluginError(
                f"draft type {run.file.draft.type!r} does not use the size of a tree that it was given",
                where=run.plugins.registry.provider("draft", run.file.draft.type),
                found=f"max_nodes = {getattr(made, 'max_nodes', None)}",
                expected=f"max_nodes = {_NODES}, as `tree_proposer({_NODES})` was asked",
            )


def _try_made(run: Run, make: Callable[[], Proposer]) -> Proposer | None:
    kind = run.file.draft.type
    try:
        with without_torch_messages(), torch.no_grad():
            made: object = make()
    except DeepSpecError:
        raise
    except FAILURES as error:
        if reads_numbers(error):
            log.info(
                "the draft's proposer was not tried before the run, because it reads values of tensors (%s)",
                blame(error),
            )
            return None
        raise PluginError(
            f"draft type {kind!r} fails to give a proposer",
            where=run.plugins.registry.provider("draft", kind),
            found=blame(error),
        ) from error
    if not isinstance(made, Proposer):
        raise PluginError(
            f"draft type {kind!r} does not return a proposer",
            where=run.plugins.registry.provider("draft", kind),
            found=type(made).__name__,
            expected="an object from `proposer()` with max_tokens, taps, open_slots, start, propose, accept and free "
            "(contracts.proposer.Proposer)",
        )
    return made
