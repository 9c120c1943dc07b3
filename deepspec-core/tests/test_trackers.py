"""Trackers follow metrics.jsonl: names, resumption without doubled steps, and failures that training never sees."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import accelerate.tracking
import pytest

from deepspec_core.errors import ConfigError
from deepspec_core.training import trackers as trackers_module
from deepspec_core.training.trackers import STATE, Trackers, chosen_trackers, require_trackers

CONFIG = """
[run]
name = "tiny"
[data]
sources = [{path = "somebody.jsonl"}]
[train]
lr = 0.5
betas = [0.9, 0.95]
"""


class Recorder:
    """What accelerate's trackers are, as far as they are used: `all` of them, with what each one was told."""

    all: ClassVar[list[Recorder]] = []
    fails_at: ClassVar[int | None] = None
    hangs: ClassVar[threading.Event | None] = None

    def __init__(self, project: str, **options: Any) -> None:
        self.project, self.options, self.finished = project, options, False
        self.config: dict[str, Any] = {}
        self.told: list[tuple[int, dict[str, float]]] = []
        Recorder.all.append(self)

    def start(self) -> None:
        self.thread = threading.current_thread()

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        self.config = dict(values)

    def log(self, values: Mapping[str, float], step: int) -> None:
        assert threading.current_thread() is self.thread, "MLflow's run belongs to a thread"
        if self.hangs is not None:
            self.hangs.wait()
        if step == self.fails_at:
            raise ConnectionError("no network")
        self.told.append((step, dict(values)))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    monkeypatch.setattr(Recorder, "all", [])
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    return Recorder


def follow(folder: Path, steps: list[int], *, names: tuple[str, ...] = ("wandb",)) -> Trackers:
    """As a stage does it: the lines of `steps` are added one by one."""
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(CONFIG)
    metrics = folder / "metrics.jsonl"
    trackers = Trackers(names, metrics=metrics, config=folder / "config.toml", project="drafts")
    with trackers:
        for step in steps:
            with metrics.open("a") as file:
                line = {
                    "step": step,
                    "loss": step / 10,
                    "accuracy@0": 0.5,
                    "slowest_rank": 1,
                    "note": "x",
                    "nan": float("nan"),
                }
                file.write(json.dumps(line) + "\n")
            trackers.wake()
    return trackers


def steps_of(tracker: Recorder) -> list[int]:
    return [step for step, _ in tracker.told]


def test_every_line_is_told_with_documented_names_and_what_names_other_people_is_not(tmp_path: Path) -> None:
    trackers = follow(tmp_path, [2, 4, 6])
    (tracker,) = Recorder.all
    assert tracker.told[1] == (4, {"loss": 0.4, "accuracy/0": 0.5, "slowest_rank": 1})
    assert steps_of(tracker) == [2, 4, 6]
    assert tracker.finished
    assert tracker.config == {"train.lr": 0.5, "train.betas": "[0.9, 0.95]"}
    assert (tracker.project, tracker.options["name"], tracker.options["resume"]) == ("drafts", "tiny", "allow")
    assert trackers.summary() == {"wandb": {"told_to_step": 6}}


def test_a_resumed_run_goes_on_with_its_curve_and_doubles_no_step(tmp_path: Path) -> None:
    follow(tmp_path, [2, 4, 6])
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:1]))  # the checkpoint was of step 3
    follow(tmp_path, [4, 6, 8])
    first, second = Recorder.all
    assert steps_of(first) + steps_of(second) == [2, 4, 6, 8]
    assert first.options["id"] == second.options["id"]
    assert second.config == {}, "it is told once"


def test_a_tracker_that_comes_later_is_told_everything(tmp_path: Path) -> None:
    follow(tmp_path, [2, 4], names=())
    assert not (tmp_path / STATE).exists()
    follow(tmp_path, [6])
    assert steps_of(Recorder.all[0]) == [2, 4, 6]


def test_several_lines_of_one_step_are_all_told_once(tmp_path: Path) -> None:
    follow(tmp_path, [2, 2])
    follow(tmp_path, [2, 4, 4])
    assert [steps_of(tracker) for tracker in Recorder.all] == [[2, 2], [2, 4, 4]]


