"""Every hook that a plugin may implement. Each docstring states the contract.

A plugin is a module (entry-point group `deepspec`). Its functions are named like hooks and marked with `@hookimpl`. It
imports only attrs and deepspec_core; its specs refer to heavy code by text (specs.py). Hooks that offer components
return iterables of specs. Core calls them once, when plugins are loaded. Hooks that are notices are called at certain
points of a run, never in every step. If a notice raises, core reports it with the plugin's name, and the run continues.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pluggy

from deepspec_core.plugins.specs import (
    BuiltinSpec,
    ComponentSpec,
    DraftModelSpec,
    ExportSpec,
    TargetAdapterSpec,
    TaskSpec,
)

PROJECT = "deepspec"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of plugin.py as the plugin's implementation of the hook of that name."""


@hookspec
def deepspec_draft_models() -> Iterable[DraftModelSpec]:  # type: ignore[empty-body]
    """Offer algorithms: `[draft] type = NAME`."""


@hookspec
def deepspec_losses() -> Iterable[ComponentSpec]:  # type: ignore[empty-body]
    """Offer row-wise loss terms: `[loss] terms = {NAME = coefficient}`. `build()` returns a contracts.loss.LossTerm.

    With `options`, run files write `[loss] terms = {NAME = {coefficient = C, ...}}`, and core calls `build(options)`.
    """


@hookspec
def deepspec_weightings() -> Iterable[ComponentSpec]:  # type: ignore[empty-body]
    """Offer weightings of the rows of a block: `[loss] weighting = {type = NAME, ...}`.

    `build(options)` returns a contracts.loss.Weighting.
    """


@hookspec
def deepspec_target_adapters() -> Iterable[TargetAdapterSpec]:  # type: ignore[empty-body]
    """Offer target families. Core chooses one by the target's config.model_type."""


@hookspec
def deepspec_cache_formats() -> Iterable[ComponentSpec]:  # type: ignore[empty-body]
    """Offer feature cache formats: `[cache] format = NAME`. `build()` returns a contracts.cache.CacheFormat."""


@hookspec
def deepspec_feature_sources() -> Iterable[ComponentSpec]:  # type: ignore[empty-body]
    """Offer ways to get target features: `[features] mode = NAME`.

    `build(run)` returns a contracts.features.FeatureSource. It may use `run.file` (the run file with its defaults and
    overrides), `run.data.training_samples()`, `run.target.model` and `run.cache.open()`.
    """


@hookspec
def deepspec_tasks() -> Iterable[TaskSpec]:  # type: ignore[empty-body]
    """Offer evaluation tasks: `[evaluate] tasks = [NAME]`."""


@hookspec
def deepspec_builtins() -> Iterable[BuiltinSpec]:  # type: ignore[empty-body]
    """Offer models or prompts that ship inside the package, as `builtin:NAME`."""


@hookspec
def deepspec_exporters() -> Iterable[ExportSpec]:  # type: ignore[empty-body]
    """Offer export formats: `[export] to = [NAME]`. Each pair of format and algorithm has its own spec."""


@hookspec
def deepspec_commands(cli: Any) -> None:
    """Add commands to the `deepspec` command line. `cli` is a click.Group; import heavy code inside the commands."""


@hookspec(historic=True)
def deepspec_addhooks(manager: Any) -> None:
    """Add the plugin's own hooks, by calling `manager.add_hookspecs(module)`."""


@hookspec
def deepspec_checkpoint_saved(run: Any, checkpoint: Any) -> None:
    """Notice: a checkpoint directory (pathlib.Path) of the run (pipeline.run.Run) is complete on disk."""


@hookspec
def deepspec_evaluation_finished(run: Any, report: Any) -> None:
    """Notice: an evaluation is finished; `report` is the mapping that was written to metrics.json."""
