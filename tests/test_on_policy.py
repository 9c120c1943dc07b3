"""A draft that trains on its own texts: they follow from the seed, features are of them, stored ones are refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attrs import evolve
from last_hidden_draft import LastHiddenOptions
from own_text_draft import PLUGIN, OwnTextDraft
from plugin_on_path import install
from safetensors.torch import save_file
from torch import Tensor, nn

from deepspec_core.cli.main import main
from deepspec_core.config.schema import LossOptions, TrainOptions
from deepspec_core.contracts.draft import Sample, Texts
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.decoding.engine import Request, decode
from deepspec_core.errors import ConfigError, PluginError
from deepspec_core.features.online import OnlineFeatures
from deepspec_core.testing.core_registry import core_registry
from deepspec_core.testing.tiny_draft import TinySource
from deepspec_core.testing.tiny_target import TinyTarget
from deepspec_core.training.loader import MicroBatches, Plan
from deepspec_core.training.on_policy import Rollouts, Unprepared
from deepspec_core.training.trainer import TrainResult, train

VOCAB, HIDDEN, PROMPT = 24, 16, 4
OPTIONS = TrainOptions(
    lr=2e-2, global_batch_size=12, micro_batch_size=4, epochs=40, warmup=0.0, precision="float32", log_every=5
)


class WatchedTarget(TinyTarget):
    """Keeps the ids that features were taken of."""

    def __init__(self) -> None:
        super().__init__(vocab_size=VOCAB, hidden_size=HIDDEN, num_layers=2, sharpness=3.0, seed=1)
        self.asked: list[Tensor] = []

    def features(self, input_ids: Tensor, *rest: Any) -> Any:
        self.asked.append(input_ids)
        return super().features(input_ids, *rest)


def new_draft(target: TinyTarget) -> OwnTextDraft:
    torch.manual_seed(2)
    adapter: Any = SimpleNamespace(
        architecture=target.architecture, class_prefix="Tiny", embedding=lambda: nn.Embedding(VOCAB, HIDDEN)
    )
    draft = OwnTextDraft(LastHiddenOptions(), adapter, ())
    draft.adopt(target.embedding_weight(), target.head_weight())
    return draft


def samples() -> list[Sample]:
    """Prompts of four tokens, and answers of several lengths that no model wrote."""
    draw = torch.Generator().manual_seed(3)
    lengths = [9 + index % 5 for index in range(12)]
    return [
        Sample(
            id=str(index),
            input_ids=torch.randint(2, VOCAB, (length,), generator=draw),
            loss_mask=torch.arange(length) >= PROMPT,
            original_length=length,
        )
        for index, length in enumerate(lengths)
    ]


def trained(folder: Path, options: TrainOptions = OPTIONS, **changes: Any) -> tuple[OwnTextDraft, TrainResult, Any]:
    target = WatchedTarget()
    draft = new_draft(target)

    def save(path: Path) -> None:
        path.mkdir()
        save_file({name: value.clone() for name, value in draft.state_dict().items()}, path / "model.safetensors")

    arguments: dict[str, Any] = {
        "source": OnlineFeatures(samples(), target, ()), "options": options, "loss": LossOptions(terms={"tv": 1.0}),
        "registry": core_registry(), "folder": folder, "seed": 5, "save_draft": save, "device": "cpu", **changes,
    }  # fmt: skip
    return draft, train(draft=draft, **arguments), target


def test_it_learns_on_its_own_texts_and_the_target_reads_them(tmp_path: Path) -> None:
    draft, result, target = trained(tmp_path)
    assert result.figures["loss"] < 0.9 * first_loss(tmp_path), "0 would be the target's own distribution"
    given = {tuple(sample.input_ids[:PROMPT].tolist()): sample.input_ids for sample in samples()}
    replaced = 0
    for ids_BT in target.asked:
        for ids_T in ids_BT:
            original_T = given[tuple(ids_T[:PROMPT].tolist())]
            replaced += int((ids_T[: len(original_T)] != original_T).sum())
    assert replaced > 1000, "answers are the draft's"
    # Longer accepted than before training, and no greedy output changed.
    before, after = (accepted(one, target) for one in (new_draft(target), draft))
    assert after > before


def first_loss(folder: Path) -> float:
    loss: float = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    return loss


def accepted(draft: OwnTextDraft, target: TinyTarget) -> float:
    requests = [Request(id=s.id, prompt_ids=tuple(s.input_ids[:PROMPT].tolist()), seed=1) for s in samples()]

    def decoded(proposer: Any) -> dict[str, Any]:
        found = decode(
            target, proposer, requests, sampling=Sampling(), stop_ids=(), max_new_tokens=16, batch_size=4, max_length=64
        )
        return {completion.id: completion for completion in found}

    fast, plain = decoded(draft.proposer()), decoded(None)
    assert {name: done.output_ids for name, done in fast.items()} == {
        name: done.output_ids for name, done in plain.items()
    }
    rounds = [r for done in fast.values() for r in done.rounds]
    return sum(r.acceptance_length for r in rounds) / len(rounds)


def test_texts_follow_from_seed_epoch_and_sample_alone() -> None:
    target = TinyTarget(vocab_size=VOCAB, hidden_size=HIDDEN, num_layers=2)
    source = OnlineFeatures(samples(), target, ())

    def texts(seed: int, epoch: int, *indices: int) -> list[list[int]]:
        device = torch.device("cpu")
        rollouts = Rollouts(new_draft(target), source, seed=seed, device=device, compute_dtype=torch.float32)
        host = MicroBatches(source, Unprepared(), seed=seed)[Plan(epoch=epoch, indices=indices)]
        made = rollouts(host, epoch)
        assert made.prepared["labels"].numel(), "labels are laid out after the rollout"
        for row, sample in enumerate(made.samples):
            assert torch.equal(made.input_ids[row, : len(sample.input_ids)], sample.input_ids)
        return [sample.input_ids.tolist() for sample in made.samples]

    together = texts(5, 0, 0, 1, 2, 3)
    assert [texts(5, 0, index)[0] for index in range(4)] == together
    assert texts(5, 1, 0, 1, 2, 3) != together
    assert texts(6, 0, 0, 1, 2, 3) != together


def test_training_does_not_depend_on_how_a_batch_is_cut_or_on_a_stop(tmp_path: Path) -> None:
    few = evolve(OPTIONS, max_steps=3, checkpoint_every=1, keep_checkpoints=3)
    whole, _, _ = trained(tmp_path / "whole", evolve(few, micro_batch_size=12))
    parts, _, _ = trained(tmp_path / "parts", evolve(few, micro_batch_size=3))
    for step in (2, 3):
        shutil.rmtree(tmp_path / "whole" / "checkpoints" / f"step-{step:06d}")
    resumed, result, _ = trained(tmp_path / "whole", evolve(few, micro_batch_size=5))
    assert result.resumed_from == 1
    packed, result, _ = trained(tmp_path / "packed", evolve(few, batching="packed"))
    assert result.counts["padding"] < 0.1 * result.counts["positions"]
    made = (whole, parts, resumed, packed)
    for one, *others in zip(*(draft.parameters() for draft in made), strict=True):
        for other in others:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # sums in another order


BAD: dict[str, Callable[[Texts], Any]] = {
    "rollout()": lambda texts: texts.input_ids,
    "input_ids": lambda texts: evolve(texts, input_ids=texts.input_ids[:, :-1]),
    "loss_mask": lambda texts: evolve(texts, loss_mask=texts.loss_mask.float()),
    "input_ids ": lambda texts: evolve(texts, input_ids=texts.input_ids + VOCAB),
    "rollout() ": lambda texts: texts.input_ids.tolist()[0]["no"],
}


@pytest.mark.parametrize("field", BAD)
def test_a_rollout_that_breaks_its_contract_is_named(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OwnTextDraft, "rollout", lambda self, texts, uniforms: BAD[field](texts))
    with pytest.raises(PluginError, match=rf"rollout cannot be trained on: `{field.strip()}".replace("()", r"\(\)")):
        trained(tmp_path)


def test_a_source_that_looks_features_up_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="texts that it generates during training"):
        trained(tmp_path, source=TinySource(4, vocab_size=VOCAB, hidden_size=HIDDEN, num_taps=0))


@pytest.fixture
def own_text_run(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a dry run of this draft on the built-in target."""
    install(tmp_path / "site", monkeypatch, "fake-own-text", PLUGIN)
    head, _, draft = run_file.read_text().partition("[draft]")
    _, _, rest = draft.partition("\n[")
    run_file.write_text(f'{head}[draft]\ntype = "own-text"\n\n[{rest}')
    return ["run", str(run_file), "--smoke", "--dry-run", "--set", "target.layers=[]", "--set", "loss.terms={tv=1.0}"]


def test_stored_features_are_refused_before_the_first_stage(
    own_text_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(own_text_run) == 2
    said = capsys.readouterr().err
    assert "stored features belong to other texts" in said
    assert "features.mode" in said
    online = ["--set", "features.mode=online", "--set", 'run.stages=["regenerate", "train", "evaluate"]']
    assert main([*own_text_run, *online]) == 0


def test_a_rollout_that_fails_is_said_before_the_first_stage(
    own_text_run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(OwnTextDraft, "rollout", lambda self, texts, uniforms: texts.ids)
    online = ["--set", "features.mode=online", "--set", 'run.stages=["regenerate", "train", "evaluate"]']
    assert main([*own_text_run, *online]) == 2
    assert "draft type 'own-text' fails to roll out made-up texts" in capsys.readouterr().err
