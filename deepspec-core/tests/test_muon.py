"""[train] optimizer = "muon": which weights it moves and how, saved and resumed, alone and over several processes."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file
from test_trainer import OPTIONS, SAMPLES, assert_same, lines, run, weights
from torch import Tensor, nn
from training_ranks import SAMPLES as SAMPLES_OF_RANKS
from training_ranks import train_in

from deepspec_core.contracts.rows import Heads
from deepspec_core.errors import CheckpointError, ConfigError
from deepspec_core.testing.tiny_draft import TinyDraft, TinySource
from deepspec_core.training.checkpoint import latest
from deepspec_core.training.muon_in_float32 import MuonInFloat32, orthogonal
from deepspec_core.training.optimizers import build_optimizer, hidden_matrices

MUON = evolve(OPTIONS, optimizer="muon", log_every=1)
# Steps are orthogonalised in bfloat16, five products deep: a gradient that differs in its last bit may move each of the
# six steps, of about a hundredth, by a 64th of itself.
ROUNDED = {"rtol": 0.0, "atol": 6 * 1e-2 * 2**-6}


class Shaped(TinyDraft):
    """Linear layers of every kind that a draft has."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(rank=2, **sizes)
        self.gate = nn.Linear(18, 2)
        self.confidence = nn.Linear(16, 1)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)


def test_matrices_between_hidden_states_are_its_own() -> None:
    assert hidden_matrices(Shaped()) == {"project.weight", "gate.weight"}
    names = {name for name, _ in Shaped().named_parameters()}
    # A bias, a parameter that is no layer's, an embedding, heads over tokens, one number, what is not trained.
    others = {"project.bias", "slots", "before.weight", "after.weight", "lm_head.weight", "confidence.weight"}
    assert others | {"frozen.weight", "gate.bias"} < names


def test_no_number_decides_what_a_layer_is_for() -> None:
    """As many tokens as hidden features: each matrix between hidden states has a side like the vocabulary's."""
    assert hidden_matrices(Shaped(vocab_size=16)) == {"project.weight", "gate.weight"}
    assert hidden_matrices(Shaped(vocab_size=18)) == {"project.weight", "gate.weight"}


class Formed(Shaped):
    """A draft that forms its heads of weights, and has an embedding that is a linear layer's too."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(16, 2, bias=False)
        self.wide = nn.Linear(2, 48, bias=False)
        self.tied = nn.Linear(2, 48, bias=False)
        assert self.before is not None
        self.tied.weight = self.before.weight

    def heads(self) -> Heads:
        heads = super().heads()
        assert heads.correction is not None
        adapted = heads.draft + self.wide.weight @ self.narrow.weight
        return evolve(heads, draft=adapted, correction=2.0 * heads.correction[:, :])


def test_weights_that_heads_are_formed_of_are_the_heads() -> None:
    with torch.no_grad():
        assert hidden_matrices(Formed()) == {"project.weight", "gate.weight"}


def test_a_step_is_the_definition(tmp_path: Path) -> None:
    """The averaged gradient with all singular values about one, at 0.2 sqrt(longer side) of the learning rate."""
    draft, generator = TinyDraft(rank=2), torch.Generator().manual_seed(1)
    named = {name: value for name, value in draft.named_parameters() if value.requires_grad}
    optimizer = build_optimizer(named, MUON, matrices=hidden_matrices(draft), fused=True)
    before = {name: value.detach().clone() for name, value in named.items()}
    for value in named.values():
        value.grad = torch.randn(value.shape, generator=generator)
    optimizer.step()
    weight, grad = named["project.weight"], named["project.weight"].grad
    assert grad is not None
    moved = (before["project.weight"] * (1 - 1e-2 * 0.01) - weight) / (1e-2 * 0.2 * 32**0.5)
    left, _, right = torch.linalg.svd(grad, full_matrices=False)
    singular = (left.T @ moved.detach() @ right.T).diagonal()
    assert ((singular > 0.6) & (singular < 1.3)).all(), "five iterations bring them near one"
    off = left.T @ moved.detach() @ right.T - singular.diag()
    assert off.abs().max() < 0.05
    expected = {name: value.clone().requires_grad_() for name, value in before.items() if name != "project.weight"}
    for name, value in expected.items():
        value.grad = named[name].grad
    torch.optim.AdamW(expected.values(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01).step()
    for name, value in expected.items():
        torch.testing.assert_close(named[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16), (24, 24)])
def test_in_fp32_it_is_torchs_but_for_rounding(shape: tuple[int, int]) -> None:
    """For CPUs without instructions for bf16. Its state is torch's, so one goes on with what the other left."""
    generator = torch.Generator().manual_seed(2)
    first = torch.randn(shape, generator=generator)
    options = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    weights_of, states = [], []
    for kind in (torch.optim.Muon, MuonInFloat32):
        weight = nn.Parameter(first.clone())
        optimizer = kind([weight], **options)
        grads = torch.Generator().manual_seed(3)
        for _ in range(3):
            weight.grad = torch.randn(shape, generator=grads)
            optimizer.step()
        weights_of.append(weight.detach())
        states.append(optimizer.state_dict())
    # Three steps of 0.2 sqrt(longer side) / 100 times at most 1.3, each in bf16: its 8 bits.
    torch.testing.assert_close(*weights_of, rtol=0.0, atol=3 * 1e-2 * 0.2 * 40**0.5 * 1.3 * 2**-6)
    assert not torch.equal(weights_of[0], first)
    assert states[0].keys() == states[1].keys()
    assert states[0]["param_groups"] == states[1]["param_groups"]
    torch.testing.assert_close(states[0]["state"][0]["momentum_buffer"], states[1]["state"][0]["momentum_buffer"])


