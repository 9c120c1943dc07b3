"""[draft] init: training begins with a checkpoint's weights, refuses another draft's, and knows when it was edited."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import published_name, read_options
from deepspec_core.cli.main import main
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.errors import CheckpointError
from deepspec_core.interface.models import Target
from deepspec_core.pipeline.warm_start import Start, start_of, take_vocabulary, take_weights
from deepspec_core.plugins.registry import Registry
from deepspec_core.training.checkpoint import complete, latest, of_step, step_of

PARITY = Path(__file__).parent / "parity"
TRAIN = ["--smoke", "--set", "run.threads=1", "--stages", "train"]
WEIGHTS = "model.safetensors"
STEP_0 = Path("train") / "checkpoints" / "step-000000" / "draft" / WEIGHTS


def _folder(run_file: Path) -> Path:
    return run_file.parent / "runs" / "quickstart-dflash-smoke"


def _set(key: str, value: object) -> list[str]:
    return ["--set", f"{key}={json.dumps(value)}"]


@pytest.fixture
def source(finished: Path, tmp_path: Path) -> Path:
    """The output of another run."""
    shutil.copytree(_folder(finished), tmp_path / "source", ignore=shutil.ignore_patterns("cache", "train"))
    return tmp_path / "source"


@pytest.mark.parametrize("name", ["qwen3-dflash", "qwen3-dspark-vanilla", "qwen3-eagle3", "gemma4-dspark-rnn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_published_weights_are_taken_by_their_names(
    name: str, dtype: torch.dtype, registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="deepspec")
    folder = PARITY / name / "draft"
    stored = {key: value.to(dtype) for key, value in load_file(folder / WEIGHTS).items()}
    algorithm, options, taps = read_options(folder, registry)
    draft: DraftModel = registry.load("draft", algorithm)(options, draft_adapter(folder, registry=registry), taps)
    head = (stored["lm_head.weight"] + 1.0).float()
    draft.adopt(stored["embed_tokens.weight"], head)
    take_weights(draft, Start(folder=folder, named=name, weights=stored))
    names = draft.describe().weight_names
    for own, value in draft.state_dict().items():
        assert torch.equal(value, head if own == "lm_head.weight" else stored[published_name(own, names)].float()), own
    assert f"draft.init: {len(stored) - 2} weights (" in caplog.text
    assert "embed_tokens.weight, lm_head.weight are the target's own" in caplog.text
    assert "draft.init: lm_head.weight of the checkpoint differ from this target's" in caplog.text


def test_a_reduced_vocabulary_is_the_checkpoint_s(target: Target, registry: Registry) -> None:
    spec = registry.get("draft", "dflash")
    build = registry.load("draft", "dflash")
    torch.manual_seed(0)
    draft, other = (build(spec.options(vocab_size=32), target.adapter, (2, 6, 10)) for _ in range(2))
    ids = torch.randperm(target.adapter.architecture.vocab_size)[:32].sort().values
    other.vocabulary.choose(ids)
    head = target.model.head_weight()
    other.adopt(target.model.embedding_weight(), head)
    weights = {("draft_ids" if name == "vocabulary.ids" else name): one for name, one in other.state_dict().items()}
    start = Start(folder=Path("checkpoint"), named="checkpoint", weights=weights)
    assert take_vocabulary(draft, start)["vocabulary"]["tokens"] == 32
    draft.adopt(target.model.embedding_weight(), head)
    assert torch.equal(draft.vocabulary.ids, ids)
    assert torch.equal(draft.lm_head.weight, head[ids])


@pytest.mark.slow
def test_the_run_begins_with_it_and_knows_when_it_was_edited(
    finished_copy: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(finished_copy), *TRAIN, *_set("draft.init", str(source))]
    # So that the checkpoint of step 0 is written, and stays.
    every = [*_set("train.evaluate_every", 9), *_set("train.keep_checkpoints", 9), *_set("train.evaluation.prompts", 1)]
    command += [*every, *_set("train.evaluation.max_new_tokens", 2), *_set("draft.num_anchors", 8)]
    assert main([*command, "--force", "train"]) == 0
    seen = capsys.readouterr()
    assert f"begun with {source}" in seen.out
    assert f"were copied from {source / 'draft'}; embed_tokens.weight, lm_head.weight are the target's own" in seen.err
    begun, trained = load_file(source / "draft" / WEIGHTS), load_file(_folder(finished_copy) / "draft" / WEIGHTS)
    at_start = load_file(_folder(finished_copy) / STEP_0)
    assert at_start.keys() == begun.keys()
    assert all(torch.equal(at_start[name], begun[name]) for name in begun)
    assert not torch.equal(trained["fc.weight"], begun["fc.weight"])
    record = json.loads((_folder(finished_copy) / "train" / "stage.json").read_text())
    assert record["keys"]["draft.init"] == str(source)
    assert "the checkpoint of draft.init" in record["content"]
    # Evaluation does not read the key.
    assert "draft.init" not in json.loads((_folder(finished_copy) / "cache" / "stage.json").read_text())["keys"]

    begun["fc.weight"][0, 0] += 1.0
    save_file(begun, source / "draft" / WEIGHTS)
    assert main(command) == 2
    assert "The checkpoint of draft.init changed after the stage `train`" in capsys.readouterr().err
    # An interrupted run goes on with its own checkpoint, also where the other is gone.
    shutil.rmtree(source)
    folder = _folder(finished_copy) / "train"
    (folder / "stage.json").write_text(json.dumps({**record, "complete": False}))
    for checkpoint in folder.glob("checkpoints/step-*"):
        if checkpoint.name not in ("step-000000", "step-000009"):
            shutil.rmtree(checkpoint)
    assert main(command) == 0
    assert "train: resuming" in capsys.readouterr().out
    again = load_file(_folder(finished_copy) / "draft" / WEIGHTS)
    torch.testing.assert_close(again, trained, rtol=1e-5, atol=1e-6)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_cut, _flip, Path.unlink])
def test_a_resumed_run_reads_its_newest_sound_checkpoint(finished_copy: Path, damage: Callable[[Path], None]) -> None:
    folder = _folder(finished_copy) / "train"
    sound = latest(folder)
    assert sound is not None
    newest = of_step(folder, step_of(sound) + 1)
    shutil.copytree(sound, newest)
    damage(newest / "draft" / WEIGHTS)
    run: Any = SimpleNamespace(
        file=SimpleNamespace(draft=SimpleNamespace(init="gone")), stage_folder=lambda stage: folder
    )
    start = start_of(run)
    assert start is not None
    assert (start.folder, start.named) == (sound / "draft", None)
    # What is damaged is set aside where training resumes, and not before.
    assert newest.is_dir()
    for checkpoint in complete(folder):
        (checkpoint / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="there is no earlier checkpoint to resume from"):
        start_of(run)


@pytest.mark.parametrize(
    ("changes", "found", "expected"),
    [
        (_set("draft.block_size", 4), "block_size = 5", "block_size = 4"),
        (_set("draft.anchor_predicts", False), "sample_from_anchor = True", "sample_from_anchor = False"),
        (_set("target.layers", [1, 4, 6, 8, 10]), "[2, 4, 6, 8, 10]", "[1, 4, 6, 8, 10]"),
        (_set("draft.num_layers", 2), "num_layers = 3", "num_layers = 2"),
        (_set("draft.layer.intermediate_size", 96), "intermediate_size = ", "intermediate_size = 96"),
        (_set("draft.layer.window", 32), "window = none", "window = 32"),
        (_set("draft.vocab_size", 64), "draft_vocab_size = none", "draft_vocab_size = 64"),
    ],
)
def test_another_draft_is_refused_before_the_first_stage(
    run_file: Path, source: Path, capsys: pytest.CaptureFixture[str], changes: list[str], found: str, expected: str
) -> None:
    assert main(["run", str(run_file), "--smoke", *_set("draft.init", str(source)), *changes]) == 2
    message = capsys.readouterr().err
    assert "training cannot start from this checkpoint" in message
    assert "draft.init" in message
    assert found in message
    assert expected in message
    assert "starting" not in message


def test_other_checkpoints_that_are_refused(
    run_file: Path, source: Path, drafts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(init: str) -> str:
        assert main(["run", str(run_file), "--smoke", *_set("draft.init", init)]) == 2
        return capsys.readouterr().err

    message = refused(str(drafts["eagle3"]))
    assert "a draft of type 'eagle3'" in message
    assert "'dflash', as draft.type says" in message
    assert "draft.init" in refused("./nowhere")
    message = refused(str(PARITY / "qwen3-dspark-vanilla" / "draft"))
    assert "a draft of type 'dspark'" in message
    message = refused(str(PARITY / "qwen3-dflash" / "draft"))
    assert "the draft was made for another target" in message
    cut = load_file(source / "draft" / WEIGHTS)
    del cut["fc.weight"]
    save_file(cut, source / "draft" / WEIGHTS)
    assert "missing: fc.weight" in refused(str(source))
    own = _folder(run_file)
    shutil.copytree(source / "draft", own / "draft")
    assert "which this run writes" in refused(str(own))


def test_a_target_with_another_rotary_base_is_warned_of(
    run_file: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((source / "draft" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 2
    (source / "draft" / "config.json").write_text(json.dumps(config))
    assert main(["run", str(run_file), "--smoke", "--dry-run", *_set("draft.init", str(source))]) == 0
    message = capsys.readouterr().err
    assert "draft.init: the checkpoint was made for a target with" in message
    assert "rope_theta" in message


def test_drafts_that_are_not_trained_begin_with_nothing(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = '[run]\nname = "x"\noutput = "out"\nstages = ["evaluate"]\n[target]\nmodel = "builtin:tiny-qwen3"\n'
    text += '[data]\nsources = []\n[draft]\ntype = "small-lm"\nmodel = "builtin:tiny-qwen3"\ninit = "somewhere"\n'
    run_file.write_text(text)
    assert main(["config", "check", str(run_file)]) == 2
    assert "draft.init" in capsys.readouterr().err
