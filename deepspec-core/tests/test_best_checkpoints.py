"""Evaluations during training: what they leave, which checkpoints stay, what becomes the finished draft; kill, resume.

Decoding is scripted here; tests/test_training_evaluations.py decodes for real.
"""

from __future__ import annotations

import json
import logging
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file

from deepspec_core.config.schema import HeldOutOptions, LossOptions, TrainOptions, WeightingOptions
from deepspec_core.errors import CheckpointError
from deepspec_core.rows.weighting_options import DecayOptions
from deepspec_core.stopping import Stopped
from deepspec_core.testing.core_registry import core_registry
from deepspec_core.testing.tiny_draft import TinyDraft, TinySource
from deepspec_core.training.best_checkpoints import Decoded, Evaluations
from deepspec_core.training.trainer import TrainResult, train

OPTIONS = TrainOptions(
    lr=1e-2,
    global_batch_size=8,
    micro_batch_size=4,
    epochs=4,  # of three steps each
    precision="float32",
    checkpoint_every=5,
    log_every=5,
    keep_checkpoints=1,
    evaluate_every=2,
)
LOSS = LossOptions(terms={"ce": 1.0}, weighting=WeightingOptions(type="decay", options=DecayOptions(gamma=2.0)))
RISES_AND_FALLS = {0: 1.0, 2: 1.5, 4: 2.5, 6: 2.4, 8: 2.2, 10: 2.1, 12: 2.3}


class Scripted:
    """Decodes to what the script says of a step; the keeper of what it was asked."""

    def __init__(self, lengths: dict[int, float], *, stop_at: int | None = None) -> None:
        self.lengths, self.stop_at, self.asked = lengths, stop_at, list[int]()

    def __call__(self, draft: Path, check: Callable[[], None]) -> Decoded:
        step = int(draft.parent.name.removeprefix("step-"))
        self.asked.append(step)
        load_file(draft / "model.safetensors")
        torch.manual_seed(99)  # whatever decoding draws, no step of training draws it
        if step == self.stop_at:
            raise Stopped(signal.SIGTERM)
        length = self.lengths[step]
        committed = round(length * 10)
        return Decoded(
            accepted_length=committed / 10, interval=(1.0, 3.0), prompts=2, failures=0, rounds=10, tokens=committed + 1
        )


class Result(NamedTuple):
    """What training came to, and the checkpoint that becomes the finished draft."""

    trained: TrainResult
    chosen: Path
    evaluations: Evaluations


def run(folder: Path, decode: Scripted | None, options: TrainOptions = OPTIONS) -> tuple[TinyDraft, Result]:
    draft = TinyDraft(rank=2)

    def save(path: Path) -> None:
        path.mkdir()
        save_file({name: value.clone() for name, value in draft.state_dict().items()}, path / "model.safetensors")

    options = options if decode is not None else evolve(options, evaluate_every=None)
    evaluations = Evaluations(options, decode)
    result = train(
        draft=draft, source=TinySource(22), options=options, loss=LOSS, registry=core_registry(), folder=folder,
        seed=5, save_draft=save, device="cpu", evaluations=evaluations,
    )  # fmt: skip
    return draft, Result(result, evaluations.chosen(result.checkpoint), evaluations)


def records(folder: Path) -> list[dict[str, Any]]:
    """Without what another run takes other times for."""
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("seconds", "time_share")} for row in rows]


