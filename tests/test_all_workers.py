"""Every stage of a run shared by processes: the results of one, whoever is killed, and however many go on.

The built-in target answers by sampling in float32 with one thread. Batches of other prompts round differently, which
could part two answers; none of these parts. deepspec-core/tests/test_crew.py has the same with workers as threads.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.cli.main import main

COMMAND = [sys.executable, "-m", "deepspec_core", "run"]
SMOKE = ["--smoke", "--set", "run.threads=1"]
# Several parts in each batch of the target, whose size is the finished run's: another one rounds differently.
SMALL_SHARDS = ["--set", "cache.shard_samples=3"]
WITHIN_SECONDS = 60
_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from deepspec_core.cli.main import main
sys.exit(main(sys.argv[2:]))
"""
# What differs between two evaluations of the same: how fast they were, and by how many.
_OWN = ("speculative", "plain", "speedup", "speedup_median_of_groups", "workers")


def _folder(run_file: Path) -> Path:
    return run_file.parent / "runs" / "quickstart-dflash-smoke"


def _figures(run_file: Path) -> tuple[list[dict[str, Any]], list[int]]:
    report = json.loads((_folder(run_file) / "metrics.json").read_text())
    results = [{key: value for key, value in one.items() if key not in _OWN} for one in report["results"]]
    return results, [one["workers"] for one in report["results"]]


def _texts(run_file: Path) -> bytes:
    return (_folder(run_file) / "regenerate" / "conversations.jsonl").read_bytes()


def _require_same(found: Path, expected: Path, stage: str) -> None:
    """The stage's results in both runs, but for times. No file of a worker is left."""
    if stage == "regenerate":
        assert _texts(found) == _texts(expected)
    elif stage == "cache":
        one, other = (HDF5Format().open(_folder(path) / "cache", None) for path in (found, expected))
        assert one.ids() == other.ids()
        for index in range(len(other)):
            # To the bit: a sample is computed in the same batch, whoever computes it.
            assert one[index].features.hidden.equal(other[index].features.hidden)
            assert one[index].features.last_hidden.equal(other[index].features.last_hidden)
    else:
        assert _figures(found)[0] == _figures(expected)[0]
    names, theirs = ({path.name for path in (_folder(one) / stage).iterdir()} for one in (found, expected))
    assert names - {".lock"} == theirs - {".lock"} or stage == "cache"
    records = [json.loads((_folder(path) / stage / "stage.json").read_text()) for path in (found, expected)]
    for key in ("keys", "reads", "content") if stage != "evaluate" else ("keys", "reads"):
        assert records[0][key] == records[1][key]
    if stage != "cache":
        assert records[0]["summary"] == records[1]["summary"]


