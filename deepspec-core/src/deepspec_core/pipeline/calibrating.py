"""`deepspec calibrate`: temperatures for the confidences of an evaluated draft, fitted on its recorded rounds.

Knows a run's folder and the files that it writes there. The fit is in evaluation/calibration.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from attrs import frozen

from deepspec_core.disk import full_disk_is_an_error
from deepspec_core.evaluation.calibration import Fitted, fitted
from deepspec_core.evaluation.calibration_file import write_calibration
from deepspec_core.locks import lock
from deepspec_core.pipeline.recorded_rounds import recorded_rounds, unchanged_draft

LOCK: Final = ".calibrate.lock"


@frozen(kw_only=True)
class Calibrated:
    """What was fitted, on what, and where it lies. `unseen` has the positions, from 1, that no round proposed."""

    fitted: Fitted
    fitted_on: Mapping[str, Any]
    unseen: tuple[int, ...]
    written: tuple[Path, Path]


def calibrate(
    folder: Path, *, tasks: Sequence[str], temperature: float | None, versions: Mapping[str, str]
) -> Calibrated:
    """Fit on the rounds of a run's folder and write both files there. recorded_rounds.py lists the errors."""
    rounds = recorded_rounds(folder, tasks=tasks, temperature=temperature)
    own = rounds.judged()
    unchanged_draft(rounds)
    found = fitted(own, rounds.positions)
    draft, target = rounds.report["draft"], rounds.report["target"]
    problem, fix = "Another `deepspec calibrate` is writing here", "Run it again when the other one has finished."
    # Both files are of one fit.
    with full_disk_is_an_error(folder), lock(folder, name=LOCK, problem=problem, fix=fix):
        written = write_calibration(
            folder,
            found,
            draft={name: draft.get(name) for name in ("revision", "algorithm", "checkpoint", "max_tokens")},
            target={name: target.get(name) for name in ("model", "revision", "dtype")},
            fitted_on=rounds.provenance(),
            versions=versions,
        )
    return Calibrated(
        fitted=found,
        fitted_on=rounds.provenance(),
        unseen=tuple(range(len(found.before.positions) + 1, rounds.positions + 1)),
        written=written,
    )