def figures(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("held_out/seconds", "held_out/time_share", "tokens_per_second", "sequences_per_second")
    timed += ("loader_wait", "step_seconds", "peak_memory_bytes")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def kept(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


def test_the_best_stays_beside_the_last_and_is_chosen(tmp_path: Path) -> None:
    _, result = run(tmp_path, Scripted(RISES_AND_FALLS))
    assert [record["step"] for record in records(tmp_path)] == [0, 2, 4, 6, 8, 10, 12]
    assert kept(tmp_path) == [4, 12]
    assert (result.chosen.name, result.trained.checkpoint.name, result.trained.steps) == (
        "step-000004",
        "step-000012",
        12,
    )
    lines = {line["step"]: line for line in figures(tmp_path)}
    # Steps that are evaluated have a line, where the estimate and what was decoded stand side by side.
    assert sorted(lines) == [2, 4, 5, 6, 8, 10, 12]
    for record in records(tmp_path)[1:]:
        line = lines[record["step"]]
        assert line["held_out/accepted_length"] == record["accepted_length"] == RISES_AND_FALLS[record["step"]]
        assert line["tau_probabilistic"] == record["tau_probabilistic"] > 1
        assert line["epoch"] == record["epoch"]
    assert "held_out/accepted_length" not in lines[5]
    assert result.trained.figures["held_out/accepted_length"] == 2.3


def test_several_best_stay_and_the_last_is_chosen_where_asked(tmp_path: Path) -> None:
    _, result = run(tmp_path, Scripted(RISES_AND_FALLS), evolve(OPTIONS, keep_best=3, final="last"))
    assert kept(tmp_path) == [4, 6, 12]
    assert result.chosen == result.trained.checkpoint


def test_of_equal_ones_the_later_is_the_best(tmp_path: Path) -> None:
    _, result = run(tmp_path, Scripted(dict.fromkeys(range(0, 13, 2), 1.5) | {12: 1.2}))
    assert result.chosen.name == "step-000010"


def test_training_is_the_same_with_and_without(tmp_path: Path) -> None:
    expected, _ = run(tmp_path / "without", None)
    draft, _ = run(tmp_path / "with", Scripted(RISES_AND_FALLS))
    for name, value in draft.state_dict().items():
        # Evaluations move tensors to other places in memory, where some processors round sums otherwise: 3e-8. Other
        # random numbers would give other batches, and weights that are 1e-2 apart.
        torch.testing.assert_close(value, expected.state_dict()[name], rtol=0, atol=1e-5, msg=name)
    assert not (tmp_path / "without" / "evaluations.jsonl").exists()
    # Means are over the steps since the line before, so they are the same where both have a line.
    assert figures(tmp_path / "with")[-1]["accuracy@0"] == figures(tmp_path / "without")[-1]["accuracy@0"]


def test_a_fall_is_told_of_and_may_end_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="deepspec")
    script = Scripted(RISES_AND_FALLS)
    _, result = run(tmp_path, script, evolve(OPTIONS, evaluation=HeldOutOptions(warn_after=2, stop_after=3)))
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert [text.count("has fallen") for text in warnings] == [1, 1, 0]
    assert "fallen 2 times in a row, up to step 8: 2.500, 2.400, 2.200. The best is that of step 4." in warnings[0]
    assert "training ends at step 10 of 12" in warnings[2]
    assert (result.trained.steps, result.chosen.name, script.asked) == (10, "step-000004", [0, 2, 4, 6, 8, 10])
    assert "the finished draft is that of step 4" in caplog.text
    # Called again, it has still ended.
    again = Scripted({})
    _, result = run(tmp_path, again, evolve(OPTIONS, evaluation=HeldOutOptions(warn_after=2, stop_after=3)))
    assert (result.trained.steps, result.chosen.name, again.asked) == (10, "step-000004", [])


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that nobody disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    run(folder, Scripted(RISES_AND_FALLS))
    return folder


@pytest.mark.parametrize("step", [0, 4, 12])
def test_killed_while_decoding_then_resumed(straight: Path, tmp_path: Path, step: int) -> None:
    with pytest.raises(Stopped):
        run(tmp_path / "killed", Scripted(RISES_AND_FALLS, stop_at=step))
    script = Scripted(RISES_AND_FALLS)
    draft, result = run(tmp_path / "killed", script)
    expected = load_file(straight / "checkpoints" / "step-000012" / "draft" / "model.safetensors")
    assert script.asked == [one for one in range(0, 13, 2) if one >= step]
    assert records(tmp_path / "killed") == records(straight)
    assert figures(tmp_path / "killed") == figures(straight)
    assert kept(tmp_path / "killed") == kept(straight)
    assert result.chosen.name == "step-000004"
    assert result.trained.resumed_from == step
    torch.testing.assert_close(dict(draft.state_dict()), expected)


def test_killed_between_two_lines_of_two_files(straight: Path, tmp_path: Path) -> None:
    """The record is written before the line of metrics.jsonl gets its figures."""
    run(tmp_path / "killed", Scripted(RISES_AND_FALLS))
    path = tmp_path / "killed" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    cut = {key: value for key, value in lines[-1].items() if not key.startswith("held_out/")}
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines[:-1], cut]))
    script = Scripted({})
    _, result = run(tmp_path / "killed", script)
    assert script.asked == []
    assert figures(tmp_path / "killed") == figures(straight)
    assert result.trained.figures["held_out/accepted_length"] == 2.3


