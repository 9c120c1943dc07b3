"""A run file that is right, and how tests load it with changes and read what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepspec_core.config.load import RunFile, load_run_file
from deepspec_core.errors import ConfigError, DeepSpecError
from deepspec_core.plugins.discovery import Plugins

GOOD = """
[run]
name = "a-run"
output = "runs/a-run"
stages = ["train", "evaluate"]

[target]
model = "someone/some-model"
layers = [1, 9]

[data]
sources = [{path = "talk.jsonl", weight = 2}]

[draft]
type = "toy"
"""


class Loader:
    """Writes a run file and loads it."""

    def __init__(self, folder: Path, plugins: Plugins) -> None:
        self.path, self.plugins = folder / "run.toml", plugins

    def __call__(self, text: str = GOOD, *overrides: str) -> RunFile:
        self.path.write_text(text)
        return load_run_file(self.path, overrides=overrides, plugins=self.plugins)

    def problems(self, text: str = GOOD, *overrides: str) -> dict[str, DeepSpecError]:
        """Path -> problem."""
        with pytest.raises(ConfigError) as caught:
            self(text, *overrides)
        found = caught.value.problems
        rendered = str(caught.value)
        assert all(problem.render() in rendered for problem in found)
        by_path = {str(problem.where): problem for problem in found}
        assert len(by_path) == len(found), "two problems at one path"
        return by_path
