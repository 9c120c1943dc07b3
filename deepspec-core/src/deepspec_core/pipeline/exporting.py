"""The export stage: the run's draft as serving engines load it, one folder a format.

Knows where exports lie and that they appear whole; what a format is, plugins know.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import build_empty, load_draft
from deepspec_core.contracts.draft import DraftDescription
from deepspec_core.contracts.export import Exporter
from deepspec_core.errors import DeepSpecError, ExportError, PluginError
from deepspec_core.pipeline import contents
from deepspec_core.pipeline.run import Run
from deepspec_core.plugins.references import blame
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
        out = run.stage_folder("export") / name
        unfinished = out.with_name(f".{name}.partial")
        for stale in (unfinished, out):
            shutil.rmtree(stale, ignore_errors=True)
        unfinished.mkdir(parents=True)
        try:
            exporter(run, name).write(draft, unfinished)
        except (DeepSpecError, OSError):
            raise
        except Exception as error:
            raise PluginError(f"the export to {name} failed", where=_provider(run, name), found=blame(error)) from error
        summary[name] = _bytes_of(unfinished, name)
        unfinished.rename(out)
    return {"folder": str(run.stage_folder("export")), "bytes": summary}


def check_servable(run: Run, description: DraftDescription) -> None:
    """ExportError where one of the run's formats cannot hold such a draft; PluginError where a plugin does not work."""
    for name in run.file.export.to:
        reason = exporter(run, name).unservable(description)
        if reason is not None:
            raise ExportError(
                f"the draft cannot be exported to {name}",
                where=f"{run.path}: export.to",
                found=reason,
                fix="Change the draft's options, or leave this format out.",
            )


def own_description(run: Run) -> DraftDescription:
    """What the run's finished draft says of itself. CheckpointError where there is none."""
    folder = run.folder / "draft"
    registry = run.plugins.registry
    return build_empty(folder, registry=registry, adapter=draft_adapter(folder, registry=registry)).describe()


def exporter(run: Run, name: str) -> Exporter:
    """The exporter of a format for the run's algorithm."""
    made = run.plugins.registry.load("exporter", name, algorithm=run.file.draft.type)()
    if not isinstance(made, Exporter):
        raise PluginError(
            f"the export format {name} is no exporter",
            where=_provider(run, name),
            found=type(made).__name__,
            expected="what `build()` returns has `unservable` and `write` (contracts.export.Exporter)",
        )
    return made


def _provider(run: Run, name: str) -> str:
    return run.plugins.registry.provider("exporter", name, algorithm=run.file.draft.type)


def _bytes_of(folder: Path, name: str) -> int:
    files = [path for path in folder.rglob("*") if path.is_file()]
    if not files:
        raise ExportError(f"the export to {name} wrote nothing", where=folder, expected="files of a draft")
    return sum(path.stat().st_size for path in files)
