"""Checks whether the inputs of a stage's results are still the same: keys of the run file, and other content that it
read.

Knows records and where each content of a run is stored. Does not know what a stage is or does.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from deepspec_core.data.split import RULE
from deepspec_core.digests import digests_of
from deepspec_core.errors import DeepSpecError, StageError
from deepspec_core.evaluation.metrics_file import NAME as METRICS
from deepspec_core.pipeline import contents
from deepspec_core.pipeline.fingerprint import StageRecord, added_since, differences, fingerprint, flatten
from deepspec_core.pipeline.run import Run

# How many characters of a digest messages show.
_DIGITS: Final = 16


def refuse_changes(run: Run, record: StageRecord) -> None:
    """Raise StageError if a key or some content is not what the results were made with."""
    stage, folder = record.stage, run.stage_folder(record.stage)
    back = f"choose another run.output, or discard the results with --force {stage}."
    changes = differences(record.keys, fingerprint(flatten(run.file), record.names_read))
    changes += added_since(run.file, record)
    if changes:
        key, old, new = changes[0]
        others = ", ".join(name for name, _, _ in changes[1:6])
        more = f" (and {len(changes) - 1} more: {others})" if changes[1:] else ""
        raise StageError(
            f"`{key}` changed after the stage `{stage}` had results{more}",
            where=folder,
            found=f"{key} = {new}",
            expected=f"{key} = {old}, with which the results were made",
            fix=f"Set it back, {back}",
        )
    _refuse_others(run, record, record.content, folder, "which the results were made with", back)
    places = {
        contents.REGENERATED: run.data.regenerated,
        contents.OWN_DRAFT: run.folder / "draft",
        contents.EXPORTS: run.folder / "export",
    }
    for name, digest in record.made.items():
        _refuse_others(run, record, {name: digest}, places.get(name) or folder, "as the stage left it", back)


def _refuse_others(
    run: Run, record: StageRecord, digests: Mapping[str, str], where: Path, whose: str, back: str
) -> None:
    for name, old in digests.items():
        new = digest_now(run, name, resuming=not record.complete)
        if new is not None and new != old:
            raise StageError(
                f"{name[0].upper()}{name[1:]} changed after the stage `{record.stage}` had results",
                where=where,
                found=new[:_DIGITS],
                expected=f"{old[:_DIGITS]}, {whose}",
                fix=f"Restore the earlier version, {back}",
            )


def digest_now(run: Run, name: str, *, resuming: bool) -> str | None:
    """The digest that the content of this name has now; None if it is not known.

    Content that is gone does not invalidate results that were made from it. A stage that still needs it will say so.
    The Hub is asked, and the target's dtype compared, only for a stage that is to be resumed: its results would
    otherwise be mixed.
    """
    try:
        return _look_up(run, name, resuming)()
    except (DeepSpecError, OSError):
        return None


def _exports_digest(run: Run) -> str | None:
    """A digest of the names and the content of all files of the run's exports; None where an export's folder is gone.

    OSError where a file cannot be read.
    """
    folders = [run.stage_folder("export") / name for name in run.file.export.to]
    if not all(folder.is_dir() for folder in folders):
        return None
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(run.stage_folder("export")).as_posix() for path in files]
    lines = (f"{digest} {name}\n" for name, digest in zip(names, digests_of(files), strict=True))
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def _look_up(run: Run, name: str, resuming: bool) -> Callable[[], str | None]:
    if name == contents.TARGET:
        return run.target.content_digest
    if name == contents.TEMPLATE:
        return run.target.template_digest
    if name == contents.DTYPE:
        return lambda: str(run.target.dtype).removeprefix("torch.") if resuming else None
    if name == contents.COMPUTED_BY:
        from deepspec_core.pipeline.caching import computed_by

        return lambda: computed_by(run)
    if name == contents.REGENERATED:
        return run.data.regenerated_digest if run.data.regenerated is not None else lambda: None
    if name == contents.SPLIT:
        return lambda: RULE
    if name == contents.CACHE:
        return run.cache.digest
    if name == contents.OWN_DRAFT:
        from deepspec_core.targets.opening import fingerprint as digest_of_weights

        return lambda: digest_of_weights(run.folder / "draft")
    if name == contents.DRAFT:
        from deepspec_core.pipeline.evaluated_draft import draft_digest

        return lambda: draft_digest(run)
    if name == contents.INIT:
        from deepspec_core.pipeline.warm_start import init_digest

        return lambda: init_digest(run, ask_hub=resuming)
    if name == contents.CALIBRATION and run.file.evaluate.calibration is not None:
        from deepspec_core.digests import digest_of

        calibration = run.base / run.file.evaluate.calibration
        return lambda: digest_of(calibration)
    if name == contents.COST_TABLE and run.file.evaluate.scheduler is not None:
        from deepspec_core.digests import digest_of

        cost_table = run.base / run.file.evaluate.scheduler.cost_table
        return lambda: digest_of(cost_table)
    if name == contents.EXPORTS:
        return lambda: _exports_digest(run)
    if name == contents.EVALUATION:
        return lambda: digests_of([run.folder / METRICS])[0]
    if found := re.fullmatch(re.escape(contents.SOURCE).replace(r"\{\}", r"(\d+)"), name):
        return lambda: run.data.source_digest(int(found[1]), ask_hub=resuming)
    prefix, suffix = contents.TASK.split("{}")
    if name.startswith(prefix):
        from deepspec_core.evaluation.tasks import task_digest

        return lambda: task_digest(name.removeprefix(prefix).removesuffix(suffix), base=run.base)
    return lambda: None
