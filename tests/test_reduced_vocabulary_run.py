"""A run whose draft knows some of the target's tokens, from its data to its report: counted, said, kept and resumed."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import deepspec_core
from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.cli.main import main
from deepspec_core.errors import CheckpointError, TrainingError
from deepspec_core.interface.models import Target
from deepspec_core.pipeline import training

SIZE = 64
SMALL = ("--set", "run.threads=1", "--set", "evaluate.max_new_tokens=12", "--set", "evaluate.temperature=[0.0]")


@pytest.fixture(scope="module")
def cache(finished: Path) -> Path:
    return finished.parent / "runs" / "quickstart-dflash-smoke" / "cache"


def written(folder: Path, cache: Path, *changes: tuple[str, str]) -> Path:
    """A run file of an Eagle3 draft that trains from a finished cache."""
    text = (Path(__file__).parents[1] / "examples" / "quickstart" / "eagle3.toml").read_text()
    for old, new in (
        ("../../runs/", "runs/"),
        ('stages = ["regenerate", "cache", "train", "evaluate"]', 'stages = ["train", "evaluate"]'),
        ('format = "hdf5"\n', f'format = "hdf5"\npath = "{cache}"\n'),
        ("ttt_length = 5", f"vocab_size = {SIZE}\nttt_length = 2"),
        ("checkpoint_every = 200", "checkpoint_every = 2"),
        *changes,
    ):
        assert old in text, old
        text = text.replace(old, new)
    folder.mkdir(exist_ok=True)
    (folder / "eagle3.toml").write_text(text)
    return folder / "eagle3.toml"


def results(run_file: Path) -> Path:
    return run_file.parent / "runs" / "quickstart-eagle3-smoke"


@pytest.fixture(scope="module")
def reduced(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of a finished smoke run."""
    path = written(tmp_path_factory.mktemp("reduced"), cache)
    assert main(["run", str(path), "--smoke", *SMALL]) == 0
    return path


def test_the_tokens_are_those_that_answers_have_most_of(reduced: Path, cache: Path, target: Target) -> None:
    reader = HDF5Format().open(cache, None)
    counted: Counter[int] = Counter()
    for index in range(len(reader)):
        sample = reader[index]
        counted.update(sample.input_ids[sample.loss_mask].tolist())
    stop = set(target.architecture.stop_token_ids)
    others = sorted((token for token in range(target.architecture.vocab_size) if token not in stop),
                    key=lambda token: (-counted[token], token))  # fmt: skip
    expected = sorted(stop | set(others[: SIZE - len(stop)]))
    weights = load_file(results(reduced) / "draft" / "model.safetensors")
    assert weights["draft_ids"].tolist() == expected
    assert torch.equal(weights["lm_head.weight"], target.model.head_weight()[expected])
    assert json.loads((results(reduced) / "draft" / "config.json").read_text())["draft_vocab_size"] == SIZE
    summary = json.loads((results(reduced) / "train" / "stage.json").read_text())["summary"]["vocabulary"]
    share = sum(counted[token] for token in expected) / counted.total()
    assert 0.5 < share < 1
    assert summary == {"tokens": SIZE, "covered": round(share, 6), "supervised": counted.total()}


def test_a_run_says_what_it_leaves_out_and_changes_no_output(reduced: Path) -> None:
    report = json.loads((results(reduced) / "metrics.json").read_text())
    assert report["results"][0]["mismatches"] == []
    assert all(result["acceptance_length"] >= 1 for result in report["results"])
    lines = (results(reduced) / "train" / "metrics.jsonl").read_text().splitlines()
    assert 0 < json.loads(lines[-1])["outside_vocabulary"] < 1


@pytest.mark.slow
def test_a_resumed_run_comes_to_the_same_draft(
    reduced: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, saved = written(tmp_path / "again", cache), []
    save: Callable[..., None] = training.save_draft

    def save_once(*arguments: Any) -> None:
        saved.append(arguments)
        if len(saved) > 1:
            raise TrainingError("the power went out")
        save(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(training, "save_draft", save_once)
        assert main(["run", str(path), "--smoke", "--stages", "train", *SMALL]) == 2
    assert main(["run", str(path), "--smoke", "--stages", "train", *SMALL]) == 0
    assert f"the draft's vocabulary: {SIZE} of 1,024 tokens" in capsys.readouterr().err
    record = json.loads((results(path) / "train" / "stage.json").read_text())
    assert record["summary"]["resumed_from"] == 2
    one, other = (load_file(results(file) / "draft" / "model.safetensors") for file in (reduced, path))
    assert torch.equal(one.pop("draft_ids"), other.pop("draft_ids"))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_size_that_cannot_be_is_refused_before_the_first_stage(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: int
) -> None:
    path = written(tmp_path, cache, (f"vocab_size = {SIZE}", f"vocab_size = {size}"))
    assert main(["run", str(path), "--smoke", *SMALL]) == 2
    seen = capsys.readouterr()
    assert "a draft cannot have a vocabulary of this size" in seen.err
    assert "starting" not in seen.out


def test_an_estimate_knows_the_smaller_head(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, found = written(tmp_path, cache), []
    for size in (SIZE, 1024):
        assert main(["estimate", str(path), "--json", "--set", f"draft.vocab_size={size}"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    small, large = found
    assert small["flops_per_step"]["rows"] < large["flops_per_step"]["rows"]


def test_ids_that_are_no_tokens_are_refused(reduced: Path, target: Target, tmp_path: Path) -> None:
    draft = results(reduced) / "draft"
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((draft / name).read_bytes())
    assert deepspec_core.load_draft(tmp_path, target).model.vocabulary is not None
    weights = load_file(tmp_path / "model.safetensors")
    weights["draft_ids"][-1] = target.architecture.vocab_size
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="the draft's vocabulary does not fit this target"):
        deepspec_core.load_draft(tmp_path, target)
