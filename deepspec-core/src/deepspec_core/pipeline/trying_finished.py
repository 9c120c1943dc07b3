"""A trial, before a run's first stage, of what its draft must do once it is trained: be recognised, and decode.

Knows the config.json that saving will write, and the draft's proposer. Trains nothing and writes nothing.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

from deepspec_core.checkpoints.draft_window import window_of
from deepspec_core.checkpoints.published import config_text
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.proposer import Proposer
from deepspec_core.errors import DeepSpecError, PluginError
from deepspec_core.estimating.memory import fake_tensors, without_torch_messages
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.trying import reads_numbers
from deepspec_core.plugins.references import blame

log = logging.getLogger("deepspec")


def try_finished(run: Run, draft: DraftModel) -> None:
    """PluginError where the draft's checkpoint would not be recognised as its type's alone, or would not say the window
    that the run asks for, or where the draft has no proposer.

    `draft` is one on fake tensors.
    """
    _try_recognition(run, draft)
    _try_window(run, draft)
    _try_proposer(run, draft)


def _try_recognition(run: Run, draft: DraftModel) -> None:
    kind, registry = run.file.draft.type, run.plugins.registry
    package = registry.provider("draft", kind)
    try:
        config = json.loads(config_text(draft, draft.describe(), run.target.draft_adapter))
    except DeepSpecError:
        raise
    except Exception as error:
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


def _not_recognised(kind: str, package: str, found: str) -> PluginError:
    return PluginError(
        f"draft type {kind!r} would not be recognised in its own checkpoint's config.json",
        where=package,
        found=found,
        expected=f"{kind!r} recognises it, and no other draft type",
        fix="Compare `describe()` with `recognise` of the draft type, or leave the other out (--no-plugin NAME).",
    )


def _try_window(run: Run, draft: DraftModel) -> None:
    """Whether the family hands the run's window on, the draft keeps to it, and config.json says it."""
    asked, registry, adapter = run.file.draft.layer.window, run.plugins.registry, run.target.draft_adapter
    with fake_tensors():
        handed = adapter.attention_projections(adapter.architecture.hidden_size).window
    kept = draft.describe().window
    written = window_of(json.loads(config_text(draft, draft.describe(), adapter)), Path("config.json"))
    family = registry.adapter_for(adapter.architecture.model_type)
    for what, package, found in (
        (f"target family {family.name!r}", registry.provider("target", family.name), handed),
        (f"draft type {run.file.draft.type!r}", registry.provider("draft", run.file.draft.type), kept),
        (f"the config.json of target family {family.name!r}", registry.provider("target", family.name), written),
    ):
        if found != asked:
            raise PluginError(
                f"{what} does not keep to [draft.layer] window",
                where=package,
                found="no window" if found is None else found,
                expected="no window" if asked is None else asked,
                fix="Leave the window out, or use a release that knows it.",
            )


def _try_proposer(run: Run, draft: DraftModel) -> None:
    kind = run.file.draft.type
    try:
        with without_torch_messages(), torch.no_grad():
            made: object = draft.proposer()
    except DeepSpecError:
        raise
    except Exception as error:
        if reads_numbers(error):
            log.info("the draft's proposer was not tried: it reads numbers (%s)", blame(error))
            return
        raise PluginError(
            f"draft type {kind!r} fails to give a proposer",
            where=run.plugins.registry.provider("draft", kind),
            found=blame(error),
        ) from error
    if not isinstance(made, Proposer):
        raise PluginError(
            f"what draft type {kind!r} gives is no proposer",
            where=run.plugins.registry.provider("draft", kind),
            found=type(made).__name__,
            expected="what `proposer()` returns has max_tokens, taps, open_slots, start, propose, accept and free "
            "(contracts.proposer.Proposer)",
        )
