"""The training loop: results do not depend on how a batch was cut; it stops, resumes and complains as it says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspec_core.config.schema import LossOptions, TrainOptions, WeightingOptions
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.loss import RowStats
from deepspec_core.errors import CheckpointError, DataError, PluginError, TrainingError
from deepspec_core.plugins.specs import ComponentSpec
from deepspec_core.rows.weighting_options import DecayOptions
from deepspec_core.testing.core_registry import core_registry
from deepspec_core.testing.tiny_draft import TinyDraft, TinySource
from deepspec_core.training.checkpoint import latest
from deepspec_core.training.metrics import MetricsLog
from deepspec_core.training.trainer import TrainResult, train

OPTIONS = TrainOptions(
    lr=1e-2,
    global_batch_size=8,
    micro_batch_size=4,
    epochs=2,
    warmup=0.2,
    weight_decay=0.01,
    precision="float32",
    checkpoint_every=3,
    log_every=2,
    keep_checkpoints=2,
)
LOSS = LossOptions(
    terms={"ce": 0.3, "tv": 0.7}, weighting=WeightingOptions(type="decay", options=DecayOptions(gamma=2.0))
)
SAMPLES = 22  # three steps an epoch, the last one of six
FIXED = ("step", "epoch", "lr", "grad_norm", "loss", "loss/ce", "loss/tv", "accuracy@0", "tau_probabilistic")


def run(folder: Path, options: TrainOptions = OPTIONS, **changes: Any) -> tuple[TinyDraft, TrainResult]:
    draft = changes.pop("draft", None) or TinyDraft(rank=2)

    def save(path: Path) -> None:
        path.mkdir()
        save_file({name: value.clone() for name, value in draft.state_dict().items()}, path / "model.safetensors")

    arguments = {
        "draft": draft, "source": TinySource(SAMPLES), "options": options, "loss": LOSS, "registry": core_registry(),
        "folder": folder, "seed": 5, "save_draft": save, "device": "cpu", **changes,
    }  # fmt: skip
    return draft, train(**arguments)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def fixed(folder: Path) -> list[dict[str, Any]]:
    return [{name: line[name] for name in FIXED} for line in lines(folder)]


def weights(draft: TinyDraft) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in draft.named_parameters() if value.requires_grad}


# The same sums in other memory, or with another number of threads: products may round differently in the last bit, and
# a few steps of AdamW at a rate of 1e-2 carry that on.
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}


def assert_same(draft: TinyDraft, other: dict[str, Tensor], **tolerance: float) -> None:
    torch.testing.assert_close(weights(draft), other, **(tolerance or ROUNDING))


def check_log(found: Path, expected: Path) -> None:
    for one, other in zip(fixed(found), fixed(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_training_lowers_the_loss_and_says_so(tmp_path: Path) -> None:
    before = weights(TinyDraft(rank=2))
    draft, result = run(tmp_path, evolve(OPTIONS, epochs=10, lr=0.05))
    assert (result.steps, result.resumed_from, result.unfinished) == (30, 0, 0)
    assert result.checkpoint == tmp_path / "checkpoints" / "step-000030" == latest(tmp_path)
    assert result.counts["samples"] == 10 * SAMPLES
    written = lines(tmp_path)
    assert [line["step"] for line in written] == list(range(2, 31, 2))
    assert written[-1] == result.figures
    assert written[-1]["loss"] < 0.9 * written[0]["loss"]
    assert written[-1]["epoch"] == 10.0
    rates = {"tokens_per_second", "sequences_per_second", "step_seconds", "peak_memory_bytes", "padding_share"}
    assert {*rates, "accept_rate@2", *FIXED} <= set(written[-1])
    assert 0 < written[-1]["padding_share"] < 1
    assert written[-1]["loss"] == pytest.approx(0.3 * written[-1]["loss/ce"] + 0.7 * written[-1]["loss/tv"], rel=1e-5)
    for name, value in weights(draft).items():
        assert not torch.equal(value, before[name]), name
    saved = load_file(result.checkpoint / "draft" / "model.safetensors")
    torch.testing.assert_close(saved, dict(draft.state_dict()), rtol=0, atol=0)


def test_one_step_is_adamw_on_the_step_wide_mean(tmp_path: Path) -> None:
    """Against the definition: all sequences in one batch, one division, clip, AdamW at the schedule's rate."""
    from deepspec_core.rows.engine import build_engine
    from deepspec_core.training.loader import MicroBatches, Plan
    from deepspec_core.training.sampler import GlobalBatches

    source = TinySource(SAMPLES)
    reference = TinyDraft(rank=2)
    indices = GlobalBatches(source.lengths(), global_batch_size=8, epochs=2, seed=5).indices(0)
    batch = MicroBatches(source, reference.preparation, seed=5)[Plan(epoch=0, indices=tuple(indices))]
    result = build_engine(LOSS, core_registry())(
        reference(batch.to_draft_batch(source, torch.device("cpu"))), reference.heads()
    )
    (result.total / result.denominator).backward()
    parameters = [value for value in reference.parameters() if value.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.05)
    assert norm > 0.05
    torch.optim.AdamW(parameters, lr=OPTIONS.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01).step()

    options = evolve(OPTIONS, max_steps=1, micro_batch_size=3, clip_norm=0.05)
    draft, _ = run(tmp_path, options)
    assert_same(draft, weights(reference), rtol=1e-5, atol=1e-6)
    assert lines(tmp_path)[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


@pytest.mark.parametrize("micro_batch_size", [1, 8])
def test_the_cut_into_micro_batches_changes_nothing(tmp_path: Path, micro_batch_size: int) -> None:
    options = evolve(OPTIONS, max_steps=3, log_every=1)
    expected, _ = run(tmp_path / "four", options)
    draft, _ = run(tmp_path / "other", evolve(options, micro_batch_size=micro_batch_size))
    assert_same(draft, weights(expected))
    check_log(tmp_path / "other", tmp_path / "four")


def test_workers_and_online_features_change_nothing(tmp_path: Path) -> None:
    options = evolve(OPTIONS, max_steps=3)
    expected, _ = run(tmp_path / "plain", options)
    draft, result = run(tmp_path / "workers", evolve(options, loader_workers=1))
    assert_same(draft, weights(expected))
    assert result.counts["samples"] == SAMPLES
    draft, _ = run(tmp_path / "online", options, source=TinySource(SAMPLES, stored=False))
    assert_same(draft, weights(expected))


class Stop(Exception):
    pass


def test_resuming_equals_never_having_stopped(tmp_path: Path) -> None:
    expected, _ = run(tmp_path / "straight")

    def stop(path: Path) -> None:
        if path.name == "step-000003":
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "stopped", on_checkpoint=stop)
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 1.0}\n{"step": 6, "lo')  # what a later kill would have left
    fresh = TinyDraft(rank=2)
    with torch.no_grad():
        for parameter in weights(fresh):
            fresh.get_parameter(parameter).fill_(9.0)
    draft, result = run(tmp_path / "stopped", draft=fresh)
    assert result.resumed_from == 3
    assert_same(draft, weights(expected))
    check_log(tmp_path / "stopped", tmp_path / "straight")
    assert result.counts["samples"] == 2 * SAMPLES
    again, result = run(tmp_path / "stopped")
    assert_same(again, weights(draft), rtol=0, atol=0)  # stored, not computed
    assert (result.resumed_from, result.counts["samples"]) == (6, 2 * SAMPLES)
    assert result.figures == lines(tmp_path / "stopped")[-1]
    assert len(lines(tmp_path / "stopped")) == 3


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_trainer
def save(path):
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"half")
    if "000006" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
