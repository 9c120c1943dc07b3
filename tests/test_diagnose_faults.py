"""`deepspec diagnose` names each fault that is planted on purpose, and accuses no healthy run."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepspec_core.cli.main import main
from deepspec_core.config.load import load_run_file
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.proposer import Proposal
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.features.capture import capture
from deepspec_core.pipeline.run import Run
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.targets.opening import fingerprint, resolve_model
from deepspec_dflash.proposer import DFlashProposer

pytestmark = pytest.mark.slow

RUN_FILE = """
[run]
name = "sums"
output = "runs/sums"
stages = ["regenerate", "cache", "train"]
threads = 1
[target]
model = "builtin:tiny-qwen3"
layers = [2, 6, 9]
dtype = "float32"
[data]
sources = [{path = "sums.jsonl"}]
max_length = 96
held_out = 0.2
[regenerate]
max_tokens = 64
temperature = 1.0
top_p = 1.0
top_k = 0
batch_size = 64
[features]
mode = "cached"
[draft]
type = "dflash"
block_size = 4
num_layers = 1
num_anchors = 24
[train]
lr = 8e-3
global_batch_size = 8
micro_batch_size = 8
epochs = 20
log_every = 10
precision = "float32"
[evaluate]
tasks = ["held-out"]
temperature = 0.0
"""
SMALL = ["--samples", "24", "--prompts", "10", "--rounds", "16", "--max-new-tokens", "56"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of a draft that learned to foretell sums, trained for some seconds."""
    return run_of_sums(tmp_path_factory.mktemp("sums"), RUN_FILE, 130)


def run_of_sums(folder: Path, text: str, questions: int) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    asked = [f"What is {11 + 7 * i % 87} + {12 + 11 * i % 83}?" for i in range(questions)]
    rows = (json.dumps({"turns": [question]}) for question in dict.fromkeys(asked))
    (folder / "sums.jsonl").write_text("\n".join(rows) + "\n")
    assert main(["run", str(path)]) == 0
    return path


@pytest.fixture
def run_file(trained: Path, tmp_path: Path) -> Path:
    """The same to change."""
    shutil.copytree(trained.parent, tmp_path / "sums")
    return tmp_path / "sums" / trained.name


def diagnosis(path: Path, *more: str) -> dict[str, Any]:
    assert main(["diagnose", str(path), *SMALL, *more]) == 0
    found: dict[str, Any] = json.loads((path.parent / "runs" / "sums" / "diagnosis.json").read_text())
    return found


def edit_config(path: Path, **changes: Any) -> None:
    config = path.parent / "runs" / "sums" / "draft" / "config.json"
    whole = {**json.loads(config.read_text()), **changes}
    config.unlink()  # the training checkpoint has the same file
    config.write_text(json.dumps(whole))


