"""The scripts of examples/cluster on this machine: Slurm's and torchrun's commands are stand-ins, the run is real.

Two starts of torchrun.sh, of one worker each, are two machines to the run.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_stopping import WITHIN_SECONDS, _checkpoints, _long_training, _processes_of, _steps_logged, _wait

SCRIPTS = Path(__file__).parents[1] / "examples" / "cluster"
_STAND_INS = {
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    # Its own options come first.
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'if [[ $1 == show ]]; then echo localhost; else echo "$@" >> "$SAID"; fi',
    "vllm": 'echo "$CUDA_VISIBLE_DEVICES $@" >> "$SAID"; exec sleep 600',
}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With stand-ins for commands of a cluster; what they were asked is in the file SAID."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, body in _STAND_INS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SAID": str(tmp_path / "said"),
        "OMP_NUM_THREADS": "1",
    }


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.s*")), ids=lambda path: path.name)
def test_scripts_can_be_read_and_say_how_they_are_used(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


def test_several_machines_need_a_place_to_meet(environment: dict[str, str]) -> None:
    command = ["bash", str(SCRIPTS / "torchrun.sh"), "run.toml"]
    done = subprocess.run(command, env={**environment, "NODES": "2"}, capture_output=True, text=True, check=False)
    assert (done.returncode, "HEAD is not set" in done.stderr) == (2, True)


@pytest.mark.slow
def test_two_machines(finished: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    run_file = _long_training(finished, tmp_path)
    folder = tmp_path / "runs" / "quickstart-dflash"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        own = {"NODES": "2", "WORKERS": "1", "HEAD": "localhost", "PORT": str(free.getsockname()[1])}
    options = ["--set", "train.max_steps=4", "--set", "train.parallel=fsdp", "--set", "train.log_every=1"]
    command = ["bash", str(SCRIPTS / "torchrun.sh"), str(run_file), *options]
    machines = [
        subprocess.Popen(
            command, env={**environment, **own}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    try:
        said = [machine.communicate(timeout=300)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert any("parallel: fsdp" in text for text in said)
    assert _steps_logged(folder) == 4
    assert _checkpoints(folder) == [4]


@pytest.mark.slow
def test_a_job_whose_time_is_up_saves_and_goes_back_into_the_queue(
    finished: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    run_file = _long_training(finished, tmp_path)
    folder = tmp_path / "runs" / "quickstart-dflash"
    job = {
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "WORKERS": "2",
    }
    command = ["bash", str(SCRIPTS / "train.sbatch"), str(run_file), "--set", "train.log_every=1"]
    process = subprocess.Popen(
        command, env={**environment, **job}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    _wait(lambda: _steps_logged(folder) >= 3, process)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=2 * WITHIN_SECONDS)
    assert process.returncode == 0, said
    assert _checkpoints(folder) == [_steps_logged(folder)]
    assert (tmp_path / "said").read_text() == f"requeue {os.getpid()}\n"
    assert _processes_of(run_file) == []


def test_servers_say_where_they_are_and_go(tmp_path: Path, environment: dict[str, str]) -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "2"}
    folder = tmp_path / "servers"
    process = subprocess.Popen(
        ["bash", str(SCRIPTS / "servers.sbatch"), "some/target", str(folder)], env={**environment, **job}
    )
    said, until = tmp_path / "said", time.monotonic() + 60
    while not said.exists() or len(said.read_text().splitlines()) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    ports = [line.rpartition(":")[2] for line in (folder / "7.txt").read_text().splitlines()]
    assert ports == ["8000/v1", "8001/v1"]
    asked = sorted(said.read_text().splitlines())
    assert [line.split()[:3] for line in asked] == [["0", "serve", "some/target"], ["1", "serve", "some/target"]]
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert not (folder / "7.txt").exists()