def test_figures_that_a_line_gets_later_are_told_alone(tmp_path: Path) -> None:
    """An evaluation adds them to the line of its step, after the line was written; perhaps in a later process."""
    follow(tmp_path, [2, 4])
    metrics = tmp_path / "metrics.jsonl"
    *before, last = metrics.read_text().splitlines()
    longer = json.dumps({**json.loads(last), "held_out/accepted_length": 2.5})
    (tmp_path / "new").write_text("\n".join([*before, longer, ""]))
    (tmp_path / "new").replace(metrics)
    follow(tmp_path, [6])
    first, second = Recorder.all
    assert steps_of(first) == [2, 4]
    assert second.told[0] == (4, {"held_out/accepted_length": 2.5})
    assert steps_of(second) == [4, 6]


def test_a_tracker_that_fails_is_reported_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Recorder):
        fails_at = 4

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "trackio", Failing)
    with caplog.at_level(logging.WARNING, "deepspec"):
        trackers = follow(tmp_path, [2, 4, 6, 8], names=("trackio", "wandb"))
    told = {type(tracker): steps_of(tracker) for tracker in Recorder.all}
    assert told == {Failing: [2], Recorder: [2, 4, 6, 8]}
    (message,) = caplog.messages
    assert "Trackio is switched off, and training continues: ConnectionError: no network" in message
    assert trackers.summary()["trackio"]["error"] == "ConnectionError: no network"


def test_the_end_of_training_does_not_wait_for_a_tracker_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    over = threading.Event()
    monkeypatch.setattr(Recorder, "hangs", over)
    monkeypatch.setattr(trackers_module, "SECONDS_TO_FINISH", 0.2)
    with caplog.at_level(logging.WARNING, "deepspec"):
        trackers = follow(tmp_path, [2, 4])
    over.set()
    assert "did not end" in caplog.messages[0]
    assert "error" in trackers.summary()["wandb"]


def test_asked_for_and_not_installed_is_an_error_and_by_default_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers_module, "installed", lambda name: False)
    with pytest.raises(ConfigError, match=r"Weights & Biases is in train\.trackers but is not installed") as caught:
        require_trackers(["wandb"], where="train.toml")
    assert "pip install wandb" in str(caught.value)
    with caplog.at_level(logging.INFO, "deepspec"):
        require_trackers(None, where="train.toml")
        require_trackers([], where="train.toml")
    (line,) = caplog.messages
    assert "deepspec-core[tensorboard]" in line
    assert chosen_trackers(None) == []
    monkeypatch.setattr(trackers_module, "installed", lambda name: True)
    assert chosen_trackers(None) == ["tensorboard"]
    assert chosen_trackers(["mlflow", "mlflow"]) == ["mlflow"]


@pytest.fixture
def scalars() -> Any:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def read(folder: Path, name: str) -> list[tuple[int, float]]:
        found = accumulator.EventAccumulator(str(folder / "tensorboard" / "tiny"))
        found.Reload()
        return [(event.step, pytest.approx(event.value)) for event in found.Scalars(name)]

    return read


def test_tensorboard_shows_one_curve_after_a_kill(tmp_path: Path, scalars: Any) -> None:
    follow(tmp_path, [2, 4, 6], names=("tensorboard",))
    # Killed after TensorBoard had step 6 and before that was noted, the newest checkpoint being of step 3.
    state = json.loads((tmp_path / STATE).read_text())
    state["tensorboard"]["step"] = 4
    (tmp_path / STATE).write_text(json.dumps(state))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:1]))
    follow(tmp_path, [4, 6, 8], names=("tensorboard",))
    assert scalars(tmp_path, "loss") == [(step, step / 10) for step in (2, 4, 6, 8)]
    assert scalars(tmp_path, "accuracy/0") == [(step, 0.5) for step in (2, 4, 6, 8)]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_what_another_run_told_silences_nothing(
    tmp_path: Path,
    name: str,
    recorder: type[Recorder],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = lambda project, _folder=None, **options: recorder(project, **options)  # noqa: E731
    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, name, made)
    foreign = {"step": 100000, "lines": 1, "names": ["loss"], "run_id": "another"}
    (tmp_path / STATE).write_text(json.dumps({name: foreign}))
    with caplog.at_level(logging.WARNING, "deepspec"):
        trackers = follow(tmp_path, [2, 4], names=(name,))
    assert [step for tracker in Recorder.all for step in steps_of(tracker)] == [2, 4]
    assert Recorder.all[-1].options.get("id") != "another"
    assert trackers.summary() == {name: {"told_to_step": 4}}
    (message,) = caplog.messages
    assert "begins a new curve" in message
