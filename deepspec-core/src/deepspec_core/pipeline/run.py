"""One run: its file, its folder, and the target, data and cache that its stages share.

Knows where everything of a run lies and how its parts belong together; each part knows its own section of the run file
(run_target.py, run_data.py, run_cache.py). Nothing heavy is imported before a part is asked for something.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import define

from deepspec_core.config.schema import RunFile
from deepspec_core.errors import StageError
from deepspec_core.pipeline.run_data import RunData
from deepspec_core.pipeline.run_target import RunTarget
from deepspec_core.plugins.discovery import Plugins

if TYPE_CHECKING:
    from deepspec_core.pipeline.run_cache import RunCache


@define(slots=False)
class Run:
    """A run file in effect. Relative paths of the file start at the folder of `path`."""

    file: RunFile
    path: Path
    plugins: Plugins

    @property
    def base(self) -> Path:
        """What relative paths of the run file are relative to."""
        return self.path.resolve().parent

    @property
    def folder(self) -> Path:
        """Where results go."""
        return (self.base / self.file.run.output).resolve()

    def stage_folder(self, stage: str) -> Path:
        """A stage's own folder; the cache's may be elsewhere."""
        if stage == "cache" and self.file.cache.path is not None:
            return self.base / self.file.cache.path
        return self.folder / stage

    @cached_property
    def target(self) -> RunTarget:
        """The target: where it is, its adapter, tokenizer and weights."""
        return RunTarget(
            options=self.file.target,
            draft_layer=self.file.draft.layer,
            thinking=self.file.regenerate.thinking,
            base=self.base,
            named_in=self.path,
            registry=self.plugins.registry,
        )

    @cached_property
    def data(self) -> RunData:
        """The conversations."""
        regenerates = "regenerate" in self.file.run.stages
        return RunData(
            options=self.file.data,
            seed=self.file.run.seed,
            base=self.base,
            named_in=self.path,
            regenerated=self.stage_folder("regenerate") / "conversations.jsonl" if regenerates else None,
            target=self.target,
            registry=self.plugins.registry,
        )

    @cached_property
    def cache(self) -> RunCache:
        """The feature cache."""
        from deepspec_core.pipeline.run_cache import RunCache

        return RunCache(
            options=self.file.cache,
            folder=self.stage_folder("cache"),
            made_here="cache" in self.file.run.stages,
            target=self.target,
            data=self.data,
            registry=self.plugins.registry,
            plugin_versions=self.plugins.versions(),
        )

    def save_config(self) -> None:
        """Write the effective run file beside the results."""
        from deepspec_core.config.render import render

        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.toml").write_text(render(self.file), encoding="utf-8")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run's folder for this process; StageError where another one works in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StageError(
                    "Another process is working on this run",
                    where=self.folder,
                    fix="Wait for it, stop it, or give this run another run.output.",
                ) from error
            yield
