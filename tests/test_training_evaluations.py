"""Evaluations during training that decode for real: their figures, what they leave alone, what needs them.

Which checkpoints stay, and what a killed run does, is in deepspec-core/tests/test_best_checkpoints.py.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import deepspec_core
from deepspec_core.cli.main import main
from deepspec_core.plugins.registry import Registry

ONE_THREAD = ["--set", "run.threads=1"]
TRAIN = ["--smoke", *ONE_THREAD, "--stages", "train"]
EVERY_5 = ["--set", "train.evaluate_every=5", "--set", "train.evaluation.max_new_tokens=12"]
FEW = ["--set", "train.evaluation.prompts=2", "--set", "train.evaluation.max_new_tokens=8"]
WEIGHTS = "model.safetensors"


def _folder(run_file: Path) -> Path:
    return run_file.parent / "runs" / "quickstart-dflash-smoke"


def _records(run_file: Path) -> list[dict[str, Any]]:
    lines = (_folder(run_file) / "train" / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def _without_times(run_file: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in one.items() if k not in ("seconds", "time_share")} for one in _records(run_file)]


def _bytes(folder: Path) -> bytes:
    return (folder / WEIGHTS).read_bytes()


def _apart(one: Path, other: Path) -> float:
    """How far two checkpoints are apart at most."""
    weights, others = (load_file(folder / WEIGHTS) for folder in (one, other))
    assert weights.keys() == others.keys()
    return max(float((weights[name] - others[name]).abs().max()) for name in weights)


def test_training_is_the_same_and_the_best_is_evaluated(
    finished: Path, finished_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With cached features, whose target is loaded for this alone."""
    whole = ["--set", "evaluate.temperature=[0.0]", "--stages", "train,evaluate"]
    command = ["run", str(finished_copy), "--smoke", *ONE_THREAD, *EVERY_5, *whole]
    assert main([*command, "--force", "train"]) == 0
    seen = capsys.readouterr()
    assert "train.evaluate_every = 5: the target is loaded beside cached features" in seen.err
    folder = _folder(finished_copy)
    last = folder / "train" / "checkpoints" / "step-000010" / "draft"
    # Evaluations move tensors to other places in memory, where some processors round sums otherwise: 1.2e-7. Random
    # numbers that an evaluation drew would change the batches, and weights by about the learning rate, 4e-3.
    assert _apart(last, _folder(finished) / "draft") < 1e-5
    records = _records(finished_copy)
    assert [record["step"] for record in records] == [0, 5, 10]
    best = max(records, key=lambda record: (record["accepted_length"], record["step"]))
    assert _bytes(folder / "draft") == _bytes(folder / "train" / "checkpoints" / f"step-{best['step']:06d}" / "draft")
    summary = json.loads((folder / "train" / "stage.json").read_text())["summary"]
    assert summary["finished draft of step"] == best["step"]
    # The same prompts, tokens and temperature: what the stage finds is what training found.
    (result,) = json.loads((folder / "metrics.json").read_text())["results"]
    assert (result["samples"], result["rounds"]) == (best["prompts"], best["rounds"])
    assert result["acceptance_length"] == best["accepted_length"]
    assert 0 < records[-1]["time_share"] < 1
    # Which draft is final is a setting of the results; how many stay is not.
    assert main([*command, "--set", 'train.final="last"']) == 2
    assert "`train.final` changed" in capsys.readouterr().err
    assert main([*command, "--set", "train.keep_best=3"]) == 0


@pytest.mark.slow
def test_from_python(finished_copy: Path) -> None:
    text = finished_copy.read_text().replace("[train]\n", "[train]\nevaluate_every = 9\nfinal = 'last'\n")
    finished_copy.write_text(text + "\n[train.evaluation]\nprompts = 1\nmax_new_tokens = 4\n")
    done = deepspec_core.train(finished_copy, stages=["train"], force=["train"], smoke=True)
    assert done.steps == 10
    assert done.figures["held_out/accepted_length"] >= 1
    assert [record["step"] for record in _records(finished_copy)] == [0, 5, 10]
    assert done.stages["train"]["finished draft of step"] == 10


