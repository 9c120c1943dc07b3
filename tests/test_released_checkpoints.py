"""The twelve released checkpoints by directory and by Hub id, and what `deepspec checkpoint show` says of them.

No network: a stubbed Hub downloader hands out recorded layouts. They are what the published trainer saved for
tiny models of the same families, so names, config keys and class names are the released ones, and sizes are not.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from deepspec_core.checkpoints.opening import draft_adapter, resolve_draft
from deepspec_core.checkpoints.published import load_draft
from deepspec_core.cli.main import main
from deepspec_core.errors import CheckpointError
from deepspec_core.plugins.registry import Registry

PARITY = Path(__file__).parent / "parity"
TARGETS = ("qwen3_4b", "qwen3_8b", "qwen3_14b", "gemma4_12b")
CLASSES = {"eagle3": "Eagle3Model", "dflash": "DSparkModel", "dspark": "DSparkModel"}
RELEASED = [
    f"deepseek-ai/{algorithm}_{target}_{'ttt7' if algorithm == 'eagle3' else 'block7'}"
    for algorithm in CLASSES
    for target in TARGETS
]


def recorded(name: str) -> Path:
    """The recorded layout of a released checkpoint."""
    algorithm, family, *_ = name.removeprefix("deepseek-ai/").split("_")
    return PARITY / f"{family}-{algorithm}{'-vanilla' if algorithm == 'dspark' else ''}" / "draft"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """A Hub with the released names, as its downloader's cache would have them; every request is kept."""
    requests: list[dict[str, Any]] = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        requests.append({"repo_id": repo_id, **options})
        if repo_id not in RELEASED:
            raise OSError(f"404 Client Error: Repository Not Found for {repo_id}")
        snapshot = tmp_path / repo_id.replace("/", "--")
        if not snapshot.exists():
            shutil.copytree(recorded(repo_id), snapshot)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return requests


def check(folder: Path, name: str, registry: Registry) -> None:
    algorithm, family, *_ = name.removeprefix("deepseek-ai/").split("_")
    draft = load_draft(folder, registry=registry, adapter=draft_adapter(folder, registry=registry))
    said = draft.describe()
    assert said.algorithm == algorithm
    assert said.class_name == family.capitalize() + CLASSES[algorithm]
    assert said.taps == (0, 2, 3, 5, 6)
    assert said.config["num_target_layers"] == 8
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(draft.lm_head.weight, weights["lm_head.weight"])
    assert not draft.lm_head.weight.requires_grad


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_checkpoint_loads_by_hub_id(name: str, hub: list[dict[str, Any]], registry: Registry) -> None:
    check(resolve_draft(name, base=Path()), name, registry)
    assert [request["repo_id"] for request in hub] == [name]
    assert hub[0]["allow_patterns"] == ["*.json", "*.safetensors"], "no pickles, no code"


@pytest.mark.parametrize("folder", sorted(PARITY.glob("*/draft")), ids=lambda folder: folder.parent.name)
def test_every_recorded_checkpoint_loads_by_directory_and_is_whole(
    folder: Path, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resolve_draft(f"{folder.parent.name}/draft", base=PARITY) == folder.resolve()
    load_draft(folder, registry=registry, adapter=draft_adapter(folder, registry=registry))
    assert main(["checkpoint", "show", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "weights     complete" in shown
    assert "taps        0 2 3 5 6" in shown


def test_show_says_what_a_checkpoint_is(
    hub: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], registry: Registry
) -> None:
    assert main(["checkpoint", "show", "deepseek-ai/dspark_gemma4_12b_block7", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["algorithm"], facts["class"], facts["adapter"]) == ("dspark", "Gemma4DSparkModel", "gemma4")
    assert facts["target"] == {"hidden_size": 32, "vocab_size": 64, "num_layers": 8}
    assert facts["options"]["block_size"] == facts["max_tokens"] == 4
    assert facts["options"]["markov"] == {"rank": 6, "head": "vanilla"}
    assert facts["parts"]["markov_head"] == 2 * 64 * 6
    assert facts["parts"]["confidence_head"] == 32 + 6 + 1
    folder = recorded("deepseek-ai/dspark_gemma4_12b_block7")
    draft = load_draft(folder, registry=registry, adapter=draft_adapter(folder, registry=registry))
    sizes = facts["parameters"]
    assert sizes["frozen"] == 2 * 64 * 32
    assert (
        sizes["trained"] + sizes["frozen"] == sum(p.numel() for p in draft.parameters()) == sum(facts["parts"].values())
    )
    assert set(facts["weights"]) > {"missing", "unexpected", "of_another_shape", "not_floating_point"}
    assert not any(facts["weights"].values())


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(PARITY / "qwen3-dspark-rnn" / "draft", tmp_path / "draft"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_weights_that_do_not_fit_are_all_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["fc.weight"]
    weights |= {"extra.weight": torch.ones(1), "norm.weight": torch.ones(3)}
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert main(["checkpoint", "show", str(copy)]) == 2
    shown = capsys.readouterr().out
    assert "missing           fc.weight" in shown
    assert "unexpected        extra.weight" in shown
    assert "of another shape  norm.weight [3], expected [32]" in shown
    assert main(["checkpoint", "show", str(copy), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["weights"]["missing"] == ["fc.weight"]


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda copy: edit_config(copy, architectures=["LlamaForCausalLM"]), ["LlamaForCausalLM", "dflash, dspark"]),
        (lambda copy: edit_config(copy, model_type="qwen33"), ["qwen33", "qwen3", "config.json"]),
        (lambda copy: edit_config(copy, model_type=None), ["names no model_type"]),
        (lambda copy: edit_config(copy, hidden_size="wide"), ["config.json"]),
        (lambda copy: edit_config(copy, block_size=None), ["'block_size'"]),
        (lambda copy: (copy / "config.json").unlink(), ["no draft checkpoint in this directory"]),
        (lambda copy: (copy / "model.safetensors").unlink(), ["has no weights"]),
        (lambda copy: (copy / "model.safetensors").write_bytes(b"\x00" * 64), ["weights cannot be read"]),
    ],
)
def test_what_cannot_be_shown_is_explained(
    copy: Path, damage: Damage, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copy)
    assert main(["checkpoint", "show", str(copy)]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in (*parts, str(copy)))


def test_an_algorithm_that_is_not_installed_is_missed_by_name(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "show", str(copy), "--no-plugin", "deepspec-dspark"]) == 2
    message = capsys.readouterr().err
    assert "deepspec-dspark" in message
    assert "Qwen3DSparkModel" in message
    assert "one of dflash, eagle3" in message


def test_names_that_lead_nowhere(hub: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the Hub does not give this repository"):
        resolve_draft("deepseek-ai/no-such-draft", base=tmp_path)
    with pytest.raises(CheckpointError, match="no draft checkpoint in this directory"):
        resolve_draft("./no-such-draft", base=tmp_path)
    assert len(hub) == 1, "a path is no Hub id"


def test_a_folder_wins_over_the_hub(hub: list[dict[str, Any]], tmp_path: Path) -> None:
    shutil.copytree(recorded(RELEASED[0]), tmp_path / RELEASED[0])
    assert resolve_draft(RELEASED[0], base=tmp_path) == (tmp_path / RELEASED[0]).resolve()
    assert hub == []
