"""Shows the lines of metrics.jsonl as curves in TensorBoard, Weights & Biases, MLflow or Trackio, through accelerate.

Each tracker has a thread that follows the file. Training never waits for it. If a tracker raises, this is reported
once, and the tracker is switched off. `trackers.json` records which lines each tracker has received. So a resumed run
continues its curve, no line is sent twice, and a tracker that is added later receives all lines. Knows lines; does not
know what they mean, or the training loop.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from attrs import asdict, define, field

from deepspec_core.config.schema import TENSORBOARD
from deepspec_core.errors import ConfigError
from deepspec_core.training.metrics_lines import Following, Line

log = logging.getLogger("deepspec")

STATE: Final = "trackers.json"
# How long the end of training waits for trackers, whose libraries may take long to start. Who is asked to stop has less
# time: launchers kill what has not ended a minute after SIGTERM.
SECONDS_TO_FINISH: Final = 60.0
SECONDS_TO_STOP: Final = 15.0
# Sections of the run file that trackers receive. Other sections name files and servers, which stay private.
_TOLD: Final = ("target", "draft", "loss", "train")
_TITLES: Final = {TENSORBOARD: "TensorBoard", "wandb": "Weights & Biases", "mlflow": "MLflow", "trackio": "Trackio"}
_PACKAGES: Final = {TENSORBOARD: "'deepspec-core[tensorboard]'"}


def installed(name: str) -> bool:
    """Whether the package of a tracker can be imported. It is not imported."""
    return importlib.util.find_spec(name) is not None


def require_trackers(asked: Sequence[str] | None, *, where: str) -> None:
    """Raise ConfigError if a tracker is asked for that is not installed. Says so where TensorBoard alone is missing."""
    for name in asked or ():
        if not installed(name):
            raise ConfigError(
                f"{_TITLES[name]} is in train.trackers but is not installed",
                where=f"{where}: train.trackers",
                found=name,
                fix=f"Install it: pip install {_PACKAGES.get(name, name)}. Or remove it from the list.",
            )
    if asked is None and not installed(TENSORBOARD):
        log.info(
            "TensorBoard is not installed, so curves are not shown in it. To install it: pip install %s",
            _PACKAGES[TENSORBOARD],
        )


def chosen_trackers(asked: Sequence[str] | None) -> list[str]:
    """The trackers of a run: those asked for; if nothing is said, TensorBoard where it is installed."""
    if asked is None:
        return [TENSORBOARD] if installed(TENSORBOARD) else []
    return list(dict.fromkeys(asked))


def tracked_name(name: str) -> str:
    """A figure's name in trackers. MLflow takes no `@`, and TensorBoard groups names by what stands before a slash."""
    return name.replace("@", "/")


@define
class _Told:
    """The lines a tracker received: all before step `step`, and `lines` lines of it. `names`: the last one's figures.

    run_id: Its name for this run.
    """

    step: int = 0
    lines: int = 0
    names: list[str] = field(factory=list)
    run_id: str = ""

    def new(self, place: tuple[int, int], line: Line) -> Line:
        """The figures of a line that were not sent yet. An evaluation may have added figures to the last line sent."""
        if place < (self.step, self.lines):
            return {}
        known = self.names if place == (self.step, self.lines) else ()
        return {name: value for name, value in line.items() if name != "step" and name not in known}


class Trackers:
    """`with Trackers(names, metrics=..., config=..., project=...) as trackers`, then `trackers.wake()` after each line.

    metrics: metrics.jsonl. Beside it lie `trackers.json` and the folder `tensorboard`.
    config: The run's config.toml.
    """

    def __init__(self, names: Sequence[str], *, metrics: Path, config: Path, project: str) -> None:
        self._tellers = [_Teller(name, metrics, config, project) for name in names]

    def __enter__(self) -> Trackers:
        return self

    def wake(self) -> None:
        """There is a new line. Returns at once.

        The first call starts the threads: by then loader workers are forked, and hold no lock of an import.
        """
        for teller in self._tellers:
            teller.wake()

    def summary(self) -> dict[str, dict[str, Any]]:
        """For each tracker: the last step that it received, and its error if it has failed."""
        return {teller.name: teller.summary() for teller in self._tellers}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = SECONDS_TO_FINISH if error is None else SECONDS_TO_STOP
        until = time.monotonic() + seconds
        for teller in self._tellers:
            teller.end(complete=error is None)
        for teller in self._tellers:
            teller.join(until, seconds)