def test_the_iteration_brings_singular_values_near_one() -> None:
    matrix = torch.randn(30, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = torch.linalg.svdvals(orthogonal(matrix, (3.4445, -4.7750, 2.0315), 5, 1e-7))
    assert found.min() > 0.6
    assert found.max() < 1.3
    assert torch.equal(orthogonal(torch.zeros(3, 5), (3.4445, -4.7750, 2.0315), 5, 1e-7), torch.zeros(3, 5))


@pytest.mark.parametrize(("quick", "kind"), [(True, torch.optim.Muon), (False, MuonInFloat32)])
def test_the_processor_decides_the_dtype_of_its_products(
    monkeypatch: pytest.MonkeyPatch, quick: bool, kind: type[torch.optim.Muon]
) -> None:
    monkeypatch.setattr("deepspec_core.training.optimizers.has_bf16_instructions", lambda _: quick)
    draft = TinyDraft(rank=2)
    named = {name: value for name, value in draft.named_parameters() if value.requires_grad}
    optimizer = build_optimizer(named, MUON, matrices=hidden_matrices(draft), fused=True)
    assert type(optimizer._parts[0]) is kind  # type: ignore[attr-defined]


def test_it_learns_at_the_schedules_rate_and_says_what_it_trains(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="deepspec")
    _, result = run(tmp_path, evolve(MUON, epochs=10, lr=0.05))
    said = "optimizer: Muon for 1 matrices (512 parameters), AdamW for 4 other weights (256 parameters)"
    assert said in caplog.text
    written = lines(tmp_path)
    assert result.figures["loss"] < 0.9 * written[0]["loss"]
    state = load_file(result.checkpoint / "state" / "optimizer.safetensors")
    assert {name for name in state if name.endswith(":project.weight")} == {"momentum_buffer:project.weight"}
    assert {"exp_avg:project.bias", "exp_avg_sq:slots", "step:after.weight"} <= state.keys()


@pytest.mark.parametrize("at", [3, 6])
def test_it_resumes_to_the_last_bit(tmp_path: Path, at: int) -> None:
    straight, _ = run(tmp_path / "straight", MUON)
    run(tmp_path / "resumed", MUON)
    for left in (tmp_path / "resumed" / "checkpoints").iterdir():
        if left.name != f"step-{at:06d}":
            shutil.rmtree(left)
    again, result = run(tmp_path / "resumed", MUON)
    assert result.resumed_from == at
    assert_same(again, weights(straight), rtol=0.0, atol=0.0)


def test_another_optimizers_state_is_refused(tmp_path: Path) -> None:
    run(tmp_path, evolve(MUON, max_steps=3))
    with pytest.raises(CheckpointError, match="another optimizer"):
        run(tmp_path, evolve(MUON, optimizer="adamw", max_steps=6))


def test_a_draft_without_matrices_is_refused() -> None:
    with pytest.raises(ConfigError, match="no matrix"):
        build_optimizer({"slots": nn.Parameter(torch.zeros(3, 16))}, MUON, matrices=frozenset(), fused=True)


@pytest.mark.slow
def test_two_processes_with_copies_or_shards_train_like_one(tmp_path: Path) -> None:
    """And one goes on with what two in shards left."""
    run(tmp_path / "one", MUON, source=TinySource(SAMPLES_OF_RANKS))
    how = {"optimizer": "muon", "log_every": 1}
    train_in({tmp_path / name: {**how, "parallel": name} for name in ("ddp", "fsdp")}, ranks=2)
    shutil.copytree(tmp_path / "fsdp", tmp_path / "on")
    shutil.rmtree(tmp_path / "on" / "checkpoints" / "step-000006")
    _, result = run(tmp_path / "on", MUON, source=TinySource(SAMPLES_OF_RANKS))
    assert result.resumed_from == 3
    assert SAMPLES != SAMPLES_OF_RANKS
    expected = _state(tmp_path / "one")
    for name in ("ddp", "fsdp", "on"):
        found = _state(tmp_path / name)
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, **ROUNDED, msg=f"{name}: {key}")


def _state(folder: Path) -> dict[str, Tensor]:
    checkpoint = latest(folder)
    assert checkpoint is not None
    assert checkpoint.name == "step-000006"
    return load_file(checkpoint / "state" / "weights.safetensors")
