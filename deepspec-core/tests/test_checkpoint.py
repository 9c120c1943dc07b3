"""Training states on disk: whole or absent, exact, and clear about damage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from deepspec_core.errors import CheckpointError
from deepspec_core.training import checkpoint as checkpoints


def model(seed: int) -> tuple[dict[str, Tensor], torch.optim.AdamW]:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    parameters: dict[str, Tensor] = dict(net.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)
    return parameters, optimizer


def step(parameters: dict[str, Tensor], optimizer: torch.optim.AdamW) -> None:
    for number, parameter in enumerate(parameters.values()):
        parameter.grad = torch.full_like(parameter, 0.1 * (number + 1)).cumsum(0)
    optimizer.step()


def write_draft(path: Path) -> None:
    path.mkdir()
    (path / "config.json").write_text("{}")


def save(folder: Path, number: int, parameters: Any, optimizer: Any, *, keep: int = 2) -> Path:
    return checkpoints.save(
        folder, number, save_draft=write_draft, parameters=parameters, optimizer=optimizer,
        scalars={"epoch": 1, "figures": {"loss": [0.1, 3.0]}}, keep=keep,
    )  # fmt: skip


def test_a_round_trip_is_exact(tmp_path: Path) -> None:
    parameters, optimizer = model(0)
    step(parameters, optimizer)
    path = save(tmp_path, 7, parameters, optimizer)
    assert path == checkpoints.latest(tmp_path) == tmp_path / "checkpoints" / "step-000007"
    assert checkpoints.step_of(path) == 7
    assert sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()) == [
        "draft/config.json",
        "manifest.json",
        "state/optimizer.safetensors",
        "state/state.json",
        "state/weights.safetensors",
    ]
    others, other = model(1)
    scalars = checkpoints.restore(path, parameters=others, optimizer=other)
    assert scalars == {"format": 1, "step": 7, "optimizer": "adamw", "epoch": 1, "figures": {"loss": [0.1, 3.0]}}
    for _ in range(3):
        step(parameters, optimizer)
        step(others, other)
    torch.testing.assert_close(others, parameters, rtol=0, atol=0)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    parameters, optimizer = model(0)
    for number in (5, 90, 1000, 1000000):
        save(tmp_path, number, parameters, optimizer)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-001000", "step-1000000"]
    newest = checkpoints.latest(tmp_path)
    assert newest is not None
    assert newest.name == "step-1000000"


def test_half_written_ones_do_not_count(tmp_path: Path) -> None:
    parameters, optimizer = model(0)
    assert checkpoints.latest(tmp_path) is None

    def fail(path: Path) -> None:
        write_draft(path)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(tmp_path, 3, save_draft=fail, parameters=parameters, optimizer=optimizer, scalars={}, keep=1)
    assert checkpoints.latest(tmp_path) is None
    assert save(tmp_path, 3, parameters, optimizer) == checkpoints.latest(tmp_path)
    assert checkpoints.remove_unfinished(tmp_path) == 0


FILES = ["state/weights.safetensors", "state/optimizer.safetensors", "state/state.json", "manifest.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_damage_is_named_with_the_file_and_the_fix(tmp_path: Path, file: str, damage: str) -> None:
    parameters, optimizer = model(0)
    step(parameters, optimizer)
    path = save(tmp_path, 3, parameters, optimizer) / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = content.index(b'"bytes": ') + 9 if file == "manifest.json" else len(content) - 3
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    others, other = model(1)
    before = {name: value.detach().clone() for name, value in others.items()}
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(tmp_path / "checkpoints" / "step-000003", parameters=others, optimizer=other)
    message = str(error.value)
    assert "step-000003" in message
    assert f"remove {tmp_path / 'checkpoints' / 'step-000003'} " in message
    if file != "manifest.json" or damage != "flipped":
        assert file in message
    torch.testing.assert_close(others, before, rtol=0, atol=0)


def test_a_missing_draft_file_is_noticed(tmp_path: Path) -> None:
    parameters, optimizer = model(0)
    path = save(tmp_path, 3, parameters, optimizer)
    (path / "draft" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        checkpoints.restore(path, parameters=parameters, optimizer=optimizer)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parameters, optimizer = model(0)
    step(parameters, optimizer)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("unpickled")

    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("torch.load", refuse)
    path = save(tmp_path, 3, parameters, optimizer)
    assert checkpoints.restore(path, parameters=parameters, optimizer=optimizer)["step"] == 3


def test_no_room_is_said_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(free=999_999_999))
    checkpoints.require_space(tmp_path, 999_999_999)
    with pytest.raises(CheckpointError, match=r"(?s)no room.*1,000.0 MB free.*2.0 GB"):
        checkpoints.require_space(tmp_path, 2_000_000_000)
