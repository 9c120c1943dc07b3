"""The checkpoint from which training starts ([draft] init): finds it, compares it with the run file, copies its
weights.

Knows runs and draft checkpoints. Does not know training, or what a draft type does with its weights. A run that resumes
uses its own checkpoint and does not read the named one again.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Final

import torch
from attrs import frozen
from torch import Tensor

from deepspec_core.checkpoints.opening import check_same_target, draft_adapter, resolve_draft
from deepspec_core.checkpoints.published import (
    CONFIG,
    WEIGHTS,
    build_empty,
    check_draft,
    published_name,
    read_options,
)
from deepspec_core.checkpoints.weight_file import check_finite, read_header, read_tensors
from deepspec_core.config.draft_start import TARGET_STARTS
from deepspec_core.contracts.draft import DraftDescription, DraftModel
from deepspec_core.diagnosis.draft_files import config_differences, expected_config
from deepspec_core.errors import CheckpointError, ConfigError
from deepspec_core.layers.draft_vocabulary import KEY
from deepspec_core.pipeline import contents, workers
from deepspec_core.pipeline.run import Run
from deepspec_core.targets.opening import fingerprint
from deepspec_core.training import checkpoint as checkpoints
from deepspec_core.training.fallback import first_sound

log = logging.getLogger("deepspec")

_SHOWN: Final = 6
# The draft's copies of the target's weights. Whatever a checkpoint has in their place, the run's target decides.
_OF_TARGET: Final = ("embed_tokens.", "lm_head.")
# Rows of the embedding and the head that are compared with the target's.
_ROWS: Final = 1024
_SAME_FACTS: Final = ("taps", "max_tokens", "num_layers", "anchor_predicts", "causal", "window")


@frozen(kw_only=True, eq=False)
class Start:
    """The weights that training begins with, by their published names. `named` is the file's text, or None where the
    run resumes."""

    folder: Path
    named: str | None
    weights: dict[str, Tensor]


def check_init(run: Run, draft: DraftModel, description: DraftDescription) -> None:
    """Raise ConfigError if the checkpoint is another draft than the run file says. `draft` is one on fake tensors.

    Raises CheckpointError if there is none, it is damaged, or it was made for another target. A warning where only
    numbers of its family differ, such as the rotary base: its weights fit, and training adapts them.
    """
    folder, registry = _folder(run), run.plugins.registry
    if folder is None:
        return
    if folder.is_relative_to(run.folder):
        raise _conflict(run, f"{folder}, which this run writes", "a checkpoint outside run.output")
    adapter = draft_adapter(folder, registry=registry)
    algorithm, _, _ = read_options(folder, registry)
    if algorithm != run.file.draft.type:
        raise _conflict(run, f"a draft of type {algorithm!r}", f"{run.file.draft.type!r}, as draft.type says")
    check_same_target(folder, adapter.architecture, run.target.family.architecture)
    theirs = check_draft(folder, registry=registry, adapter=adapter)
    config = {key: value for key, value in description.config.items() if key not in description.training_keys}
    differing = {
        key: (theirs.config.get(key), value) for key, value in config.items() if theirs.config.get(key) != value
    }
    differing |= {key: (value, None) for key, value in theirs.config.items() if key not in description.config}
    if not differing:
        facts = ((name, getattr(theirs, name), getattr(description, name)) for name in _SAME_FACTS)
        differing = {name: (found, asked) for name, found, asked in facts if found != asked}
    if theirs.class_name != description.class_name:
        differing["class"] = (theirs.class_name, description.class_name)
    if differing:
        raise _conflict(run, *_in_words(differing))
    shape = config_differences(
        expected_config(build_empty(folder, registry=registry, adapter=adapter), adapter),
        expected_config(draft, run.target.draft_adapter),
    )
    shape = {key: pair for key, pair in shape.items() if key not in description.training_keys}
    weights = _other_shapes(folder, draft, description)
    if weights:
        raise _conflict(run, *_in_words(shape or weights))
    if shape:
        found, expected = _in_words(shape)
        log.warning(
            "draft.init: the checkpoint was made for a target with %s; this one has %s. Training "
            "starts from its weights all the same",
            found,
            expected,
        )


def start_of(run: Run) -> Start | None:
    """The weights that training begins with, read; None where [draft] init names no checkpoint.

    A run that has a checkpoint goes on with that, whatever became of the one it began with: with the newest sound one,
    which is the one that training resumes from. Raises CheckpointError if all are damaged.
    """
    named = run.file.draft.init
    if named is None:
        return None
    own = _own_checkpoint(run)
    if own is not None:
        draft = own / checkpoints.DRAFT
        return Start(folder=draft, named=None, weights=read_tensors(draft / WEIGHTS))
    folder = _folder(run)
    if folder is None:  # the target's own layers, which are copied once
        return None
    digest = fingerprint(folder)
    run.reads.content(contents.INIT, digest)
    weights = read_tensors(folder / WEIGHTS)
    check_finite(folder / WEIGHTS, weights)
    if fingerprint(folder) != digest:
        raise CheckpointError(
            "The checkpoint of draft.init changed while it was read",
            where=folder,
            fix="Another process is writing the checkpoint: wait until it has finished, and run again.",
        )
    return Start(folder=folder, named=named, weights=weights)


def _own_checkpoint(run: Run) -> Path | None:
    """The run's newest sound checkpoint. The first worker looks, so that not all of them read every file."""
    folder, crew = run.stage_folder("train"), workers.crew()
    found = first_sound(reversed(checkpoints.complete(folder)), checkpoints.verify) if crew.first else None
    step = crew.told_by_first("own checkpoint", None if found is None else checkpoints.step_of(found[0]))
    return None if step is None else checkpoints.of_step(folder, step)


