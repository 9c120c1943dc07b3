"""The draft that a run evaluates: the run's own checkpoint, a named checkpoint, or a draft that is not trained.

Knows where the checkpoints of a run are, and how both kinds of drafts are loaded. Does not know what an evaluation does
with them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from attrs import frozen

from deepspec_core.checkpoints.inspection import Parameters
from deepspec_core.checkpoints.opening import check_same_target, draft_adapter, resolve_draft
from deepspec_core.checkpoints.published import check_draft, load_draft
from deepspec_core.contracts.draft import DraftDescription
from deepspec_core.contracts.proposer import Proposer
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.contracts.untrained import UntrainedDescription
from deepspec_core.disk import is_folder
from deepspec_core.errors import StageError
from deepspec_core.pipeline import contents
from deepspec_core.pipeline.run import Run
from deepspec_core.targets.opening import fingerprint
from deepspec_core.untrained.making import proposer_of, revision_of


@frozen(kw_only=True, eq=False)
class EvaluatedDraft:
    """A loaded draft. `revision` tells it from every other one; `checkpoint` is its name in reports, if it has one:
    a directory as it is found from the run's folder, or a Hub id.

    `proposer` makes its decoding side, of chains or of the trees that [draft] tree asks for.
    """

    description: DraftDescription | UntrainedDescription
    checkpoint: str | None
    revision: str
    parameters: Parameters
    proposer: Callable[[], Proposer]


def load_evaluated(run: Run) -> EvaluatedDraft:
    """The draft with its weights. Raises DeepSpecError if there is none, or it does not go with the run's target."""
    if not run.trains:
        return _untrained(run)
    folder, adapter, revision = draft_of(run)
    draft = load_draft(
        folder, registry=run.plugins.registry, adapter=adapter, dtype=run.target.dtype, device=run.target.device
    )
    _require_unchanged(fingerprint(folder), revision, folder)
    tree = run.file.draft.tree
    return EvaluatedDraft(
        description=draft.describe(),
        checkpoint=_name(run, folder),
        revision=revision,
        parameters=Parameters.of(draft),
        proposer=draft.proposer if tree is None else partial(draft.tree_proposer, tree.nodes),
    )


def _untrained(run: Run) -> EvaluatedDraft:
    description, revision = describe_evaluated(run)
    proposer = proposer_of(run.file.draft.type, run.untrained, run.plugins.registry)
    _require_unchanged(draft_digest(run), revision, f"draft type {run.file.draft.type!r}")
    return EvaluatedDraft(
        description=description,
        checkpoint=None,
        revision=revision,
        parameters=Parameters(trained=0, frozen=run.untrained.parameters()),
        proposer=lambda: proposer,
    )


def describe_evaluated(run: Run) -> tuple[DraftDescription | UntrainedDescription, str]:
    """What the draft says of itself, and its digest, without reading its weights. The same errors."""
    if run.trains:
        folder, adapter, revision = draft_of(run)
        return check_draft(folder, registry=run.plugins.registry, adapter=adapter), revision
    description, revision = run.untrained.describe(), draft_digest(run)
    run.reads.content(contents.DRAFT, revision)
    return description, revision


def draft_of(run: Run) -> tuple[Path, TargetAdapter, str]:
    """The directory, the adapter and the digest of the checkpoint that is evaluated.

    It is the draft that [evaluate] names, else the run's own. Raises CheckpointError if it does not exist, or was made
    for another target.
    """
    folder = _draft_folder(run)
    adapter = draft_adapter(folder, registry=run.plugins.registry)
    check_same_target(folder, adapter.architecture, run.target.family.architecture)
    digest = fingerprint(folder)
    run.reads.content(contents.DRAFT, digest)
    return folder, adapter, digest


def draft_digest(run: Run) -> str:
    """The digest of the draft that is evaluated."""
    if run.trains:
        return fingerprint(_draft_folder(run))
    return revision_of(run.file.draft.type, run.file.draft.options, run.untrained)


def _draft_folder(run: Run) -> Path:
    named = run.file.evaluate.draft
    return run.folder / "draft" if named is None else resolve_draft(named, base=run.base)


def _name(run: Run, folder: Path) -> str:
    """What finds the checkpoint in this directory again, from the run's folder and wherever a command starts."""
    named = run.file.evaluate.draft
    if named is None:
        return os.path.relpath(folder, run.folder)
    place = Path(named).expanduser()
    if place.is_absolute() or not is_folder(run.base / place):
        return named
    return os.path.relpath(folder, run.folder.resolve())


def _require_unchanged(now: str, then: str, where: Path | str) -> None:
    if now != then:
        raise StageError(
            "The draft changed while it was read",
            where=where,
            fix="Another process is writing the checkpoint: wait until it has finished, and run again.",
        )
