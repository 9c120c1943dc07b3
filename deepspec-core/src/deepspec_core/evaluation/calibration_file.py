"""calibration.json: temperatures of a draft's confidences, with the draft and the rounds that they were fitted on.

This file knows the format of calibration.json, and the form in which a serving engine reads the same temperatures. It
does not fit anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from attrs import frozen

from deepspec_core.digests import digest_of
from deepspec_core.errors import CheckpointError
from deepspec_core.evaluation.calibration import Fitted
from deepspec_core.evaluation.sealed_json import read_sealed, write_json, write_sealed

NAME: Final = "calibration.json"
SERVED: Final = "calibration.sglang.json"
FORM: Final = "deepspec-calibration"
VERSION: Final = 1
_FIX: Final = "Fit it again with `deepspec calibrate RUN`."


@frozen(kw_only=True)
class Calibration:
    """One temperature for each position of the draft's longest proposal, and the digests of the draft and the file.

    `prompts` has the digest of the prompts of each task that it was fitted on, in the form that metrics.json uses.
    """

    temperatures: tuple[float, ...]
    draft_revision: str
    digest: str
    prompts: frozenset[str]


def write_calibration(
    folder: Path,
    fitted: Fitted,
    *,
    draft: Mapping[str, Any],
    target: Mapping[str, Any],
    fitted_on: Mapping[str, Any],
    versions: Mapping[str, str],
) -> tuple[Path, Path]:
    """Write both files into `folder` and return their paths. `fitted_on` has the tasks and the counts of rounds."""
    own, served = folder / NAME, folder / SERVED
    left_out = fitted.after_left_out
    write_sealed(
        own,
        {
            "temperatures": list(fitted.temperatures),
            "draft": dict(draft),
            "target": dict(target),
            "fitted_on": dict(fitted_on),
            "before": fitted.before.as_json(),
            "after": fitted.after.as_json(),
            "after_left_out": None if left_out is None else left_out.as_json(),
            "versions": dict(versions),
        },
        form=FORM,
        version=VERSION,
    )
    write_json(
        served,
        {
            "temperatures": list(fitted.temperatures),
            "dataset": ", ".join(str(task["task"]) for task in fitted_on["tasks"]),
            "num_samples": fitted_on["rounds"],
            "ece_before": [position.ece for position in fitted.before.positions],
            "ece_after": [position.ece for position in fitted.after.positions],
            # SGLang's reader ignores keys that it does not know.
            "draft": draft.get("revision"),
        },
    )
    return own, served


def read_calibration(path: Path, *, draft_revision: str, positions: int) -> Calibration:
    """Read the calibration of the draft that has this digest and proposes this many tokens.

    Raises CheckpointError if the file is missing, damaged or edited, or if it belongs to another draft.
    """
    found = read_sealed(path, form=FORM, version=VERSION, what="the calibration", kind=CheckpointError, fix=_FIX)
    draft, temperatures = found.get("draft"), found.get("temperatures")
    revision = draft.get("revision") if isinstance(draft, dict) else None
    if revision != draft_revision:
        raise CheckpointError(
            "the calibration is of another draft, or the draft changed since",
            where=path,
            found=str(revision)[:16],
            expected=f"{draft_revision[:16]}, the digest of this draft",
            fix=_FIX,
        )
    whole = isinstance(temperatures, list) and all(type(one) is float and one > 0 for one in temperatures)
    if not whole or len(temperatures or ()) != positions:
        raise CheckpointError(
            "the calibration does not fit the draft",
            where=f"{path}: temperatures",
            found=repr(temperatures)[:80],
            expected=f"{positions} numbers above 0",
            fix=_FIX,
        )
    try:
        prompts = frozenset(str(task["prompts_digest"]) for task in found["fitted_on"]["tasks"])
    except (KeyError, TypeError) as error:
        where = f"{path}: fitted_on"
        raise CheckpointError("the calibration does not say its prompts", where=where, fix=_FIX) from error
    return Calibration(
        temperatures=tuple(temperatures or ()), draft_revision=draft_revision, digest=digest_of(path), prompts=prompts
    )
