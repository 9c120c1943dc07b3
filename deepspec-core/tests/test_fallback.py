"""A damaged newest checkpoint: training goes on from the one before it, says so, and ends where it would have ended."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from attrs import evolve
from safetensors.torch import load_file
from test_trainer import OPTIONS, ROUNDING, SAMPLES, check_log, run
from torch.testing import assert_close

from deepspec_core.errors import CheckpointError
from deepspec_core.testing.tiny_draft import TinyDraft
from deepspec_core.training.checkpoint import complete, latest

OFTEN = evolve(OPTIONS, checkpoint_every=1, keep_checkpoints=3)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _damage(checkpoint: Path, how: str) -> None:
    if how == "cut":
        _cut(checkpoint / "state" / "optimizer.safetensors")
    elif how == "flipped":
        path = checkpoint / "state" / "weights.safetensors"
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    elif how == "emptied":
        shutil.rmtree(checkpoint / "state")
    elif how == "manifest":
        (checkpoint / "manifest.json").write_text("{}")
    else:
        _cut(checkpoint / "draft" / "model.safetensors")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training to the end, with checkpoints of steps 4, 5 and 6."""
    folder = tmp_path_factory.mktemp("straight")
    run(folder, OFTEN)
    return folder


@pytest.fixture
def stopped(straight: Path, tmp_path: Path) -> Path:
    """The same as if it had been killed after step 5."""
    shutil.copytree(straight, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "step-000006")
    return tmp_path / "stopped"


@pytest.mark.parametrize("how", ["cut", "flipped", "emptied", "manifest", "draft"])
def test_training_goes_on_from_the_one_before(
    straight: Path, stopped: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = stopped / "checkpoints" / "step-000005"
    _damage(newest, how)
    _, result = run(stopped, OFTEN)
    assert (result.resumed_from, result.damaged) == (4, 1)
    assert "checkpoint step-000005 is damaged" in caplog.text
    assert "goes on from step 4, and 1 steps are done again" in caplog.text
    aside = stopped / "checkpoints" / "damaged-step-000005"
    assert aside.is_dir()
    assert str(aside) in caplog.text
    check_log(stopped, straight)
    for kind in ("weights", "optimizer"):
        found, expected = (
            load_file(folder / "checkpoints" / "step-000006" / "state" / f"{kind}.safetensors")
            for folder in (stopped, straight)
        )
        assert_close(found, expected, **ROUNDING)
    assert result.counts["samples"] == 2 * SAMPLES
    # Once: it is not found again, and no later checkpoint removes it.
    assert run(stopped, OFTEN)[1].damaged == 0
    assert aside.is_dir()


def test_names_of_those_set_aside_do_not_collide(stopped: Path) -> None:
    (stopped / "checkpoints" / "damaged-step-000005").mkdir()
    _damage(stopped / "checkpoints" / "step-000005", "cut")
    assert run(stopped, OFTEN)[1].damaged == 1
    assert (stopped / "checkpoints" / "damaged-step-000005-2" / "manifest.json").exists()


def test_without_a_sound_one_nothing_is_moved_and_nothing_trained(stopped: Path) -> None:
    for step in (4, 5):
        _damage(stopped / "checkpoints" / f"step-00000{step}", "cut")
    with pytest.raises(CheckpointError, match=r"(?s)no earlier checkpoint.*train again from the first step"):
        run(stopped, OFTEN)
    assert [path.name for path in complete(stopped)] == ["step-000004", "step-000005"]


def test_another_run_is_no_damage(stopped: Path) -> None:
    """It is refused, and nothing is set aside."""
    with pytest.raises(CheckpointError, match="another draft"):
        run(stopped, OFTEN, draft=TinyDraft())
    newest = latest(stopped)
    assert newest is not None
    assert newest.name == "step-000005"
    assert not list((stopped / "checkpoints").glob("damaged-*"))