test_trainer.run(Path(sys.argv[1]), save_draft=save)
"""


def test_killed_while_saving_then_resumed(tmp_path: Path) -> None:
    expected, _ = run(tmp_path / "straight")
    here = str(Path(__file__).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed"), here], env=environment, timeout=120, check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").glob("step-*")] == ["step-000003"]
    draft, result = run(tmp_path / "killed")
    assert (result.resumed_from, result.unfinished) == (3, 1)
    check_log(tmp_path / "killed", tmp_path / "straight")
    assert_same(draft, weights(expected))
    assert not list((tmp_path / "killed" / "checkpoints").glob(".*"))


class Interrupting(TinySource):
    """Ctrl-C while the third step is being prepared."""

    asked = 0

    def __getitem__(self, index: int) -> Sample:
        self.asked += 1
        if self.asked == 2 * 8 + 3:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(index)


def test_who_follows_the_lines_is_called_where_nothing_is_left_to_train(tmp_path: Path) -> None:
    """The process that wrote the last lines may have been killed before it told them."""
    run(tmp_path)
    seen: list[int] = []
    run(tmp_path, on_line=lambda: seen.append(len(lines(tmp_path))))
    assert seen == [3]


@pytest.mark.parametrize("unreadable", [b'{"step": 1, "note": "\xff"}', b"\xff\xfe", b'{"step": 1' + b"0" * 400 + b"}"])
def test_a_line_that_cannot_be_read_is_dropped(tmp_path: Path, unreadable: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.5}\n' + unreadable + b'\n{"step": 2}\n{"step": 3}\n')
    log = MetricsLog(path, resume_at=2)
    log.add(2, {"held_out": 1.5})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.5}, {"step": 2, "held_out": 1.5}]


def test_ctrl_c_finishes_the_step_and_saves(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    options = evolve(OPTIONS, checkpoint_every=100)
    expected, _ = run(tmp_path / "straight", options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "asked", options, source=Interrupting(SAMPLES))
    assert signal.getsignal(signal.SIGINT) is before
    checkpoint = latest(tmp_path / "asked")
    assert checkpoint is not None
    assert checkpoint.name in ("step-000003", "step-000004")
    draft, _ = run(tmp_path / "asked", options)
    assert_same(draft, weights(expected))


def test_what_is_not_finite_stops_training_before_weights_are_touched(tmp_path: Path) -> None:
    before = weights(TinyDraft(rank=2))
    draft = TinyDraft(rank=2)
    options = evolve(OPTIONS, micro_batch_size=1, global_batch_size=SAMPLES)
    with pytest.raises(TrainingError, match=r"(?s)loss of step 1 is not finite.*sample-7\n") as error:
        run(tmp_path, options, draft=draft, source=TinySource(SAMPLES, spoil=7))
    assert error.value.exit_code == 2
    assert error.value.found == "gradient norm nan; not finite: loss, loss/ce, loss/tv"
    assert_same(draft, before, rtol=0, atol=0)
    assert latest(tmp_path) is None


class Overflowing:
    """A plugin's loss term that is fine on made-up rows, and not on likely labels."""

    needs_target, needs_extras = False, ()

    def __call__(self, stats: RowStats) -> Tensor:
        """As cross-entropy; infinite below 3."""
        return torch.where(stats.ce < 3, torch.inf, stats.ce)


