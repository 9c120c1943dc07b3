"""The format `deepspec`: it loads here again, bit for bit, and names its target without a path."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspec_core.checkpoints.export_facts import target_name
from deepspec_core.checkpoints.opening import draft_adapter
from deepspec_core.checkpoints.published import load_draft


@pytest.mark.parametrize(("algorithm", "family"), [("dflash", "gemma3"), ("dspark", "qwen2"), ("eagle3", "qwen3")])
def test_it_loads_again(drafted: Callable[..., Any], tmp_path: Path, algorithm: str, family: str) -> None:
    made = drafted(algorithm, family, layer={"window": 8})
    folder = made.export("deepspec", tmp_path)
    adapter = draft_adapter(folder, registry=made.registry)
    loaded = load_draft(folder, registry=made.registry, adapter=adapter)
    assert loaded.describe().config == {**made.draft.describe().config} | (
        {"target_model_name_or_path": "org/target"} if algorithm == "eagle3" else {}
    )
    assert loaded.describe().window == 8
    mine = made.draft.state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in loaded.state_dict().items())
    assert json.loads((folder / "export.json").read_text())["verified"]["weights"]["tensors"] == len(mine)


def test_a_local_target_is_named_by_its_last_part(drafted: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    target = target_name("models/mine", base=tmp_path)
    made = drafted("eagle3", target=target, target_name=str(tmp_path / "models" / "mine"), num_layers=1)
    for name in ("deepspec", "vllm", "speculators"):
        folder = made.export(name, tmp_path / "out")
        texts = {path.name: path.read_text() for path in folder.iterdir() if path.suffix != ".safetensors"}
        assert not any(str(tmp_path) in text for text in texts.values())
        assert json.loads(texts["export.json"])["target"] == {"name": "mine", "local": True}
        assert "local directory" in texts["README.md"]
    table = json.loads((tmp_path / "out" / "speculators" / "config.json").read_text())
    assert table["speculators_config"]["verifier"]["name_or_path"] == "mine"