def edit_weights(folder: Path, change: Callable[[str, Tensor], Tensor]) -> None:
    weights = {
        name: change(name, tensor).contiguous() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def train_on(path: Path, change: Callable[[Run, Sequence[Sample]], Iterator[Sample]]) -> None:
    """Train again on a cache whose features were made otherwise, under the same header."""
    run = Run(file=load_run_file(path, plugins=(plugins := load_plugins())), path=path, plugins=plugins)
    folder = run.stage_folder("cache")
    reader = run.cache.format.open(folder, None)
    samples = [reader[index] for index in range(len(reader))]
    record = (folder / "stage.json").read_text()
    shutil.rmtree(folder)
    writer = run.cache.format.create(folder, reader.header)
    for sample in change(run, samples):
        writer.write(sample)
    writer.finish()
    (folder / "stage.json").write_text(record)
    assert main(["run", str(path), "--force", "train"]) == 0


def test_a_healthy_run_is_not_accused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = diagnosis(trained)
    assert found["first_drop"] is None, found["verdict"]
    assert found["findings"] == []
    assert found["verdict"][0].startswith("Nothing found")
    accepted = {stage["name"]: stage["accepted"] for stage in found["stages"]}
    assert accepted["replayed"] > 0.8, "the draft learned something that can be lost"
    # The training pass and the engine have the very same rounds.
    engine = found["stages"][-1]
    assert engine["name"] == "engine"
    assert engine["difference"]["earlier"] == engine["difference"]["later"]
    assert "Nothing found" in capsys.readouterr().out


def test_layers_of_the_cache_that_are_numbered_one_too_low(run_file: Path) -> None:
    def shifted(run: Run, samples: Sequence[Sample]) -> Iterator[Sample]:
        bare = [evolve(sample, features=None) for sample in samples]
        return capture(bare, run.target.model, [3, 7, 10], batch_size=16)

    train_on(run_file, shifted)
    found = diagnosis(run_file)
    assert found["causes"] == ["layer numbering"], found["verdict"]
    # Neighbouring layers are alike: what it costs may stay within the tolerance.
    assert found["first_drop"] in (None, "live", "held-out")
    assert "the stored tap 2 is the target's layer 3" in found["verdict"][1]


def test_features_of_another_target(run_file: Path) -> None:
    def mixed(run: Run, samples: Sequence[Sample]) -> Iterator[Sample]:
        for sample in samples:
            assert sample.features is not None
            # Every channel is another's: as good to learn from as the right ones.
            features = TargetFeatures(hidden=sample.features.hidden.flip(-1), last_hidden=sample.features.last_hidden)
            yield evolve(sample, features=features)

    train_on(run_file, mixed)
    found = diagnosis(run_file)
    assert found["causes"] == ["features"], found["verdict"]
    assert found["first_drop"] == "live"


def test_a_draft_that_is_fitted_to_its_own_texts(tmp_path: Path) -> None:
    # A dozen texts, again and again, and a dozen held out.
    few = RUN_FILE.replace("held_out = 0.2", "held_out = 0.5").replace("epochs = 20", "epochs = 150")
    path = run_of_sums(tmp_path, few, 24)
    found = diagnosis(path)
    assert found["first_drop"] == "held-out", found["verdict"]
    assert found["causes"] == [], "every part fits"
    assert "the draft knows its own samples better" in " ".join(found["verdict"])
    accepted = {stage["name"]: stage["accepted"] for stage in found["stages"]}
    assert accepted["replayed"] > 2 * accepted["held-out"]


def test_another_chat_template_at_evaluation(run_file: Path) -> None:
    (run_file.parent / "other.jinja").write_text("{{ '<|im_start|>system\nAnswer in verse.<|im_end|>\n' }}" + TEMPLATE)
    found = diagnosis(run_file, "--set", "target.chat_template=other.jinja")
    assert found["causes"] == ["prompts: template"], found["verdict"]
    assert "system" in " ".join(found["verdict"])


def test_a_first_token_that_comes_twice(run_file: Path) -> None:
    (run_file.parent / "twice.jinja").write_text("{{ '<|im_start|>' }}" + TEMPLATE)
    found = diagnosis(run_file, "--set", "target.chat_template=twice.jinja")
    assert found["causes"] == ["prompts: tokens at the beginning"], found["verdict"]


def test_a_thinking_mode_that_is_not_that_of_training(run_file: Path) -> None:
    thinks = "assistant\\n' }}{% if enable_thinking is defined and enable_thinking %}{{ '<think>\\n' }}{% endif %}"
    (run_file.parent / "modes.jinja").write_text(TEMPLATE.replace("assistant\\n' }}", thinks))
    found = diagnosis(run_file, "--set", "target.chat_template=modes.jinja", "--set", "regenerate.thinking=true")
    assert found["causes"] == ["prompts: thinking mode"], found["verdict"]


def test_another_rotary_base_in_the_drafts_config(run_file: Path) -> None:
    config = json.loads((run_file.parent / "runs" / "sums" / "draft" / "config.json").read_text())
    edit_config(run_file, rope_parameters={**config["rope_parameters"], "rope_theta": 20.0})
    found = diagnosis(run_file)
    assert "rotary" in found["causes"], found["verdict"]
    assert found["first_drop"] in ("replayed", None)
    assert "rope_theta = 20.0" in " ".join(found["verdict"])


def test_an_anchor_slot_that_predicts_only_by_the_config(run_file: Path) -> None:
    config = json.loads((run_file.parent / "runs" / "sums" / "draft" / "config.json").read_text())
    edit_config(run_file, sample_from_anchor=not config["sample_from_anchor"])
    found = diagnosis(run_file)
    assert found["first_drop"] == "replayed", found["verdict"]
    assert "anchor slot" in found["causes"]


def test_a_proposer_that_reads_another_slot(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = DFlashProposer.tokens

    def late(self: DFlashProposer, hidden_BKH: Tensor, *more: Any) -> Proposal:
        return own(self, torch.cat([hidden_BKH[:, 1:], hidden_BKH[:, -1:]], 1), *more)

    monkeypatch.setattr(DFlashProposer, "tokens", late)
    found = diagnosis(trained)
    assert found["causes"] == ["anchor slot"], found["verdict"]
    assert found["first_drop"] == "engine"


def test_a_proposer_whose_positions_are_off_by_one(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = DFlashProposer.propose

    def late(self: DFlashProposer, *arguments: Any) -> Proposal:
        whole = self.model

        class Late:
            """The draft, with its blocks one position further."""

            def __getattr__(self, name: str) -> Any:
                return getattr(whole, name)

            def run_blocks(self, last_B: Tensor, anchors_B: Tensor, *more: Any) -> Tensor:
                return whole.run_blocks(last_B, anchors_B + 1, *more)

        self.model = Late()  # type: ignore[assignment]
        try:
            return own(self, *arguments)
        finally:
            self.model = whole

    monkeypatch.setattr(DFlashProposer, "propose", late)
    found = diagnosis(trained)
    assert found["causes"] == ["positions"], found["verdict"]
    assert "1 too high" in " ".join(found["verdict"])


def test_a_proposer_that_forgets_what_was_accepted(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = DFlashProposer.accept

    def forgetful(self: DFlashProposer, slots: Tensor, ids: Tensor, committed: Tensor, features: Tensor) -> None:
        own(self, slots, ids, committed, torch.zeros_like(features))

    monkeypatch.setattr(DFlashProposer, "accept", forgetful)
    found = diagnosis(trained)
    assert found["causes"] == ["state between rounds"], found["verdict"]


def test_a_number_format_that_the_draft_leaves(run_file: Path) -> None:
    draft = run_file.parent / "runs" / "sums" / "draft"
    # What comes after it is normed, so in float32 nothing changes.
    edit_weights(draft, lambda name, weight: weight * 3e4 if name.endswith("fc.weight") else weight)
    record = run_file.parent / "runs" / "sums" / "train" / "stage.json"
    stage = json.loads(record.read_text())
    stage["made"] = {name: fingerprint(draft) for name in stage["made"]}
    record.write_text(json.dumps(stage))
    found = diagnosis(run_file, "--set", "target.dtype=float16")
    assert found["first_drop"] == "precision", found["verdict"]
    assert found["causes"] == ["number format"]


def test_weights_that_are_not_those_of_training(run_file: Path) -> None:
    draft = run_file.parent / "runs" / "sums" / "draft"
    edit_weights(draft, lambda name, weight: torch.randn_like(weight) if "layers.0.mlp" in name else weight)
    found = diagnosis(run_file)
    assert found["first_drop"] == "replayed", found["verdict"]
    assert found["causes"] == ["weights of the draft"]
    assert "layers.0.mlp" in " ".join(found["verdict"])


def test_a_target_that_was_tuned_since(run_file: Path) -> None:
    tuned = run_file.parent / "tuned"
    shutil.copytree(resolve_model("builtin:tiny-qwen3", base=Path(), registry=load_plugins().registry), tuned)
    torch.manual_seed(0)
    edit_weights(
        # Less, such as 0.3, may cost no more than the tolerance.
        tuned,
        lambda _, weight: weight + 0.6 * weight.std() * torch.randn_like(weight) if weight.dim() > 1 else weight,
    )
    found = diagnosis(run_file, "--set", "target.model=tuned")
    assert "target" in found["causes"], found["verdict"]
    assert found["first_drop"] in ("live", "held-out", "prompts")
