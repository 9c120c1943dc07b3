"""A run killed at random moments and run again ends with the files of a run that nobody disturbed."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepspec_core.cache.hdf5 import HDF5Format

COMMAND = [sys.executable, "-m", "deepspec_core", "run"]
# One thread, as the undisturbed run: texts are sampled, so they are compared exactly only where sums are the same.
OPTIONS = ["--smoke", "--set", "run.threads=1"]
# More moments at which something is half written, and an evaluation that lasts.
SMALL_PIECES = ["--set", "train.checkpoint_every=2", "--set", "cache.shard_samples=3"]
SMALL_PIECES += ["--set", "evaluate.max_new_tokens=224"]
STAGES = ("regenerate", "cache", "train", "evaluate")
# What differs between any two runs: times, speeds and memory, and the path and weights of the draft, which are compared
# by themselves.
_OWN = re.compile(r"(.*_)?seconds|.*_per_second|peak_memory_bytes|loader_wait|speedup.*|resumed_from|draft|content|run")
_ROUNDING = 1e-4


def _folder(run_file: Path) -> Path:
    return run_file.parent / "runs" / "quickstart-dflash-smoke"


def _files(folder: Path) -> set[str]:
    """Names of all files, without those of TensorBoard, which has one for every start; locks are made when needed."""
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (".lock", "writer.lock") and "tensorboard" not in path.parts
    }


def _same(one: Any, other: Any, place: str) -> None:
    """Equal, but for times; floats up to rounding, which sums over other memory bring."""
    if isinstance(other, dict):
        assert one.keys() == other.keys(), place
        # A clock: its times are its own, what it counted is not.
        keys = {"tokens"} if "wall" in other else {key for key in other if not _OWN.fullmatch(key)}
        if place.startswith("evaluate/"):
            keys.discard("digest")  # of times too
        for key in keys:
            _same(one[key], other[key], f"{place}.{key}")
    elif isinstance(other, list):
        assert len(one) == len(other), place
        for index, pair in enumerate(zip(one, other, strict=True)):
            _same(*pair, f"{place}[{index}]")
    elif isinstance(other, float):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-6), place
    else:
        assert one == other, place


def _tensors(one: Path, other: Path) -> None:
    mine, theirs = load_file(one), load_file(other)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        difference = torch.linalg.vector_norm((mine[name] - value).double())
        assert difference <= _ROUNDING * torch.linalg.vector_norm(value.double()) + 1e-9, f"{one}: {name}"


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _compare(found: Path, expected: Path) -> int:
    """Every file of two runs; how many were compared."""
    names = _files(expected)
    assert _files(found) == names
    for name in names:
        one, other = found / name, expected / name
        if name == "regenerate/conversations.jsonl" or name.endswith(".arrow"):
            assert one.read_bytes() == other.read_bytes()
        elif name.endswith(".safetensors"):
            _tensors(one, other)
        elif name.endswith(".jsonl"):
            _same(_lines(one), _lines(other), name)
        elif one.name in ("stage.json", "metrics.json"):
            _same(json.loads(one.read_text()), json.loads(other.read_text()), name)
        elif name.endswith("config.json"):
            assert json.loads(one.read_text()) == json.loads(other.read_text())
        else:
            assert one.suffix in (".h5", ".toml", ".json", ".md", ".html"), f"{name} is compared with nothing"
    readers = [HDF5Format().open(folder / "cache", None) for folder in (found, expected)]
    assert readers[0].ids() == readers[1].ids()
    for index in range(len(readers[0])):
        one_sample, other_sample = readers[0][index], readers[1][index]
        assert torch.equal(one_sample.input_ids, other_sample.input_ids)
        assert torch.equal(one_sample.loss_mask, other_sample.loss_mask)
        assert one_sample.features is not None
        assert other_sample.features is not None
        torch.testing.assert_close(one_sample.features.hidden, other_sample.features.hidden, rtol=2e-2, atol=1e-2)
    return len(names)


def _stage(folder: Path) -> str:
    """The stage that was at work."""
    for name in ("evaluate", "train", "cache", "regenerate"):
        if (folder / name / "stage.json").exists():
            return name
    return "before"


def _lasting(folder: Path) -> dict[str, float]:
    """Seconds of each stage of a run that nobody disturbed."""
    return {stage: json.loads((folder / stage / "stage.json").read_text())["seconds"] for stage in STAGES}


def _kill_and_rerun(run_file: Path, *more: str, stages: Sequence[str], like: Path, seed: int) -> list[str]:
    """Run and kill within each of these stages, which are in the run's order. Then run to the end.

    Gives the stages that were hit. A moment is drawn from the time that the stage took in `like`, and counted from the
    stage's first line.
    """
    draw, hit, lasting = random.Random(seed), list[str](), _lasting(like)
    command, said = [*COMMAND, str(run_file), *OPTIONS, *more], run_file.with_suffix(".log")
    for stage in stages:
        with said.open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        while process.poll() is None and not re.search(rf"^{stage}: ", said.read_text(), re.MULTILINE):
            time.sleep(0.01)
        try:
            process.wait(timeout=draw.random() * lasting[stage])
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            hit.append(_stage(_folder(run_file)))
        else:
            # Faster than the moment: everything is done, and there is nothing left to kill.
            assert process.returncode == 0, said.read_text()
            break
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return hit


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, new_run_file: Callable[[Path], Path]) -> Path:
    """The run file of a run with these options that ran through."""
    path = new_run_file(tmp_path_factory.mktemp("undisturbed"))
    subprocess.run([*COMMAND, str(path), *OPTIONS, *SMALL_PIECES], check=True, capture_output=True)
    return path


@pytest.mark.slow
def test_a_kill(finished: Path, run_file: Path) -> None:
    hit = _kill_and_rerun(run_file, stages=["train"], like=_folder(finished), seed=1)
    assert hit
    assert _compare(_folder(run_file), _folder(finished)) > 15


@pytest.mark.slow
def test_twenty_kills(
    undisturbed: Path,
    tmp_path: Path,
    new_run_file: Callable[[Path], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    hit: list[str] = []
    for turn in range(20):
        folder = tmp_path / str(turn)
        folder.mkdir()
        run_file = new_run_file(folder)
        hit += _kill_and_rerun(run_file, *SMALL_PIECES, stages=STAGES, like=_folder(undisturbed), seed=100 + turn)
        assert _compare(_folder(run_file), _folder(undisturbed)) > 15
        if len(hit) >= 20:
            break
    with capsys.disabled():
        sys.stdout.write(f"\nrandom kills: {len(hit)} ({dict(Counter(hit))})\n")
    assert len(hit) >= 20
    assert len(set(hit)) >= 3, hit