def test_what_cannot_be_evaluated_is_refused_before_the_first_stage(
    run_file: Path, registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*changes: str) -> str:
        settings = ['run.stages=["train"]', 'features.mode="online"', *changes]
        arguments = [one for setting in settings for one in ("--set", setting)]
        assert main(["run", str(run_file), *arguments]) == 2
        message = capsys.readouterr().err
        assert "starting" not in message
        return message

    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "x" * 40}]}
        for n in range(3)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = f'data.sources=[{{path="{data}"}}]'
    every = "train.evaluate_every=5"
    message = refused(every, sources, "data.held_out=0.0")
    assert "no prompts are held out from training" in message
    assert "data.held_out" in message
    assert "train.evaluation" in refused("train.evaluation.prompts=3")
    assert "No prompt is held out for evaluation" in refused(every, sources, "data.held_out=0.001")
    without = tmp_path / "without-weights"
    shutil.copytree(registry.load("builtin", "tiny-qwen3")(), without)
    (without / WEIGHTS).unlink()
    message = refused(every, f'target.model="{without}"')
    assert "the target's weights are missing" in message
    assert "no safetensors files" in message


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_workers_share_the_prompts(finished_copy: Path, workers: int) -> None:
    """The draft is the same at step 0; later, sums over other batches round differently."""
    command = [sys.executable, "-m", "deepspec_core", "run", str(finished_copy), *TRAIN, *EVERY_5, "--force", "train"]
    subprocess.run(command, check=True, timeout=600)
    alone = _without_times(finished_copy)
    subprocess.run([*command, "--workers", str(workers)], check=True, timeout=600)
    shared = _without_times(finished_copy)
    assert shared[0] == alone[0]
    assert [one["step"] for one in shared] == [0, 5, 10]
    for one, other in zip(shared, alone, strict=True):
        assert one["prompts"] == other["prompts"] == 4
        assert one["accepted_length"] == pytest.approx(other["accepted_length"], abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_moment(finished_copy: Path, seed: int) -> None:
    """kill -9 until the stage is complete: the records and the finished draft of an undisturbed run."""
    often = ["--set", "train.evaluate_every=2", "--set", "train.checkpoint_every=3", "--set", "train.keep_best=2", *FEW]
    command = [sys.executable, "-m", "deepspec_core", "run", str(finished_copy), *TRAIN, *often]
    subprocess.run([*command, "--force", "train"], check=True, timeout=600)
    folder = _folder(finished_copy)
    expected, draft = _without_times(finished_copy), _bytes(folder / "draft")
    kept = sorted(path.name for path in (folder / "train" / "checkpoints").iterdir())
    steps = (folder / "train" / "metrics.jsonl").read_text().count("\n")
    began = time.monotonic()
    subprocess.run([*command, "--force", "train"], check=True, timeout=600)
    long = time.monotonic() - began
    shutil.rmtree(folder / "train")
    rng, kills = random.Random(seed), 0
    while True:
        process = subprocess.Popen(command)
        try:
            assert process.wait(timeout=long * rng.uniform(0.4, 1.0)) == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert _without_times(finished_copy) == expected
    assert _bytes(folder / "draft") == draft
    assert sorted(path.name for path in (folder / "train" / "checkpoints").iterdir()) == kept
    lines = [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines) == steps
    assert kills < 50


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dspark", "eagle3"])
def test_other_drafts(finished_copy: Path, kind: str) -> None:
    """Of every algorithm the figure is that of an evaluation of the same checkpoint."""
    text = finished_copy.read_text()
    begin, end = text.index("[draft]"), text.index("[train]")
    options = {"dspark": "block_size = 4\nnum_layers = 1\nnum_anchors = 8", "eagle3": "ttt_length = 3"}[kind]
    loss = "[loss]\nterms = {ce = 1.0}\n"
    finished_copy.write_text(f'{text[:begin]}[draft]\ntype = "{kind}"\n{options}\n{loss}\n{text[end:]}')
    command = ["run", str(finished_copy), "--smoke", *ONE_THREAD, *EVERY_5, "--set", "evaluate.temperature=[0.0]"]
    assert main([*command, "--stages", "train,evaluate", "--force", "train"]) == 0
    (result,) = json.loads((_folder(finished_copy) / "metrics.json").read_text())["results"]
    records = _records(finished_copy)
    best = max(records, key=lambda record: (record["accepted_length"], record["step"]))
    assert result["acceptance_length"] == best["accepted_length"]
    assert load_file(_folder(finished_copy) / "draft" / WEIGHTS)
