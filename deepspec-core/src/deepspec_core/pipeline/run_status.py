"""The state of a run, from the files in its folder: its stages, its progress, whether it is alive, its latest figures.

It writes nothing and takes no lock, so it cannot disturb a run. Files are not trusted: a damaged one becomes a remark,
and everything else is reported. Knows status.json, the stages' records and the figures of training and evaluation.
Imports nothing heavy.
"""

from __future__ import annotations

import os
import time
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from attrs import asdict, field, frozen

from deepspec_core.config.schema import KNOWN_STAGES
from deepspec_core.errors import DeepSpecError, StageError
from deepspec_core.evaluation.metrics_file import NAME as EVALUATED
from deepspec_core.evaluation.metrics_file import read_metrics
from deepspec_core.json_files import read_object
from deepspec_core.pipeline.fingerprint import read_record
from deepspec_core.pipeline.heartbeat import BEAT_SECONDS, STATUS, VERSION, Process
from deepspec_core.training.metrics_lines import HELD_OUT_LENGTH, METRICS, Line, read_lines

# Some beats may be late on a busy machine, and clocks of machines differ.
SILENT_SECONDS: Final = 12 * BEAT_SECONDS
_TYPES: Final[Mapping[str, type | tuple[type, ...]]] = {
    "state": str,
    "process": dict,
    "workers": int,
    "stages": list,
    "stage": (str, type(None)),
    "began": (int, float),
    "stage_began": (int, float, type(None)),
    "moved": (int, float),
    "beat": (int, float),
    "progress": (dict, type(None)),
    "warnings": dict,
    "error": (str, type(None)),
}
_OF_PROGRESS: Final[Mapping[str, type | tuple[type, ...]]] = {
    "what": str,
    "done": int,
    "total": (int, type(None)),
    "unit": str,
    "rate": (int, float),
    "seconds_left": (int, float, type(None)),
    "figures": dict,
    "done_by_worker": list,
}
_MOMENTS: Final = ("began", "stage_began", "moved", "beat")
# Seconds since 1970. A later value is not a plausible time of a machine's clock.
_LAST_MOMENT: Final = 1e11
_MOST_PROCESSES: Final = 2**31


@frozen(kw_only=True)
class RunStatus:
    """The state of a run.

    state: "running"; "silent", where it gives no sign of life and its process cannot be looked for from here, or is
        there and does not move; "dead", where its process is gone; "finished", "stopped" (it was asked to) or "failed",
        as the last process that worked on it left it; "begun" where no process says anything.
    said: The state in a sentence.
    stages: Of every stage in order "complete", "running", "interrupted" or "not begun", and its seconds so far.
    progress: What status.json says of the current work; None where no work is shown.
    seconds_without_progress: Since the last unit of work, or the stage's beginning, was seen; None where none runs.
    training: The last line of metrics.jsonl.
    slowest: The rank that takes longest, where there are several workers: {"rank", "seconds", "fastest_seconds"} in
        training, {"rank", "done", "most_done"} elsewhere.
    evaluation: The newest accepted lengths: of the finished evaluation by "task" and "temperature", and of held-out
        prompts at a "step" of training.
    warnings: The newest ones, {"time", "text"}, of `warnings_count`.
    remarks: What could not be read.
    """

    name: str
    folder: Path
    state: str
    said: str
    stages: dict[str, tuple[str, float]]
    stage: str | None = None
    progress: dict[str, Any] | None = None
    seconds_without_progress: float | None = None
    seconds_left: float | None = None
    training: Line | None = None
    slowest: dict[str, float] | None = None
    evaluation: list[dict[str, Any]] = field(factory=list)
    warnings: list[dict[str, Any]] = field(factory=list)
    warnings_count: int = 0
    remarks: list[str] = field(factory=list)

    def as_json(self) -> dict[str, Any]:
        """The same in JSON types."""
        stages = {name: {"state": state, "seconds": seconds} for name, (state, seconds) in self.stages.items()}
        return {**asdict(self), "folder": str(self.folder), "stages": stages}


