"""A draft whose acceptance falls as the context grows: its attention slides, trained, decoded and written so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import load_draft, save_draft
from deepspec_core.cli.main import main
from deepspec_core.contracts.draft import DraftModel
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.decoding.engine import Request, decode
from deepspec_core.errors import CheckpointError
from deepspec_core.layers.options import LayerOptions
from deepspec_core.plugins.registry import Registry
from deepspec_core.targets.opening import open_adapter
from deepspec_dflash.model import DFlashModel

WINDOW = 6
PAIRS = [("dflash", family) for family in ("qwen2", "qwen3", "qwen3_moe", "llama", "mistral", "gemma3")]
PAIRS += [("dspark", "qwen3"), ("dspark", "gemma4"), ("eagle3", "llama"), ("eagle3", "gemma4")]


@pytest.fixture
def windowed(
    tiny_target: Callable[..., Any], tiny_draft: Callable[..., DraftModel], registry: Registry
) -> Callable[..., Any]:
    """windowed(algorithm, family): the tiny target opened for a draft with a window, and such a draft."""

    def make(algorithm: str, family: str) -> tuple[Any, DraftModel]:
        target = tiny_target(family)
        layer = LayerOptions(intermediate_size=48, window=WINDOW)
        target = evolve(target, adapter=open_adapter(target.where, registry=registry, draft_layer=layer))
        return target, tiny_draft(algorithm, target).eval()

    return make


@pytest.mark.parametrize(("algorithm", "family"), PAIRS)
def test_no_output_changes_and_a_checkpoint_keeps_it(
    tmp_path: Path, registry: Registry, windowed: Callable[..., Any], algorithm: str, family: str
) -> None:
    target, draft = windowed(algorithm, family)
    assert draft.describe().window == WINDOW
    requests = [Request(id=str(i), prompt_ids=tuple(3 + (5 * i + 3 * j) % 30 for j in range(3 + 9 * i)), seed=i)
                for i in range(4)]  # fmt: skip

    def outputs(proposer: Any) -> dict[str, Any]:
        found = decode(target.model, proposer, requests, sampling=Sampling(), stop_ids=(1,), max_new_tokens=24,
                       batch_size=3, max_length=96)  # fmt: skip
        return {one.id: one for one in found}

    plain, drafted = outputs(None), outputs(draft.proposer())
    assert all(plain[name].output_ids == drafted[name].output_ids for name in plain)

    save_draft(draft, target.adapter, tmp_path / "draft")
    config = json.loads((tmp_path / "draft" / "config.json").read_text())
    if family in ("gemma3", "gemma4"):
        assert (config["draft_window"], set(config["layer_types"])) == (WINDOW, {"full_attention"})
    else:
        assert (config["sliding_window"], set(config["layer_types"])) == (WINDOW, {"sliding_attention"})
        assert config.get("use_sliding_window", True)
        assert "draft_window" not in config
    adapter = draft_adapter(tmp_path / "draft", registry=registry)
    loaded = load_draft(tmp_path / "draft", registry=registry, adapter=adapter)
    assert loaded.describe().window == WINDOW
    again = outputs(loaded.proposer())
    assert all(again[name].rounds == drafted[name].rounds for name in plain), "the same proposals were accepted"


@pytest.mark.slow
def test_a_run_trains_decodes_and_writes_it(finished_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the answers and the cache of a run without it."""
    command = ["run", str(finished_copy), "--smoke", "--set", "run.threads=1", "--set", "evaluate.temperature=[0.0]"]
    assert main([*command, "--force", "train", "--set", "draft.layer.window=24"]) == 0
    folder = finished_copy.parent / "runs" / "quickstart-dflash-smoke"
    assert json.loads((folder / "draft" / "config.json").read_text())["sliding_window"] == 24
    assert all(not one["mismatches"] for one in json.loads((folder / "metrics.json").read_text())["results"])
    capsys.readouterr()
    assert main(["checkpoint", "show", str(folder / "draft"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["window"] == 24
    assert main([*command, "--set", "draft.layer.window=25"]) == 2
    assert "draft.layer.window" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("window", "says"), [("3", "at least [draft] block_size"), ("0", "draft.layer.window"), ("true", "draft.layer")]
)
def test_what_makes_no_sense_is_refused_at_once(
    run_file: Path, capsys: pytest.CaptureFixture[str], window: str, says: str
) -> None:
    assert main(["run", str(run_file), "--dry-run", "--set", f"draft.layer.window={window}"]) == 2
    assert says in capsys.readouterr().err


def test_a_draft_type_that_does_not_know_windows_is_refused_at_once(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    described = DFlashModel.describe
    monkeypatch.setattr(DFlashModel, "describe", lambda self: evolve(described(self), window=None))
    assert main(["run", str(run_file), "--dry-run", "--set", "draft.layer.window=64"]) == 2
    seen = capsys.readouterr().err
    assert "draft type 'dflash' does not use the window of [draft.layer]" in seen
    assert "deepspec-dflash" in seen


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layer_types": ["sliding_attention", "full_attention"]}, "some of the draft's layers have sliding attention"),
        ({"sliding_window": None}, "sliding_window"),
        ({"sliding_window": True}, "sliding_window"),
        ({"sliding_window": 2}, "smaller than what it proposes"),
        ({"layer_types": ["full_attention"] * 2, "draft_window": -1}, "draft_window"),
    ],
)
def test_a_checkpoint_that_says_no_clear_window_is_refused(
    tmp_path: Path, registry: Registry, windowed: Callable[..., Any], changes: dict[str, Any], says: str
) -> None:
    target, draft = windowed("dflash", "qwen3")
    save_draft(draft, target.adapter, tmp_path / "draft")
    path = tmp_path / "draft" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError) as refused:
        load_draft(tmp_path / "draft", registry=registry, adapter=draft_adapter(tmp_path / "draft", registry=registry))
    assert says in str(refused.value)


def test_a_draft_type_that_reads_none_is_refused(
    tmp_path: Path, registry: Registry, windowed: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, draft = windowed("dflash", "qwen3")
    save_draft(draft, target.adapter, tmp_path / "draft")
    described = DFlashModel.describe
    monkeypatch.setattr(DFlashModel, "describe", lambda self: evolve(described(self), window=None))
    with pytest.raises(CheckpointError, match="'dflash' does not have the attention window") as refused:
        load_draft(tmp_path / "draft", registry=registry, adapter=draft_adapter(tmp_path / "draft", registry=registry))
    assert (refused.value.found, refused.value.expected) == (f"{WINDOW} positions", "the whole context")
