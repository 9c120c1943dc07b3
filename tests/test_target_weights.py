"""A draft that asks the target's checkpoint for weights by the beginning of their names, and begins with them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from last_hidden_draft import PLUGIN
from plugin_on_path import install
from safetensors.torch import load_file, save_file

import deepspec_targets
from deepspec_core.cli.main import main
from deepspec_core.errors import TargetError
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.targets import opening
from deepspec_core.targets.extra_weights import find_weights, read_weights
from deepspec_core.targets.opening import load_target, open_adapter

SIZE, BLOCK = 128, 3
RUN = """
[run]
name = "mtp"
output = "run"
stages = ["train"]
threads = 1

[target]
model = "target"
layers = []

[data]
sources = [{path = "rows.jsonl"}]
min_supervised_tokens = 2
max_length = 64

[features]
mode = "online"

[draft]
type = "last-hidden"
from_target = true

[train]
lr = 1e-12
global_batch_size = 2
max_steps = 1
precision = "float32"
"""


def own_layer() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"down.weight": (SIZE, 2 * SIZE), "down.bias": (SIZE,), "up.weight": (BLOCK * SIZE, SIZE)}
    return {f"mtp.{name}": torch.randn(shape, generator=draw).bfloat16() for name, shape in shapes.items()}


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on the built-in target with a prediction layer of its own, in a second shard."""
    install(tmp_path / "site", monkeypatch, "fake-last-hidden", PLUGIN)
    target = tmp_path / "target"
    shutil.copytree(Path(deepspec_targets.__file__).parent / "builtin" / "tiny-qwen3", target)
    body = load_file(target / "model.safetensors")
    (target / "model.safetensors").rename(target / "body.safetensors")
    save_file(own_layer(), target / "mtp.safetensors", {"format": "pt"})
    shards = dict.fromkeys(body, "body.safetensors") | dict.fromkeys(own_layer(), "mtp.safetensors")
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    messages = [{"role": "user", "content": "What is 2 + 3?"}, {"role": "assistant", "content": "2 + 3 = 5, friend."}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for _ in range(8)))
    (tmp_path / "train.toml").write_text(RUN)
    return tmp_path / "train.toml"


def test_training_begins_with_the_targets_own_layer(run_file: Path) -> None:
    assert main(["run", str(run_file)]) == 0
    trained = load_file(run_file.parent / "run" / "draft" / "model.safetensors")
    for name, weight in own_layer().items():
        torch.testing.assert_close(trained[name.removeprefix("mtp.")], weight.float(), rtol=0, atol=1e-6)


def refused(run_file: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said before the first stage."""
    assert main(["run", str(run_file), "--dry-run"]) == 2
    return capsys.readouterr().err


def test_what_is_missing_is_said_before_the_first_stage(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = run_file.parent / "target"
    index = json.loads((target / "model.safetensors.index.json").read_text())
    renamed = {name.replace("mtp.", "mtp_layers."): file for name, file in index["weight_map"].items()}
    (target / "model.safetensors.index.json").write_text(json.dumps({**index, "weight_map": renamed}))
    said = refused(run_file, capsys)
    for part in (
        "the target lacks weights that the draft needs",
        "no name that begins with 'mtp.'",
        "mtp_layers...",
    ):
        assert part in said
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"mtp.down.bias": torch.zeros(SIZE)}, target / "mtp.safetensors")
    said = refused(run_file, capsys)
    assert "lacks weights that the index places there" in said
    assert "mtp.down.weight" in said


def test_weights_of_another_shape_are_said_before_the_first_stage(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = own_layer() | {"mtp.down.weight": torch.zeros(SIZE, SIZE)}
    save_file(other, run_file.parent / "target" / "mtp.safetensors")
    said = refused(run_file, capsys)
    assert "fails to adopt weights of the target" in said
    assert "mtp.down.weight [128, 128]" in said


def test_of_a_target_on_the_hub_the_index_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    index = {"weight_map": {"model.norm.weight": "a.safetensors", "mtp.down.weight": "b.safetensors"}}
    monkeypatch.setattr(opening, "_read_json", lambda where, name, revision: index)
    assert opening.extra_weights_before("some/model", ("mtp.",)) is None, "shapes are not known"
    with pytest.raises(TargetError, match=r"no name that begins with 'mtp_layers\.'; there are mtp"):
        opening.extra_weights_before("some/model", ("mtp_layers.",))


def test_one_file_serves_as_well_and_the_target_loads_without_them(tiny_target: Any, tmp_path: Path) -> None:
    tiny = tiny_target("qwen3")
    where = tmp_path / "target"
    shutil.copytree(tiny.where, where)
    extra = {"mtp.norm.weight": torch.ones(4, dtype=torch.bfloat16), "mtp.ids": torch.arange(3)}
    save_file({**load_file(where / "model.safetensors"), **extra}, where / "model.safetensors", {"format": "pt"})
    found = find_weights(where, ("mtp.",))
    assert {name: (one.shape, one.dtype) for name, one in found.items()} == {
        name: (tuple(value.shape), value.dtype) for name, value in extra.items()
    }
    assert all(torch.equal(value, extra[name]) for name, value in read_weights(found).items())
    registry = load_plugins().registry
    model = load_target(open_adapter(where, registry=registry), where, dtype=torch.float32, device="cpu")
    assert torch.equal(model.head_weight(), tiny.model.head_weight())
    with pytest.raises(TargetError, match=r"there are mtp\.norm"):
        find_weights(where, ("mpt.norms",))