def status_of(folder: Path) -> RunStatus:
    """How the run of a folder stands. Raises StageError if the folder holds no run."""
    now, remarks = time.time(), list[str]()
    written = _read_status(folder, remarks)
    planned, name = _planned(folder, remarks)
    if written is None and not planned:
        raise StageError(
            "There is no run in this folder",
            where=folder,
            expected=f"a run's folder, with config.toml and {STATUS}, or its run file",
        )
    state, said = _life(written, now)
    at = written["stage"] if written is not None and state in ("running", "silent", "dead") else None
    alive = at if state in ("running", "silent") else None
    stages = {one: _stage(folder, one, alive, written, now, remarks) for one in planned or written["stages"]}  # type: ignore[index]
    if written is None and stages and all(one == "complete" for one, _ in stages.values()):
        state, said = "finished", "finished"
    progress = written["progress"] if written is not None and alive is not None else None
    lines, unreadable = read_lines(folder / "train" / METRICS)
    if unreadable:
        remarks.append(f"{unreadable} lines of train/{METRICS} cannot be read")
    training = lines[-1] if lines else None
    warnings = written["warnings"] if written is not None else {}
    return RunStatus(
        name=name or folder.resolve().name,
        folder=folder,
        state=state,
        said=said,
        stages=stages,
        stage=at,
        progress=progress,
        seconds_without_progress=max(0.0, now - written["moved"]) if written and alive is not None else None,
        seconds_left=_number(progress, "seconds_left"),
        training=training,
        slowest=_slowest(progress, training if alive == "train" else None),
        evaluation=_evaluation(folder, lines, remarks),
        warnings=warnings.get("newest", []),
        warnings_count=warnings.get("count", 0),
        remarks=remarks,
    )


def _read_status(folder: Path, remarks: list[str]) -> dict[str, Any] | None:
    try:
        written = read_object(folder / STATUS, kind=StageError)
    except FileNotFoundError:
        return None
    except DeepSpecError as error:
        remarks.append(f"{STATUS} cannot be read: {error.found}")
        return None
    if written.get("version") != VERSION:
        remarks.append(f"{STATUS} is of version {written.get('version')!r}, and this deepspec-core knows {VERSION}")
        return None
    wrong = _mistyped(written, _TYPES) or _unsound(written)
    if not wrong and written["progress"] is not None:
        wrong = _mistyped(written["progress"], _OF_PROGRESS) or _unsound_progress(written["progress"])
    if wrong:
        remarks.append(f"{STATUS} cannot be used: {', '.join(wrong)}")
        return None
    return written


def _mistyped(values: Mapping[str, Any], types: Mapping[str, type | tuple[type, ...]]) -> list[str]:
    return [name for name, kinds in types.items() if not isinstance(values.get(name), kinds)]


def _unsound(written: Mapping[str, Any]) -> list[str]:
    pid, count = written["process"].get("pid"), written["warnings"].get("count")
    newest = written["warnings"].get("newest")
    sound = {
        "stages": all(isinstance(one, str) for one in written["stages"]),
        **{name: written[name] is None or _is_moment(written[name]) for name in _MOMENTS},
        "process.pid": type(pid) is int and 0 < pid < _MOST_PROCESSES,
        "warnings.count": type(count) is int and _is_shown(count),
        "warnings.newest": isinstance(newest, list) and all(_is_warning(one) for one in newest),
    }
    return [name for name, is_sound in sound.items() if not is_sound]


def _unsound_progress(work: Mapping[str, Any]) -> list[str]:
    numbers = {name: work[name] for name in ("done", "total", "rate", "seconds_left")}
    wrong = [name for name, value in numbers.items() if value is not None and not _is_shown(value)]
    if not all(isinstance(one, str) or _is_shown(one) for one in work["figures"].values()):
        wrong.append("figures")
    return wrong if all(_is_shown(one) for one in work["done_by_worker"]) else [*wrong, "done_by_worker"]


def _is_warning(one: Any) -> bool:
    return isinstance(one, dict) and isinstance(one.get("text"), str) and _is_moment(one.get("time"))


def _is_moment(value: Any) -> bool:
    return _is_shown(value) and 0 <= value < _LAST_MOMENT


def _is_shown(value: Any) -> bool:
    # A whole number of any length is JSON; what no float can hold cannot be reckoned with.
    return isinstance(value, int | float) and abs(value) < 1e300


