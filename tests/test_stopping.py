"""A run that is asked to stop: by SIGTERM as by Ctrl-C, one process or several, wherever it is."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from deepspec_core.cli.main import main
from deepspec_core.pipeline.local_workers import started_here
from deepspec_core.stopping import Stopped, StopRequest, exit_code, stopped_by_sigterm
from deepspec_core.training.metrics import MetricsLog

COMMAND = [sys.executable, "-m", "deepspec_core", "run"]
WITHIN_SECONDS = 60


def _folder(run_file: Path) -> Path:
    return run_file.parent / "runs" / "quickstart-dflash-smoke"


def _long_training(finished: Path, tmp_path: Path) -> Path:
    """A run file whose training goes on from a finished cache, for longer than any test waits."""
    text = finished.read_text().replace('["regenerate", "cache", "train", "evaluate"]', '["train"]')
    text = text.replace("[cache]\n", f'[cache]\npath = "{_folder(finished) / "cache"}"\n')
    text = text.replace("epochs = 6", "epochs = 40000").replace("checkpoint_every = 200", "checkpoint_every = 40000")
    path = tmp_path / "long.toml"
    path.write_text(text)
    return path


def _steps_logged(folder: Path) -> int:
    log = folder / "train" / "metrics.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


def _wait(until: Callable[[], object], process: subprocess.Popen[str]) -> None:
    begin = time.monotonic()
    while not until():
        assert process.poll() is None, process.communicate()
        if time.monotonic() - begin >= 120:
            process.kill()  # it would train for hours
            pytest.fail("the run did not get there")
        time.sleep(0.05)


def _begin(run_file: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [*COMMAND, str(run_file), "--set", "train.log_every=1", "--set", "run.threads=1", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _processes_of(run_file: Path) -> list[int]:
    """Processes with the run file among their arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(run_file).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:  # ended meanwhile
            continue
    return found


def _checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "train" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param((), id="alone", marks=pytest.mark.slow),
        pytest.param(("--workers", "2"), id="workers", marks=pytest.mark.slow),
        pytest.param(("--workers", "2", "--set", "train.parallel=fsdp"), id="shards", marks=pytest.mark.slow),
        pytest.param(("--set", "train.loader_workers=1"), id="loader", marks=pytest.mark.slow),
        pytest.param(
            ("--workers", "2", "--set", "train.loader_workers=1"), id="workers-loader", marks=pytest.mark.slow
        ),
    ],
)
def test_sigterm_in_training_saves_the_step_and_ends_all(
    finished: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    run_file = _long_training(finished, tmp_path)
    folder = tmp_path / "runs" / "quickstart-dflash"
    process = _begin(run_file, *arguments)
    _wait(lambda: _steps_logged(folder) >= 3, process)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=WITHIN_SECONDS)
    assert time.monotonic() - begin < WITHIN_SECONDS
    assert process.returncode == 128 + signal.SIGTERM
    assert errors.endswith("Interrupted.\n")
    assert "Traceback" not in errors
    assert _processes_of(run_file) == []
    # The last step that was logged is the one that was saved.
    assert _checkpoints(folder) == [_steps_logged(folder)]


def test_sigterm_in_training_of_one_process_saves_the_step(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here it is the tests' own process, whose imports are done."""
    run_file = _long_training(finished, tmp_path)
    folder = tmp_path / "runs" / "quickstart-dflash"
    write = MetricsLog.write

    def stopping(log: MetricsLog, figures: Mapping[str, Any]) -> None:
        write(log, figures)
        if _steps_logged(folder) == 3:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(MetricsLog, "write", stopping)
    run = ["run", str(run_file), "--set", "train.log_every=1", "--set", "run.threads=1"]
    assert main(run) == 128 + signal.SIGTERM
    errors = capsys.readouterr().err
    assert errors.endswith("Interrupted.\n")
    assert "Traceback" not in errors
    assert _checkpoints(folder) == [_steps_logged(folder)]


@pytest.mark.slow
def test_a_rerun_goes_on_where_sigterm_stopped_it(finished: Path, tmp_path: Path) -> None:
    run_file = _long_training(finished, tmp_path)
    folder = tmp_path / "runs" / "quickstart-dflash"
    process = _begin(run_file)
    _wait(lambda: _steps_logged(folder) >= 2, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=WITHIN_SECONDS)
    (stopped_at,) = _checkpoints(folder)
    process = _begin(run_file)
    _wait(lambda: _steps_logged(folder) > stopped_at, process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=WITHIN_SECONDS)
    assert process.returncode == 128 + signal.SIGINT
    lines = [json.loads(line)["step"] for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, len(lines) + 1))
    assert _checkpoints(folder)[-1] == len(lines) > stopped_at