def init_digest(run: Run, *, ask_hub: bool) -> str | None:
    """The digest of the checkpoint that [draft] init names; None if it names none, or a Hub id without `ask_hub`."""
    named = run.file.draft.init
    if named is None or named in TARGET_STARTS or not (ask_hub or (run.base / Path(named).expanduser()).is_dir()):
        return None
    folder = _folder(run)
    return None if folder is None else fingerprint(folder)


def take_vocabulary(draft: DraftModel, start: Start) -> dict[str, Any]:
    """Give a draft with a reduced vocabulary the tokens of the checkpoint. Returns what the stage's summary says."""
    vocabulary = draft.vocabulary
    if vocabulary is None:
        return {}
    vocabulary.choose(start.weights[KEY])
    if (found := vocabulary.problem()) is not None:
        raise CheckpointError(
            "the draft's vocabulary does not fit this target",
            where=start.folder / WEIGHTS,
            found=f"{KEY}: {found}",
            expected=f"token ids from 0 to below {vocabulary.target_size:,} that increase",
        )
    return {"vocabulary": {"tokens": len(vocabulary.ids), "of": "the checkpoint that training began with"}}


def take_weights(draft: DraftModel, start: Start) -> None:
    """Copy the checkpoint's weights into the draft, which has the target's embedding and head.

    Says what was taken, unless the run resumes.
    """
    names = {name: published_name(name, draft.describe().weight_names) for name in draft.state_dict()}
    own = draft.state_dict()
    taken = [name for name in own if not name.startswith(_OF_TARGET)]
    with torch.no_grad():
        for name in taken:
            own[name].copy_(start.weights[names[name]])
    if start.named is None:
        return
    numbers = sum(own[name].numel() for name in taken)
    left = sorted(names[name] for name in own if name.startswith(_OF_TARGET))
    log.info(
        "draft.init: %d weights (%s parameters) were copied from %s; %s are the target's own",
        len(taken),
        f"{numbers:,}",
        start.folder,
        ", ".join(left),
    )
    others = [name for name in left if _differs(start.weights[name], own[_own_name(names, name)])]
    if others:
        log.warning(
            "draft.init: %s of the checkpoint differ from this target's: it was trained for "
            "another target of the same sizes",
            " and ".join(others),
        )


def _own_name(names: dict[str, str], published: str) -> str:
    return next(name for name, other in names.items() if other == published)


def _differs(stored: Tensor, own: Tensor) -> bool:
    """Whether two matrices differ by more than bf16's rounding, in some of their rows."""
    rows = torch.linspace(0, len(own) - 1, min(_ROWS, len(own))).long()
    one, other = stored[rows].float(), own.cpu()[rows].float()
    return not torch.allclose(one, other, rtol=2**-7, atol=1e-6)


def _folder(run: Run) -> Path | None:
    """The directory of the checkpoint, None where none is named.

    Of another run's output, or a checkpoint of its training, the draft in it.
    """
    named = run.file.draft.init
    if named is None or named in TARGET_STARTS:
        return None
    try:
        folder = resolve_draft(named, base=run.base)
    except CheckpointError as error:
        where = f"{run.path}: draft.init"
        raise CheckpointError(
            error.problem, where=where, found=error.found or named, expected=error.expected, fix=error.fix
        ) from error
    inner = folder / checkpoints.DRAFT
    return inner if not (folder / CONFIG).is_file() and (inner / CONFIG).is_file() else folder


def _other_shapes(folder: Path, draft: DraftModel, description: DraftDescription) -> dict[str, tuple[Any, Any]]:
    """By published name, the shapes in the checkpoint and in the run's draft, where they differ."""
    found = read_header(folder / WEIGHTS).shapes
    asked = {
        published_name(name, description.weight_names): tuple(tensor.shape)
        for name, tensor in draft.state_dict().items()
    }
    names = sorted(name for name in found.keys() | asked.keys() if found.get(name) != asked.get(name))
    return {name: (found.get(name), asked.get(name)) for name in names}


def _in_words(differing: dict[str, tuple[Any, Any]]) -> tuple[str, str]:
    """Both sides, with at most so many keys."""
    more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    shown = list(differing.items())[:_SHOWN]
    sides = (", ".join(f"{key} = {_value(pair[side])}" for key, pair in shown) + more for side in (0, 1))
    return next(sides), next(sides)


def _value(value: Any) -> str:
    return "none" if value is None else str(list(value) if isinstance(value, tuple) else value)


def _conflict(run: Run, found: str, expected: str) -> ConfigError:
    return ConfigError(
        "training cannot start from this checkpoint",
        where=f"{run.path}: draft.init = {run.file.draft.init!r}",
        found=found,
        expected=expected,
        fix="Set [draft] and target.layers to those of the checkpoint, name another checkpoint, or remove draft.init.",
    )
