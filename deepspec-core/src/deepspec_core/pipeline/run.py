"""One run: its file, its folder, and the things its stages share, each made when first asked for.

Knows where everything of a run lies and how to load the target, the tokenizer, the data and the draft; not what any
stage does with them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import define, evolve, field

from deepspec_core.config.schema import RunFile
from deepspec_core.errors import DataError, StageError
from deepspec_core.pipeline import workers
from deepspec_core.plugins.discovery import Plugins

if TYPE_CHECKING:
    import torch

    from deepspec_core.contracts.cache import CacheFormat, CacheHeader, CacheReader
    from deepspec_core.contracts.draft import Sample
    from deepspec_core.contracts.target import TargetAdapter, TargetModel
    from deepspec_core.data.answers import Supervision
    from deepspec_core.data.conversations import Conversation
    from deepspec_core.data.sources import Split
    from deepspec_core.data.tokenize import ChatTokenizer, Dropped

SMOKE_SAMPLES = 16
SMOKE_STEPS = 10
SMOKE_PROMPTS = 4
# Run.counts of conversations that do not become one whole sample each.
LOSSES = ("refused", "no_answer", "too_short", "truncated", "split", "duplicates", "renamed")


def smoke(file: RunFile) -> RunFile:
    """The same run, small enough to see every stage work: 16 samples, 10 steps, an output folder of its own."""
    return evolve(
        file,
        run=evolve(file.run, output=f"{file.run.output}-smoke"),
        data=evolve(
            file.data,
            sources=tuple(evolve(source, limit=SMOKE_SAMPLES) for source in file.data.sources),
            min_supervised_tokens=1,
        ),
        train=evolve(
            file.train,
            max_steps=SMOKE_STEPS,
            epochs=SMOKE_STEPS,
            global_batch_size=min(file.train.global_batch_size, SMOKE_SAMPLES),
        ),
        evaluate=evolve(file.evaluate, limit=SMOKE_PROMPTS, max_new_tokens=min(file.evaluate.max_new_tokens, 64)),
    )


@define(slots=False)
class Run:
    """A run file in effect. Nothing heavy happens until a property is read."""

    file: RunFile
    path: Path
    plugins: Plugins
    counts: Counter[str] = field(factory=Counter)

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

    @cached_property
    def where(self) -> str | Path:
        """The target's directory or Hub id."""
        from deepspec_core.targets.opening import resolve_model

        options = self.file.target
        return resolve_model(options.model, base=self.base, registry=self.plugins.registry, revision=options.revision)

    @cached_property
    def device(self) -> torch.device:
        """The accelerator of this process, else the CPU."""
        return workers.device()

    @cached_property
    def dtype(self) -> torch.dtype:
        """The target's dtype: as the run file says, else fp32 on CPU, where results are exact, and bf16 elsewhere."""
        from deepspec_core.dtypes import torch_dtype

        return torch_dtype(self.file.target.dtype or ("float32" if self.device.type == "cpu" else "bfloat16"))

    @cached_property
    def family(self) -> TargetAdapter:
        """The target's adapter, whatever the taps are."""
        from deepspec_core.targets.opening import open_adapter

        return open_adapter(
            self.where,
            registry=self.plugins.registry,
            draft_layer=self.file.draft.layer,
            trust_remote_code=self.file.target.trust_remote_code,
            revision=self.file.target.revision,
        )

    @cached_property
    def adapter(self) -> TargetAdapter:
        """The target's adapter; the taps are checked against it."""
        from deepspec_core.targets.taps import check_taps

        layers = self.family.architecture.num_layers
        check_taps(self.file.target.layers, layers, where=f"{self.path}: target.layers")
        return self.family

    @cached_property
    def target(self) -> TargetModel:
        """The loaded target."""
        from deepspec_core.targets.opening import load_target

        return load_target(
            self.adapter,
            self.where,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.file.target.trust_remote_code,
            revision=self.file.target.revision,
        )

    @cached_property
    def tokenizer(self) -> ChatTokenizer:
        """The target's tokenizer with its chat template."""
        from deepspec_core.data.tokenize import ChatTokenizer
        from deepspec_core.targets.opening import tokenizer_for

        tokenizer = tokenizer_for(self.where, self.file.target.trust_remote_code, revision=self.file.target.revision)
        return ChatTokenizer(tokenizer, thinking=self.file.regenerate.thinking)

    @property
    def regenerated(self) -> Path:
        """Where the regenerate stage leaves its conversations."""
        return self.stage_folder("regenerate") / "conversations.jsonl"

    def conversations(self, split: Split, counts: Counter[str] | None = None) -> Iterator[Conversation]:
        """The conversations of the run's sources, as they are there."""
        from deepspec_core.data.sources import read_sources

        data = self.file.data
        return read_sources(
            data.sources,
            split=split,
            held_out=data.held_out,
            seed=self.file.run.seed,
            base=self.base,
            registry=self.plugins.registry,
            counts=counts,
        )

    def expected_conversations(self) -> int | None:
        """How many training conversations there are at most, None where a source has no limit."""
        limits = [source.limit for source in self.file.data.sources]
        return None if None in limits else sum(limit for limit in limits if limit is not None)

    def training_conversations(self, counts: Counter[str] | None = None) -> Iterator[Conversation]:
        """What training learns from: the regenerated conversations where the run has that stage, else the sources'."""
        from deepspec_core.config.schema import SourceOptions
        from deepspec_core.data.sources import read_sources

        if "regenerate" not in self.file.run.stages:
            return self.conversations("train", counts)
        return read_sources(
            [SourceOptions(path=str(self.regenerated.resolve()))],
            split="train",
            held_out=0.0,  # the held-out ones were never regenerated
            seed=self.file.run.seed,
            base=self.base,
            registry=self.plugins.registry,
            counts=counts,
        )

    @property
    def supervision(self) -> Supervision:
        """What is supervised beside the answers."""
        from deepspec_core.data.answers import Supervision

        data = self.file.data
        return Supervision(newline=data.supervise_newline, think_block=data.supervise_think_block)

    def tokenized(
        self,
        conversations: Iterable[Conversation],
        counts: Counter[str],
        on_drop: Callable[[Dropped], None] = lambda _: None,
    ) -> Iterator[Sample]:
        """Conversations as training reads them: rendered, masked, cut, and short ones dropped."""
        from deepspec_core.data.tokenize import tokenize_all

        data = self.file.data
        return tokenize_all(
            conversations,
            self.tokenizer,
            self.adapter.conversation_format(),
            system_prompt=data.system_prompt,
            max_length=min(data.max_length, self.adapter.architecture.max_positions),
            min_supervised_tokens=data.min_supervised_tokens,
            supervision=self.supervision,
            counts=counts,
            on_drop=on_drop,
        )

    def training_samples(self) -> Sequence[Sample]:
        """The training conversations, tokenised. What was dropped is counted in `counts`."""
        samples = list(self.tokenized(self.training_conversations(self.counts), self.counts))
        if not samples:
            raise DataError(
                "No conversation is left to train on",
                where=f"{self.path}: data",
                found=", ".join(f"{name} {count}" for name, count in self.counts.items() if count)
                or "no conversations",
                fix="Give more data, or lower data.min_supervised_tokens.",
            )
        return samples

    def cache_header(self) -> CacheHeader:
        """What a cache of this run is made from."""
        from deepspec_core.targets.opening import fingerprint

        data = self.file.data
        if "regenerate" in self.file.run.stages:
            source = file_digest(self.regenerated)
        else:
            facts = [[str(option) for option in data.sources], data.held_out, self.file.run.seed]
            source = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return evolve(
            self.bare_header(),
            revision=fingerprint(self.where, revision=self.file.target.revision),
            tokenizer=self.tokenizer.tokenizer_fingerprint(),
            template=self.tokenizer.template_fingerprint(
                self.adapter.conversation_format(), data.system_prompt, self.supervision
            ),
            source=source,
        )

    def bare_header(self) -> CacheHeader:
        """The header without its digests: enough to know sizes before data and tokenizer are read."""
        from deepspec_core.contracts.cache import CacheHeader

        architecture = self.adapter.architecture
        return CacheHeader(
            target=self.file.target.model,
            revision="",
            adapter=architecture.model_type,
            taps=self.file.target.layers,
            hidden_size=architecture.hidden_size,
            vocab_size=architecture.vocab_size,
            dtype=self.file.cache.dtype,
            tokenizer="",
            template="",
            max_length=self.file.data.max_length,
            source="",
            plugins=self.plugin_versions,
        )

    @property
    def plugin_versions(self) -> dict[str, str]:
        """Package to version, of every plugin in use."""
        return self.plugins.versions()

    def open_cache(self) -> CacheReader:
        """The finished feature cache; CacheError where it is missing, unfinished, or made for something else."""
        cache_format: CacheFormat = self.plugins.registry.load("cache", self.file.cache.format)()
        folder, expected = self.stage_folder("cache"), self.cache_header()
        if "cache" not in self.file.run.stages:
            # Made by another run, perhaps from conversations this one does not have: which ones is its affair.
            expected = evolve(expected, source=cache_format.open(folder, None).header.source)
        return cache_format.open(folder, expected)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
