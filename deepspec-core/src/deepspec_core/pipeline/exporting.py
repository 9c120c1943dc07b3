"""The export stage: the run's draft as serving engines load it, one folder a format.

Knows where a run's exports lie; how one is written is known to checkpoints/exports.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from deepspec_core.checkpoints.exports import Format, require_free
from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import check_draft, load_draft
from deepspec_core.contracts.draft import DraftDescription
from deepspec_core.pipeline import contents
from deepspec_core.pipeline.run import Run
from deepspec_core.targets.opening import fingerprint


def run_stage(run: Run) -> dict[str, Any]:
    """Write every format anew. ExportError where an engine cannot serve the draft, or a plugin wrote nothing."""
    folder = run.folder / "draft"
    adapter = draft_adapter(folder, registry=run.plugins.registry)
    run.reads.content(contents.OWN_DRAFT, fingerprint(folder))
    draft = load_draft(folder, registry=run.plugins.registry, adapter=adapter)
    check_servable(run, draft.describe())
    summary = {}
    for name in run.file.export.to:
        out = _folder_of(run, name)
        if out.is_dir() and not out.is_symlink():
            shutil.rmtree(out)
        summary[name] = _format(run, name).write(draft, out)
    return {"folder": str(run.stage_folder("export")), "bytes": summary}


def check_servable(run: Run, description: DraftDescription) -> None:
    """ExportError where one of the run's formats cannot hold such a draft, or its place is taken by something else.

    PluginError where a plugin does not work.
    """
    for name in run.file.export.to:
        out = _folder_of(run, name)
        if out.is_symlink() or not out.is_dir():
            require_free(out, fix="Move it away, or choose another run.output.")
        _format(run, name).check(description, where=f"{run.path}: export.to")


def own_description(run: Run) -> DraftDescription:
    """What the run's finished draft says of itself. CheckpointError where there is none."""
    folder = run.folder / "draft"
    registry = run.plugins.registry
    return check_draft(folder, registry=registry, adapter=draft_adapter(folder, registry=registry))


def _folder_of(run: Run, name: str) -> Path:
    return run.stage_folder("export") / name


def _format(run: Run, name: str) -> Format:
    return Format.of(name, run.file.draft.type, run.plugins.registry)