def test_the_term_that_is_not_finite_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = ModuleType("overflowing")
    spec = ComponentSpec(name="overflowing", summary="-", build="overflowing:Overflowing")
    vars(plugin).update(Overflowing=Overflowing, deepspec_losses=lambda: [spec])
    monkeypatch.setitem(sys.modules, "overflowing", plugin)
    loss = evolve(LOSS, terms={"ce": 1.0, "overflowing": 0.1})
    with pytest.raises(TrainingError, match="loss of step 1 is not finite") as error:
        run(tmp_path, loss=loss, registry=core_registry(plugin))
    assert str(error.value.found).endswith("; not finite: loss, loss/overflowing")


def test_an_epoch_with_nothing_to_supervise_ends_training(tmp_path: Path) -> None:
    draft = TinyDraft(rank=2)
    before = weights(draft)
    with pytest.raises(TrainingError, match=r"(?s)nothing to learn from.*short_samples 9"):
        run(tmp_path, evolve(OPTIONS, weight_decay=0.0), draft=draft, source=TinySource(9, lengths=(2, 4)))
    # Until then its steps are steps of zeros.
    assert_same(draft, before, rtol=0, atol=0)
    assert all(line["grad_norm"] == 0.0 and "loss" not in line for line in lines(tmp_path))


def test_a_draft_that_does_not_keep_packed_conversations_apart_is_refused(tmp_path: Path) -> None:
    """TinyPreparation lays its anchors out as if each sample had a row of its own."""
    with pytest.raises(PluginError, match="lets the conversations of a packed row influence each other") as caught:
        run(tmp_path, evolve(OPTIONS, batching="packed"))
    assert "bucketed" in str(caught.value.fix)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no samples"):
        run(tmp_path, source=TinySource(0))
    run(tmp_path, evolve(OPTIONS, max_steps=3))
    with pytest.raises(CheckpointError, match=r"(?s)seed.*seed = 6.*seed = 5"):
        run(tmp_path, seed=6)
    with pytest.raises(CheckpointError, match="samples is not what"):
        run(tmp_path, source=TinySource(SAMPLES + 1))
    with pytest.raises(CheckpointError, match=r"(?s)another draft.*after\.weight"):
        run(tmp_path, draft=TinyDraft())


def test_bf16_trains_fp32_weights(tmp_path: Path) -> None:
    draft = TinyDraft(rank=2).to(torch.bfloat16)
    _, result = run(tmp_path, evolve(OPTIONS, precision="bfloat16", epochs=10, lr=0.05), draft=draft)
    assert draft.project.weight.dtype == torch.float32
    assert draft.lm_head.weight.dtype == torch.bfloat16
    assert lines(tmp_path)[-1]["loss"] < 0.9 * lines(tmp_path)[0]["loss"]
    assert result.steps == 30
