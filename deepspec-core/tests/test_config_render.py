"""What `render` writes loads to the same run file, and looks the same when rendered again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli

from deepspec_core.config.load import load_run_file
from deepspec_core.config.render import render
from deepspec_core.plugins.discovery import load_plugins

MINIMAL = """
[run]
name = "a"
output = "out"
stages = ["train"]
[target]
model = "m"
layers = [1]
[data]
sources = [{path = "x"}]
[draft]
type = "toy"
"""
FULL = """
required_plugins = ["fake-toy>=1"]
[run]
name = "full"
output = 'C:\\runs "quoted" \u00fc'
stages = ["cache", "train", "evaluate"]
threads = 2
[target]
model = "m"
layers = [-1, 3]
dtype = "float32"
[data]
sources = [{path = "x", limit = 3}, {path = "y", weight = 0.25, split = "train"}]
system_prompt = "Be\\nbrief."
[features]
mode = "cached"
[draft]
type = "toy"
mask_token_id = 5
head = {rank = 2}
widths = [1, 2, 3]
layer = {num_heads = 2, num_kv_heads = 1}
[loss]
terms = {tv = 0.9, ce = 1e-7}
weighting = {type = "decay", gamma = 1e20}
[train]
lr = 3e-05
[evaluate]
temperature = [0.0, 1.0]
"""


@pytest.mark.parametrize("text", [MINIMAL, FULL])
def test_rendering_round_trips(tmp_path: Path, toy: Any, text: str) -> None:
    plugins = load_plugins()
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    file = load_run_file(tmp_path / "run.toml", plugins=plugins)
    rendered = render(file)
    (tmp_path / "again.toml").write_text(rendered, encoding="utf-8")
    again = load_run_file(tmp_path / "again.toml", plugins=plugins)
    assert again == file
    assert render(again) == rendered


def test_every_effective_value_is_written_in_the_order_of_the_schema(tmp_path: Path, toy: Any) -> None:
    (tmp_path / "run.toml").write_text(MINIMAL)
    file = load_run_file(tmp_path / "run.toml", overrides=["train.lr=1"], plugins=load_plugins())
    tables = tomli.loads(render(file))
    assert list(tables) == [
        "required_plugins",
        "run",
        "target",
        "data",
        "draft",
        "regenerate",
        "features",
        "cache",
        "loss",
        "train",
        "evaluate",
        "export",
    ]
    assert tables["draft"] == {"type": "toy", "block_size": 7, "num_layers": 2, "dropout": 0.0, "widths": []}
    assert tables["loss"] == {"terms": {"ce": 1.0}, "weighting": {"type": "uniform"}, "kernels": "auto"}
    assert tables["train"]["lr"] == 1.0
    assert tables["train"]["epochs"] == file.train.epochs
    assert "max_steps" not in tables["train"]