def test_a_half_written_record_is_found_again(straight: Path, tmp_path: Path) -> None:
    run(tmp_path / "killed", Scripted(RISES_AND_FALLS))
    path = tmp_path / "killed" / "evaluations.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    script = Scripted(RISES_AND_FALLS)
    run(tmp_path / "killed", script)
    assert script.asked == [12]
    assert records(tmp_path / "killed") == records(straight)


def test_resuming_from_an_earlier_checkpoint_drops_later_records(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = evolve(OPTIONS, keep_checkpoints=4)
    run(tmp_path, Scripted(RISES_AND_FALLS), options)
    assert kept(tmp_path) == [4, 6, 8, 10, 12]
    for step in (10, 12):
        (tmp_path / "checkpoints" / f"step-{step:06d}").rename(tmp_path / f"gone-{step}")
    script = Scripted(RISES_AND_FALLS | {10: 2.9, 12: 2.0})
    _, result = run(tmp_path, script, options)
    assert script.asked == [10, 12]
    assert result.chosen.name == "step-000010"
    assert [record["step"] for record in records(tmp_path)] == [0, 2, 4, 6, 8, 10, 12]
    # The best is gone: the next best that is there, with a warning.
    (tmp_path / "checkpoints" / "step-000010").rename(tmp_path / "gone")
    _, result = run(tmp_path, Scripted({}), options)
    assert result.chosen.name == "step-000006"
    assert "the checkpoint of step 10, the best on held-out prompts, is missing" in caplog.text


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_a_damaged_best_is_set_aside_and_the_next_best_chosen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    options = evolve(OPTIONS, keep_best=2)
    run(tmp_path, Scripted(RISES_AND_FALLS), options)
    path = tmp_path / "checkpoints" / "step-000004" / "draft" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-7] if how == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    _, result = run(tmp_path, Scripted({}), options)
    assert (result.chosen.name, result.evaluations.damaged) == ("step-000006", 1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "damaged-step-000004",
        "step-000006",
        "step-000012",
    ]
    assert "checkpoint step-000004 is damaged" in caplog.text
    assert "the finished draft is that of step 6" in caplog.text


def test_what_is_gone_takes_no_place_among_the_best(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(tmp_path, Scripted(RISES_AND_FALLS, stop_at=8))
    (tmp_path / "checkpoints" / "step-000004").rename(tmp_path / "gone")
    run(tmp_path, Scripted(RISES_AND_FALLS | {12: 2.0}))
    assert kept(tmp_path) == [8, 12]


@pytest.mark.parametrize(
    "changes",
    [
        {"accepted_length": "high"},
        {"accepted_length": 99.0},
        {"accepted_length": 2.55},
        {"accepted_length": 10**400},
        {"accepted_length": 0.0, "interval": [0.0, 1.0], "tokens": 0},
        {"interval": None},
        {"interval": [2.6, 3.0]},
        {"tokens": 40},
        {"rounds": -10},
        {"rounds": True},
        {"step": -4},
        {"step": 0},
        {"tau_probabilistic": "high"},
        {"time_share": float("nan")},
    ],
)
def test_a_damaged_record_is_named(straight: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    shutil.copytree(straight, tmp_path / "damaged")
    path = tmp_path / "damaged" / "evaluations.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | changes)
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(CheckpointError, match=r"(?s)damaged record.*evaluations\.jsonl:3"):
        run(tmp_path / "damaged", Scripted({}))
