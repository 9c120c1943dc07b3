"""Training by several processes, with copies or with shards: the losses and weights of one, and each goes on with what
another one left."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file
from test_trainer import OPTIONS, ROUNDING, fixed, run, weights
from torch import Tensor
from training_ranks import SAMPLES, train, train_in

from deepspec_core.testing.tiny_draft import TinyDraft, TinySource
from deepspec_core.training.checkpoint import latest
from deepspec_core.training.parallel import fits
from deepspec_core.training.shards import cut_like, is_sharded, save_whole, whole

FSDP, DDP = {"parallel": "fsdp"}, {"parallel": "ddp"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training by one process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight") / "one"
    run(folder, evolve(OPTIONS, log_every=1), source=TinySource(SAMPLES))
    return folder


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same by two processes, "ddp" and "fsdp"."""
    base = tmp_path_factory.mktemp("two")
    cases = {
        "ddp": DDP,
        "fsdp": FSDP,
        "rolls": {**FSDP, "draft": "rolling", "micro_batch_size": 1},
        "idle": {**DDP, "draft": "idle", "micro_batch_size": 1},
        "unlike, ddp": {**DDP, "draft": "unlike"},
        "unlike, fsdp": {**FSDP, "draft": "unlike"},
    }
    train_in({base / name: {"log_every": 1, **how} for name, how in cases.items()}, ranks=2)
    return {name: base / name for name in cases}