def _planned(folder: Path, remarks: list[str]) -> tuple[list[str], str | None]:
    try:
        run = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))["run"]
        return [one for one in KNOWN_STAGES if one in run["stages"]], str(run["name"])
    except FileNotFoundError:
        return [], None
    except (OSError, ValueError, KeyError, TypeError) as error:
        remarks.append(f"config.toml cannot be read: {error}")
        return [], None


def _life(written: Mapping[str, Any] | None, now: float) -> tuple[str, str]:
    if written is None:
        return "begun", "begun; no process says what it does"
    state, ago = written["state"], max(0.0, now - written["beat"])
    if state != "running":
        asked = ", ".join(written["stages"])
        said = {"finished": f"finished {asked}", "stopped": "stopped as asked; run again to go on"}
        known = {**said, "failed": f"failed: {written['error']}"}
        return (state, f"{known[state]}, {_ago(ago)}") if state in known else ("begun", f"in no known state: {state!r}")
    try:
        process = Process(**written["process"])
    except TypeError:
        process = None
    seen = f"last sign of life {_ago(ago)}"
    if process is not None and process.is_here:
        there = Process.of(process.pid)
        if there is None or there.started != process.started:
            return "dead", f"dead: its process {process.pid} is gone, {seen}; run again to go on"
        if ago > SILENT_SECONDS:
            return "silent", f"silent: its process {process.pid} is there, and is stopped or waits for a disk; {seen}"
        return "running", f"running as process {process.pid}, {seen}"
    where = f"on {process.host}" if process is not None else "on an unknown machine"
    if ago > SILENT_SECONDS:
        return "silent", f"silent: it ran {where}, {seen}; it is dead, unless that machine or its disk is slow"
    return "running", f"running {where}, {seen}"


def _stage(
    folder: Path, name: str, alive: str | None, written: Mapping[str, Any] | None, now: float, remarks: list[str]
) -> tuple[str, float]:
    place = _cache_folder(folder) if name == "cache" else folder / name
    try:
        record = read_record(place)
    except (DeepSpecError, OSError) as error:
        remarks.append(f"{name}: {error}".splitlines()[0])
        record = None
    if name == alive:
        began = written["stage_began"] if written is not None else None
        return "running", 0.0 if began is None else max(0.0, now - began)
    if record is None:
        return "not begun", 0.0
    seconds = record.seconds
    if written is not None and written["stage"] == name and not record.complete and written["stage_began"] is not None:
        seconds = max(seconds, written["beat"] - written["stage_began"])
    return "complete" if record.complete else "interrupted", seconds


def _cache_folder(folder: Path) -> Path:
    """A cache may lie elsewhere; a relative path starts at the run file, which is not known here."""
    own = folder / "cache"
    try:
        given = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8")).get("cache", {}).get("path")
    except (OSError, ValueError, AttributeError):
        return own
    return Path(given) if isinstance(given, str) and os.path.isabs(given) else own


def _slowest(progress: Mapping[str, Any] | None, training: Line | None) -> dict[str, float] | None:
    if training is not None and "slowest_rank" in training:
        return {
            "rank": training["slowest_rank"],
            "seconds": training.get("slowest_rank_seconds", 0.0),
            "fastest_seconds": training.get("fastest_rank_seconds", 0.0),
        }
    done = progress.get("done_by_worker") if progress is not None else None
    if done is None or len(done) < 2:
        return None
    slowest = min(range(len(done)), key=done.__getitem__)
    return {"rank": slowest, "done": done[slowest], "most_done": max(done)}


def _evaluation(folder: Path, lines: list[Line], remarks: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    try:
        for result in read_metrics(folder / EVALUATED)["results"]:
            about = {name: result.get(name) for name in ("task", "temperature", "acceptance_length")}
            if about not in found:
                found.append(about)
    except FileNotFoundError:
        pass
    except DeepSpecError as error:
        remarks.append(f"{EVALUATED}: {error.problem}")
    newest = next((line for line in reversed(lines) if HELD_OUT_LENGTH in line), None)
    if newest is not None:
        found.append({"step": newest["step"], "acceptance_length": newest[HELD_OUT_LENGTH]})
    return found


def _number(values: Mapping[str, Any] | None, name: str) -> float | None:
    value = values.get(name) if values is not None else None
    return float(value) if isinstance(value, int | float) else None


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
