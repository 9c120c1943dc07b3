"""One run: its file, its folder, and the target, data and cache that its stages share.

Knows where the files of a run are and how its parts belong together. Each part knows its own section of the run file
(run_target.py, run_data.py, run_cache.py). Nothing heavy is imported before a part is used.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field

from deepspec_core.config.load import RunFile
from deepspec_core.config.schema import MASK
from deepspec_core.locks import Lock, lock
from deepspec_core.pipeline.reads import Reads, recording, remembered
from deepspec_core.pipeline.run_data import RunData
from deepspec_core.pipeline.run_target import RunTarget
from deepspec_core.plugins.discovery import Plugins

if TYPE_CHECKING:
    from deepspec_core.contracts.untrained import UntrainedDraft
    from deepspec_core.pipeline.run_cache import RunCache


@define(slots=False)
class Run:
    """A run file, its folder and the installed plugins. Relative paths in the file start at the folder of `path`.

    `smoke`: The file was made small (smoke.py), so its figures are not meant to mean anything.
    `reads` records which keys of `file` are read, and what else the run's parts read.
    `served_like` is what feature servers were compared with before the first stage; None before that.
    """

    file: RunFile
    path: Path
    plugins: Plugins
    smoke: bool = False
    reads: Reads = field(factory=Reads, init=False)
    served_like: Any = field(default=None, init=False, eq=False)

    def __attrs_post_init__(self) -> None:
        self._draft_layer = self.file.draft.layer
        # Samples are counted by it; no result depends on it, so reading it is not noted.
        self._mask_token = getattr(self.file.draft.options, MASK, None)
        # Evaluating a checkpoint does not depend on the type; what does not have one reads its whole section.
        self._draft_type = self.file.draft.type
        self.file = recording(self.file, self.reads)

    @property
    def base(self) -> Path:
        """The folder that relative paths of the run file start at."""
        return self.path.resolve().parent

    @property
    def folder(self) -> Path:
        """The folder of the run's results."""
        return (self.base / self.file.run.output).resolve()

    def stage_folder(self, stage: str) -> Path:
        """A stage's own folder. That of the cache may lie outside the run's folder."""
        if stage == "cache" and self.file.cache.path is not None:
            return self.base / self.file.cache.path
        return self.folder / stage

    def has(self, stage: str) -> bool:
        """Whether the run has this stage. The answer counts as a key that was read; the list of all stages does not."""
        self.reads.key(f"run.stages.{stage}")
        return stage in self.file.run.stages

    @remembered
    def target(self) -> RunTarget:
        """The target: where it is, its adapter, tokenizer and weights."""
        return RunTarget(
            options=self.file.target,
            draft_layer=self._draft_layer,
            # A share has two modes, and whoever asks takes the tokenizer in one of them (ChatTokenizer.in_mode).
            thinking=self.file.regenerate.thinking is True,
            base=self.base,
            named_in=self.path,
            registry=self.plugins.registry,
            reads=self.reads,
        )

    @remembered
    def data(self) -> RunData:
        """The conversations."""
        return RunData(
            options=self.file.data,
            seed=self.file.run.seed,
            base=self.base,
            folder=self.folder,
            named_in=self.path,
            regenerated=self.stage_folder("regenerate") / "conversations.jsonl" if self.has("regenerate") else None,
            target=self.target,
            registry=self.plugins.registry,
            reads=self.reads,
            answers=lambda: self.file.regenerate.answers if self.has("regenerate") else 1,
            mask_token=self._mask_token if self._mask_token is not None else self.target.architecture.mask_token_id,
        )

    @remembered
    def cache(self) -> RunCache:
        """The feature cache."""
        from deepspec_core.pipeline.run_cache import RunCache

        return RunCache(
            options=self.file.cache,
            folder=self.stage_folder("cache"),
            made_here=self.has("cache"),
            target=self.target,
            data=self.data,
            reads=self.reads,
            registry=self.plugins.registry,
            plugin_versions=self.plugins.versions(),
            by_servers=bool(self.file.features.servers),
        )

    @property
    def trains(self) -> bool:
        """Whether drafts of the run's type are trained."""
        return self.plugins.registry.get("draft", self._draft_type).trained

    @remembered
    def untrained(self) -> UntrainedDraft:
        """The run's draft, which is not trained. Its weights are not read. Raises DeepSpecError if it does not fit."""
        from deepspec_core.untrained.making import make_untrained

        return make_untrained(
            self.file.draft.type,
            self.file.draft.options,
            architecture=self.target.architecture,
            tokenizer=self.target.tokenizer.tokenizer,
            dtype=self.target.dtype,
            device=self.target.device,
            base=self.base,
            registry=self.plugins.registry,
        )

    def save_config(self) -> None:
        """Write the effective run file beside the results."""
        from deepspec_core.config.render import render

        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.toml").write_text(render(self.file), encoding="utf-8")

    def locked(self) -> Lock:
        """Hold the run's folder for this process; raises StageError if another one works in it."""
        return lock(
            self.folder,
            problem="Another process is working on this run",
            fix="Wait for it, stop it, or give this run another run.output.",
        )