def _state(folder: Path) -> dict[str, Tensor]:
    """All tensors of the newest checkpoint."""
    checkpoint = latest(folder)
    assert checkpoint is not None
    assert checkpoint.name == "step-000006"
    return {
        f"{path.name} {name}": value
        for path in sorted(checkpoint.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def _same(found: Path, expected: Path) -> None:
    """Tensors, and the loss of every step."""
    one, other = _state(found), _state(expected)
    assert one.keys() == other.keys()
    for name, value in other.items():
        assert one[name].shape == value.shape
        torch.testing.assert_close(one[name], value, **ROUNDING, msg=name)
    assert len(fixed(found)) == len(fixed(expected)) == 6
    for line, theirs in zip(fixed(found), fixed(expected), strict=True):
        assert line == pytest.approx(theirs, rel=1e-5)


def _stopped_at_3(folder: Path, out: Path) -> Path:
    """A copy of a training as if it had been killed after the third step."""
    shutil.copytree(folder, out)
    shutil.rmtree(out / "checkpoints" / "step-000006")
    return out


def test_two_processes_with_copies_or_shards_train_like_one(straight: Path, two_ranks: dict[str, Path]) -> None:
    """Ranks have other numbers of micro-batches in a step, and one sample in the last step of an epoch."""
    for name in ("ddp", "fsdp"):
        folder = two_ranks[name]
        _same(folder, straight)
        assert not list(folder.rglob("*.pt")) + list(folder.rglob("*.metadata"))


def test_a_draft_in_shards_writes_its_own_texts_as_one_process_does(
    straight: Path, two_ranks: dict[str, Path], tmp_path: Path
) -> None:
    train(tmp_path / "one", draft="rolling", log_every=1)
    _same(two_ranks["rolls"], tmp_path / "one")
    with pytest.raises(AssertionError):
        _same(two_ranks["rolls"], straight)


def test_weights_that_not_every_step_reads_train_as_by_one_process(two_ranks: dict[str, Path], tmp_path: Path) -> None:
    train(tmp_path / "one", draft="idle", micro_batch_size=1, log_every=1)
    _same(two_ranks["idle"], tmp_path / "one")
    # By FSDP2 as by DDP, also a weight that one rank reads and the other does not.
    _same(two_ranks["unlike, fsdp"], two_ranks["unlike, ddp"])
    state = _state(tmp_path / "one")
    assert state["model.safetensors unread"].max() < 1  # weight decay
    assert (state["model.safetensors seldom"] - 1).abs().max() > 1e-3


@pytest.mark.parametrize(("left", "how"), [("ddp", "auto"), ("fsdp", "auto"), ("fsdp", "fsdp")])
def test_one_goes_on_with_what_two_left(
    left: str, how: str, straight: Path, two_ranks: dict[str, Path], tmp_path: Path
) -> None:
    folder = _stopped_at_3(two_ranks[left], tmp_path / "one")
    _, result = run(folder, evolve(OPTIONS, log_every=1, parallel=how), source=TinySource(SAMPLES))
    assert result.resumed_from == 3
    assert result.counts["samples"] == 2 * SAMPLES
    _same(folder, straight)


@pytest.mark.slow
def test_any_number_goes_on_with_what_another_left(straight: Path, two_ranks: dict[str, Path], tmp_path: Path) -> None:
    by_two = {
        "shards, from copies": ("ddp", FSDP),
        "copies, from shards": ("fsdp", DDP),
        "shards, from shards": ("fsdp", FSDP),
    }
    by_three = {"three, from two": ("fsdp", FSDP), "three with copies, from two": ("fsdp", DDP)}
    for ranks, cases in ((2, by_two), (3, by_three)):
        folders = {_stopped_at_3(two_ranks[left], tmp_path / name): how for name, (left, how) in cases.items()}
        # With one sequence a micro-batch, ranks have unlike numbers of them.
        options = {"log_every": 1, "micro_batch_size": 1}
        done = train_in({folder: {**options, **how} for folder, how in folders.items()}, ranks=ranks)
        for folder, told in done.items():
            assert told["resumed_from"] == 3
            assert told["counts"]["samples"] == 2 * SAMPLES
            _same(folder, straight)
    folder = _stopped_at_3(straight, tmp_path / "two, from one")
    damaged = tmp_path / "two, from one that is damaged"
    shutil.copytree(straight, damaged)
    (damaged / "checkpoints" / "step-000006" / "state" / "weights.safetensors").unlink()
    done = train_in({path: {"log_every": 1, **FSDP} for path in (folder, damaged)}, ranks=2)
    assert [(told["resumed_from"], told["damaged"]) for told in done.values()] == [(3, 0), (3, 1)]
    for path in done:
        _same(path, straight)


@pytest.mark.slow
def test_machines_hold_all_shards_each(straight: Path, tmp_path: Path) -> None:
    """Four processes that say they are on two machines."""
    train_in({tmp_path / "hybrid": {"log_every": 1, **FSDP}}, ranks=4, a_machine=2)
    _same(tmp_path / "hybrid", straight)


def test_a_copy_that_does_not_fit_is_spread() -> None:
    assert fits(10 * 10**9, 80 * 10**9) == ("ddp", "a copy takes 10.0 GB and 80.0 GB are free on a device")
    assert fits(70 * 10**9, 80 * 10**9)[0] == "fsdp"


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[torch.distributed.device_mesh.DeviceMesh]:
    """A mesh of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        yield torch.distributed.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_tensors_are_written_whole_one_by_one(tmp_path: Path, one_rank: Any) -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    plain = {
        "a": torch.randn(3, 4),
        "b": torch.tensor(7.0),
        "c": torch.randn(5).to(torch.bfloat16),
        "d": torch.arange(4),
        "e": torch.randn(0, 2),
        "f": torch.randn(4, 3).T,
    }
    spread = {
        name: distribute_tensor(value, one_rank, [Shard(0)]) if value.dim() else value for name, value in plain.items()
    }
    save_whole(spread, tmp_path / "state.safetensors")
    read = load_file(tmp_path / "state.safetensors")
    assert read.keys() == plain.keys()
    for name, value in plain.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value)
    again = cut_like(read["a"], spread["a"])
    assert is_sharded(again)
    assert torch.equal(whole(again), plain["a"])


def test_a_draft_in_shards_can_be_run_and_saved_whole(one_rank: Any) -> None:
    from test_trainer import LOSS

    from deepspec_core.rows.engine import build_engine
    from deepspec_core.testing.core_registry import core_registry
    from deepspec_core.training.parallel import Sharded
    from deepspec_core.training.step import TrainingStep

    draft = TinyDraft(rank=2)
    before = {name: value.clone() for name, value in draft.state_dict().items()}
    parallel = Sharded(TrainingStep(draft, build_engine(LOSS, core_registry())), one_rank)
    held = dict(draft.named_parameters())
    assert all(is_sharded(value) for value in held.values() if value.requires_grad)
    with parallel.whole_draft():
        assert not any(map(is_sharded, draft.parameters()))
        torch.testing.assert_close(dict(draft.state_dict()), before, rtol=0, atol=0)
    # The very same parameters, because the optimizer holds them.
    assert all(value is held[name] for name, value in draft.named_parameters())
    assert weights(draft).keys() == {name for name, value in held.items() if value.requires_grad}
