"""The export stage: writes the run's draft for serving engines, one folder for each format.

Knows where a run's exports are, and the facts that a run has about its draft. checkpoints/exports.py writes an export.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from deepspec_core.checkpoints.export_facts import facts_of, settings_of, target_name
from deepspec_core.checkpoints.exports import Format, require_free
from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import build_empty, check_draft, load_draft, stored_dtype
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.export import ExportFacts
from deepspec_core.contracts.target import TargetAdapter
from deepspec_core.digests import digests_of
from deepspec_core.evaluation.metrics_file import NAME as METRICS
from deepspec_core.evaluation.metrics_file import results_of
from deepspec_core.pipeline import contents
from deepspec_core.pipeline.fingerprint import RECORD
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.training import new_draft
from deepspec_core.targets.opening import fingerprint


def run_stage(run: Run) -> dict[str, Any]:
    """Write every format anew, each from a draft of its own.

    Raises ExportError if an engine cannot serve the draft, or a plugin wrote nothing.
    """
    folder = run.folder / "draft"
    adapter = draft_adapter(folder, registry=run.plugins.registry)
    digest = fingerprint(folder)
    run.reads.content(contents.OWN_DRAFT, digest)
    results, summary = _results(run, digest), {}

    def load() -> tuple[DraftModel, ExportFacts]:
        """Anew for each format, so that no exporter sees what another one changed."""
        draft = load_draft(folder, registry=run.plugins.registry, adapter=adapter)
        return draft, _facts(run, draft, adapter, dtype=stored_dtype(folder), results=deepcopy(results))

    check_servable(run, facts_of_finished(run))
    for name in run.file.export.to:
        out = _folder_of(run, name)
        if out.is_dir() and not out.is_symlink():
            shutil.rmtree(out)
        summary[name] = _format(run, name).write(*load(), out)
    return {"folder": str(run.stage_folder("export")), "bytes": summary}


def check_servable(run: Run, facts: ExportFacts) -> None:
    """Raise ExportError if one of the run's formats cannot hold such a draft, or its place is taken by something else.

    Folders that the stage has written before are not in the way. Raises PluginError if a plugin does not work.
    """
    ours = (run.stage_folder("export") / RECORD).is_file()
    for name in run.file.export.to:
        out = _folder_of(run, name)
        if out.is_symlink() or not out.is_dir() or not ours:
            require_free(out, fix="Move it away, or choose another run.output.")
        _format(run, name).check(facts, where=f"{run.path}: export.to")


def facts_before(run: Run, draft: DraftModel) -> ExportFacts:
    """What is known before training. `draft` is one on fake tensors."""
    return _facts(run, draft, run.target.draft_adapter)


def untrained_draft(run: Run, check: Callable[[ExportFacts], None]) -> tuple[DraftModel, ExportFacts]:
    """The draft that the run would begin to train, with the target's embedding and head, and its facts.

    `check` is asked before the target is loaded. A reduced vocabulary has the first tokens, because nothing is counted.
    """
    with torch.device("meta"):
        check(_facts(run, new_draft(run), run.target.draft_adapter, untrained=True))
    draft = new_draft(run).to(torch.float32)
    draft.adopt(run.target.model.embedding_weight(), run.target.model.head_weight())
    if wanted := draft.describe().target_weights:
        draft.adopt_weights(run.target.extra_weights(wanted))
    dtype = str(run.target.dtype).removeprefix("torch.")
    return draft.to("cpu").eval(), _facts(run, draft, run.target.draft_adapter, dtype=dtype, untrained=True)


def facts_of_finished(run: Run) -> ExportFacts:
    """What the run's finished draft says of itself. Raises CheckpointError if there is none."""
    folder, registry = run.folder / "draft", run.plugins.registry
    adapter = draft_adapter(folder, registry=registry)
    check_draft(folder, registry=registry, adapter=adapter)
    return _facts(run, build_empty(folder, registry=registry, adapter=adapter), adapter, dtype=stored_dtype(folder))


def _facts(run: Run, draft: DraftModel, adapter: TargetAdapter, **known: Any) -> ExportFacts:
    target = target_name(run.file.target.model, base=run.base)
    return facts_of(
        draft,
        adapter,
        target=target,
        settings=settings_of(run.file),
        tokenizer=lambda: run.target.tokenizer.tokenizer,
        **known,
    )


def _results(run: Run, digest: str) -> list[dict[str, Any]]:
    """The run's evaluation of this draft; none if the run evaluates nothing, or another draft."""
    if not run.has("evaluate"):
        return []
    path = run.folder / METRICS
    run.reads.content(contents.EVALUATION, digests_of([path])[0])
    return results_of(path, digest)


def _folder_of(run: Run, name: str) -> Path:
    return run.stage_folder("export") / name


def _format(run: Run, name: str) -> Format:
    return Format.of(name, run.file.draft.type, run.plugins.registry)