@pytest.mark.slow
def test_workers_stop_when_their_starter_is_killed(finished: Path, tmp_path: Path) -> None:
    run_file = _long_training(finished, tmp_path)
    folder = tmp_path / "runs" / "quickstart-dflash"
    process = _begin(run_file, "--workers", "2")
    _wait(lambda: _steps_logged(folder) >= 2, process)
    assert len(_processes_of(run_file)) == 3
    process.kill()
    process.wait()
    begin = time.monotonic()
    while _processes_of(run_file):
        assert time.monotonic() - begin < WITHIN_SECONDS
        time.sleep(0.1)
    assert _checkpoints(folder) == [_steps_logged(folder)]


@pytest.mark.slow
def test_sigterm_to_another_launcher_saves_the_step_too(finished: Path, tmp_path: Path) -> None:
    run_file = _long_training(finished, tmp_path)
    folder = tmp_path / "runs" / "quickstart-dflash"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    options = ["--set", "train.log_every=1", "--set", "train.loader_workers=1"]
    process = subprocess.Popen(
        [*launcher, "-m", "deepspec_core", "run", str(run_file), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait(lambda: _steps_logged(folder) >= 3, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=WITHIN_SECONDS)
    assert _processes_of(run_file) == []
    assert _checkpoints(folder) == [_steps_logged(folder)]


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_others(finished: Path, tmp_path: Path) -> None:
    run_file = _long_training(finished, tmp_path)
    folder = tmp_path / "runs" / "quickstart-dflash"
    process = _begin(run_file, "--workers", "2")
    _wait(lambda: _steps_logged(folder) >= 2, process)
    worker = max(pid for pid in _processes_of(run_file) if pid != process.pid)
    os.kill(worker, signal.SIGKILL)
    process.communicate(timeout=WITHIN_SECONDS)
    assert process.returncode == 128 + signal.SIGKILL
    assert _processes_of(run_file) == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["regenerate", "cache", "evaluate"])
def test_sigterm_in_another_stage_keeps_what_is_finished(
    run_file: Path, finished: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = _folder(run_file) / stage / "stage.json"
    process = _begin(run_file, "--smoke")
    _wait(record.exists, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=WITHIN_SECONDS)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    assert main(["run", str(run_file), "--smoke", "--set", "train.log_every=1", "--set", "run.threads=1"]) == 0
    capsys.readouterr()
    told = [json.loads((_folder(path) / "metrics.json").read_text())["results"] for path in (run_file, finished)]
    assert [result["rounds"] for result in told[0]] == [result["rounds"] for result in told[1]]


def test_the_first_signal_asks_and_the_second_stops_at_once() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest() as request:
        request.check()
        signal.raise_signal(signal.SIGTERM)
        assert request.asked
        with pytest.raises(Stopped) as stopped:
            request.check()
        assert exit_code(stopped.value) == 143
        # A scheduler's own, and the same passed on by the process that started this one.
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped) as at_once:
            signal.raise_signal(signal.SIGINT)
        assert exit_code(at_once.value) == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_only_a_child_of_the_starter_is_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not started_here()
    monkeypatch.setenv("DEEPSPEC_STARTED_BY", str(os.getppid()))
    assert started_here()
    # A command that a worker starts, a plugin's for instance, has the worker as its parent.
    code = "from deepspec_core.pipeline.local_workers import started_here; print(started_here())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_handler_of_the_embedding_program_stays() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: seen.append(number))
    try:
        with stopped_by_sigterm():
            signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert exit_code(KeyboardInterrupt()) == 130


def test_an_error_that_follows_from_a_signal_is_the_signal() -> None:
    """An import that a signal cuts short may end in any error."""

    def cut_short() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except Stopped:
            raise RecursionError from None

    with pytest.raises(Stopped) as stopped, stopped_by_sigterm():
        cut_short()
    assert exit_code(stopped.value) == 143