class _Teller:
    """One tracker and its thread."""

    def __init__(self, name: str, metrics: Path, config: Path, project: str) -> None:
        self.name, self._metrics, self._config, self._project = name, metrics, config, project
        self._following = Following(metrics)
        self._thread: threading.Thread | None = None
        self._ready, self._over = threading.Event(), threading.Event()
        self._complete = False
        self._told = _Told()
        self._error: str | None = None

    def wake(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"tracker {self.name}", daemon=True)
            self._thread.start()
        self._ready.set()

    def end(self, *, complete: bool) -> None:
        """Announce that no further line comes. `complete`: Training has written its last line."""
        self._complete = complete
        self._over.set()
        self._ready.set()

    def join(self, until: float, seconds: float) -> None:
        if self._thread is None:
            return
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._error = f"it did not end within {seconds:.0f} seconds"
            log.warning("%s: %s; it received the lines %s", _TITLES[self.name], self._error, self._up_to())

    def summary(self) -> dict[str, Any]:
        return {"told_to_step": self._told.step, **({} if self._error is None else {"error": self._error})}

    def _run(self) -> None:
        try:
            tracker = self._start(_read(self._metrics.parent / STATE).get(self.name, _Told()))
            over, last = False, (0, 0)
            while not over:
                self._ready.wait()
                self._ready.clear()
                over = self._over.is_set()  # asked before the file is read: nothing is written once it is set
                last = self._tell_new(tracker) or last
            # A killed run may have told what its resumption has yet to write again, so only the end shows it.
            if self._complete and last < (self._told.step, self._told.lines):
                self._begin_anew(f"it has step {self._told.step:,}, and {self._metrics} ends at {last[0]:,}")
                tracker.finish()
                self._following = Following(self._metrics)
                tracker = self._start(_Told())
                self._tell_new(tracker)
            tracker.finish()
        except BaseException as error:  # some libraries leave by sys.exit
            self._error = f"{type(error).__name__}: {error}"[:500]
            log.warning(
                "%s is switched off, and training continues: %s. It received the lines %s",
                _TITLES[self.name], self._error, self._up_to(),
            )  # fmt: skip

    def _up_to(self) -> str:
        return f"of {self._metrics} up to step {self._told.step:,}"

    def _tell_new(self, tracker: Any) -> tuple[int, int] | None:
        """Send the lines that were added to the file. Returns the place of the last line, if any."""
        place = None
        for place, line in self._following.new():
            if new := self._told.new(place, line):
                self._tell(tracker, place, new, [*line])
        return place

    def _begin_anew(self, why: str) -> None:
        log.warning("%s belongs to another run (%s): %s begins a new curve", STATE, why, _TITLES[self.name])

    def _start(self, told: _Told) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self._told = told
        if self.name == TENSORBOARD and told.run_id and not (self._metrics.parent / TENSORBOARD).is_dir():
            self._begin_anew(f"there is no folder {TENSORBOARD} beside it")
            self._told = _Told()
        begun = bool(self._told.run_id)
        if not begun:
            self._told.run_id = os.urandom(4).hex()
        config = tomllib.loads(self._config.read_text(encoding="utf-8"))
        name, folder = config["run"]["name"], self._metrics.parent
        build = LOGGER_TYPE_TO_CLASS[self.name]
        if self.name == TENSORBOARD:
            # Lines that a killed process sent after its last saved state are hidden, because they are sent again.
            purge = {"purge_step": self._told.step + 1 if begun else 0}
            tracker = build(name, folder / TENSORBOARD, **purge)
        elif self.name == "mlflow":
            tracker = build(self._project, run_id=self._told.run_id if begun else None, run_name=name)
        elif self.name == "wandb":
            tracker = build(self._project, name=name, id=self._told.run_id, resume="allow", dir=folder)
        else:
            tracker = build(self._project, name=f"{name}-{self._told.run_id}", resume="allow")
        tracker.start()
        if self.name == "mlflow":
            self._told.run_id = tracker.tracker.info.run_id
        self._keep()
        if not begun and self.name != TENSORBOARD:  # which would show them as a run of its own
            tracker.store_init_configuration(dict(_flat({key: config[key] for key in _TOLD if key in config})))
        return tracker

    def _tell(self, tracker: Any, place: tuple[int, int], new: Line, names: list[str]) -> None:
        values = {tracked_name(name): value for name, value in new.items()}
        self._told.step, self._told.lines, self._told.names = *place, names
        # TensorBoard forgets what it has beyond its state. Of the others a kill may cost a point: it is better missing
        # than there twice.
        if self.name == TENSORBOARD:
            tracker.log(values, step=place[0])
            self._keep()
        else:
            self._keep()
            tracker.log(values, step=place[0])

    def _keep(self) -> None:
        with _STATE_LOCK:
            path = self._metrics.parent / STATE
            states = _read(path) | {self.name: self._told}
            text = json.dumps({name: asdict(state) for name, state in states.items()})
            partial = path.with_name(f".{path.name}.new")
            partial.write_text(f"{text}\n", encoding="utf-8")
            os.replace(partial, path)


_STATE_LOCK: Final = threading.Lock()


def _read(path: Path) -> dict[str, _Told]:
    """The states of all trackers. Empty if the file is damaged or was not written by this module."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {
            name: _Told(
                step=int(state["step"]),
                lines=int(state["lines"]),
                names=[str(one) for one in state["names"]],
                run_id=str(state["run_id"]),
            )
            for name, state in content.items()
            if name in _TITLES
        }
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        log.warning("%s cannot be read (%s): trackers begin a new curve", path, error)
        return {}


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value if isinstance(value, bool | int | float | str) else json.dumps(value)