def _done(command: list[str], code: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


# Its three processes import everything; deepspec-core/tests/test_shared_answers.py has the same with threads.
@pytest.mark.slow
def test_two_workers_evaluate_what_one_did(finished: Path, finished_copy: Path) -> None:
    """And the first speaks of all prompts."""
    again = ["--stages", "evaluate", "--force", "evaluate", "--workers", "2", "--set", "evaluate.temperature=[0.0]"]
    seen = _done([*COMMAND, str(finished_copy), *SMOKE, *again])
    assert "held-out at temperature 0: 4 of 4 prompts" in seen
    (found,), workers = _figures(finished_copy)
    assert found == _figures(finished)[0][0]
    assert workers == [2]
    report = (_folder(finished_copy) / "report.md").read_text()
    assert "Up to 2 workers decoded at the same time" in report
    assert "workers decoded at the same time" not in (_folder(finished) / "report.md").read_text()


@pytest.fixture(scope="module")
def longer(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run with an evaluation that lasts long enough to be disturbed."""
    folder = tmp_path_factory.mktemp("longer") / "copy"
    shutil.copytree(finished.parent, folder)
    path, text = folder / finished.name, finished.read_text()
    assert "max_new_tokens = 12" in text
    path.write_text(text.replace("max_new_tokens = 12", "max_new_tokens = 224"))
    assert main(["run", str(path), *SMOKE, "--force", "evaluate"]) == 0
    return path


@pytest.fixture
def begun(longer: Path, run_file: Path) -> Callable[[str], Path]:
    """begun(stage): a run with everything that the stage builds on, and nothing else."""
    run_file.write_text(longer.read_text())

    def make(stage: str) -> Path:
        shutil.copytree(longer.parent / "runs", run_file.parent / "runs")
        folder = _folder(run_file)
        stages = ("regenerate", "cache", "train", "evaluate")
        for later in stages[stages.index(stage) :]:
            shutil.rmtree(folder / later)
        return run_file

    return make


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["regenerate", "cache"])
def test_two_workers_do_what_one_did(longer: Path, begun: Callable[[str], Path], stage: str) -> None:
    run_file = begun(stage)
    _done([*COMMAND, str(run_file), *SMOKE, *SMALL_SHARDS, "--stages", stage, "--workers", "2"])
    _require_same(run_file, longer, stage)
    if stage == "cache":
        _done([sys.executable, "-m", "deepspec_core", "cache", "verify", str(_folder(run_file) / "cache")])


def _processes_of(run_file: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(run_file).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:  # ended meanwhile
            continue
    return sorted(found)


def _wait_for_work(run_file: Path, stage: str, processes: list[subprocess.Popen[str]]) -> None:
    """Return when two workers write files of their own."""
    marks = {"regenerate": "conversations.jsonl.partial.*", "cache": "part-*", "evaluate": "*.jsonl.*"}
    begin = time.monotonic()
    while len(list((_folder(run_file) / stage).glob(marks[stage]))) < 2:
        assert all(process.poll() is None for process in processes), [one.communicate() for one in processes]
        assert time.monotonic() - begin < 240, "the workers did not get there"
        time.sleep(0.02)
    time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "then"), [("regenerate", 1), ("cache", 3), ("evaluate", 1), ("regenerate", 3)])
def test_a_killed_worker_ends_the_run_and_others_go_on(
    longer: Path, begun: Callable[[str], Path], stage: str, then: int
) -> None:
    run_file = begun(stage)
    command = [*COMMAND, str(run_file), *SMOKE, *SMALL_SHARDS, "--stages", stage, "--workers"]
    process = subprocess.Popen([*command, "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait_for_work(run_file, stage, [process])
    worker = max(pid for pid in _processes_of(run_file) if pid != process.pid)
    os.kill(worker, signal.SIGKILL)
    begin = time.monotonic()
    _, errors = process.communicate(timeout=WITHIN_SECONDS)
    assert time.monotonic() - begin < WITHIN_SECONDS
    assert process.returncode == 128 + signal.SIGKILL
    assert "of 2 ended first, killed by SIGKILL" in errors
    assert "Traceback" not in errors
    assert _processes_of(run_file) == []
    _done([*command, str(then)])
    _require_same(run_file, longer, stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["regenerate", "cache", "evaluate"])
def test_a_disk_that_fills_ends_both_workers_in_words(longer: Path, begun: Callable[[str], Path], stage: str) -> None:
    run_file = begun(stage)
    arguments = ["run", str(run_file), *SMOKE, *SMALL_SHARDS, "--stages", stage]
    limited = [sys.executable, "-c", _LIMITED, {"regenerate": "5000", "cache": "120000", "evaluate": "5000"}[stage]]
    seen = _done([*limited, *arguments, "--workers", "2"], code=2)
    assert "File too large" in seen
    assert not json.loads((_folder(run_file) / stage / "stage.json").read_text())["complete"]
    _done([sys.executable, "-m", "deepspec_core", *arguments])
    _require_same(run_file, longer, stage)


@pytest.mark.slow
def test_torchrun_shares_the_stages_too(longer: Path, begun: Callable[[str], Path]) -> None:
    run_file = begun("regenerate")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["-m", "deepspec_core", "run", str(run_file), *SMOKE, *SMALL_SHARDS, "--stages", "regenerate,cache"]
    _done([*launcher, *command])
    _require_same(run_file, longer, "regenerate")
    _require_same(run_file, longer, "cache")


def _on_two_machines(run_files: tuple[Path, Path], *arguments: str) -> list[subprocess.Popen[str]]:
    """Two workers that nobody watches from outside, as the launchers of two machines would start them."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [*COMMAND, str(run_file), *SMOKE, *arguments],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, run_file in enumerate(run_files)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_machine_that_is_gone_ends_the_other(begun: Callable[[str], Path], killed: int) -> None:
    run_file = begun("regenerate")
    workers = _on_two_machines((run_file, run_file), "--stages", "regenerate", "--set", "regenerate.batch_size=1")
    _wait_for_work(run_file, "regenerate", workers)
    workers[killed].kill()
    begin = time.monotonic()
    _, errors = workers[1 - killed].communicate(timeout=WITHIN_SECONDS)
    assert time.monotonic() - begin < WITHIN_SECONDS
    assert workers[1 - killed].returncode == 2
    assert ("Worker 1 of 2 ended" if killed else "cannot reach each other") in errors
    assert "Traceback" not in errors
    workers[killed].wait()


@pytest.mark.slow
def test_machines_without_a_shared_folder_are_refused(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / run_file.name
    shutil.copy(run_file, other)
    workers = _on_two_machines((run_file, other), "--stages", "regenerate")
    errors = [worker.communicate(timeout=240)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [2, 2]
    assert "Worker 1 does not see the files of the first worker" in errors[1]
    assert "Worker 1 does not see the files of the first worker" in errors[0]
