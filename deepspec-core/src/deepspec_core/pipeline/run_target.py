"""A run's target: where it is, its adapter, tokenizer and weights, each opened when first asked for.

Knows the run file's [target], [draft.layer] and whether the target thinks. Does not know data, caches or stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import define

from deepspec_core.config.schema import TargetOptions
from deepspec_core.digests import digests_of
from deepspec_core.errors import StageError
from deepspec_core.layers.options import LayerOptions
from deepspec_core.pipeline import contents, workers
from deepspec_core.pipeline.reads import Reads, remembered
from deepspec_core.plugins.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from deepspec_core.contracts.target import TargetAdapter, TargetArchitecture, TargetModel, TargetVocabulary
    from deepspec_core.data.tokenize import ChatTokenizer


@define(kw_only=True, slots=False)
class RunTarget:
    """What [target] names, opened on first use.

    base: The folder that relative paths start at.
    named_in: The file that names the taps, for errors.
    draft_layer: The shape of the draft's layers. The adapter is opened with it, but only a draft depends on it, so only
        `draft_adapter` notes that it was read.
    """

    options: TargetOptions
    draft_layer: LayerOptions
    thinking: bool
    base: Path
    named_in: Path
    registry: Registry
    reads: Reads

    @remembered
    def where(self) -> str | Path:
        """The target's directory or Hub id."""
        from deepspec_core.targets.opening import resolve_model

        return resolve_model(self.options.model, base=self.base, registry=self.registry, revision=self.options.revision)

    @cached_property
    def device(self) -> torch.device:
        """The accelerator of this process, or the CPU if there is none."""
        return workers.device()

    @remembered
    def dtype(self) -> torch.dtype:
        """The dtype of the run file; else fp32 on a CPU, where results are exact, and bf16 on an accelerator."""
        from deepspec_core.dtypes import torch_dtype

        if self.options.dtype is not None:
            return torch_dtype(self.options.dtype)
        name = "float32" if self.device.type == "cpu" else "bfloat16"
        self.reads.content(contents.DTYPE, name)
        return torch_dtype(name)

    @remembered
    def family(self) -> TargetAdapter:
        """The adapter. The taps are not checked, nor read: a stage that needs none does not depend on them."""
        from deepspec_core.targets.opening import open_adapter

        return open_adapter(
            self.where,
            registry=self.registry,
            draft_layer=self.draft_layer,
            trust_remote_code=self.options.trust_remote_code,
            revision=self.options.revision,
        )

    @remembered
    def adapter(self) -> TargetAdapter:
        """The adapter, after a check that the target has the taps. Raises TargetError if it does not.

        Only runs of drafts that are not trained have none (config/checks.py).
        """
        from deepspec_core.targets.taps import check_taps

        layers = self.family.architecture.num_layers
        if self.options.layers:  # whether there must be some depends on the draft type: config/checks.py
            check_taps(self.options.layers, layers, where=f"{self.named_in}: target.layers")
        return self.family

    @property
    def draft_adapter(self) -> TargetAdapter:
        """The adapter, for building modules in the draft's own shape."""
        self.reads.key("draft.layer")
        return self.adapter

    @property
    def architecture(self) -> TargetArchitecture:
        """The target's sizes and special tokens."""
        return self.family.architecture

    @remembered
    def model(self) -> TargetModel:
        """The target with its weights."""
        from deepspec_core.targets.opening import load_target

        self.reads.content(contents.TARGET, self.content_digest())
        model = load_target(
            self.family,
            self.where,
            dtype=self.dtype,
            device=self.device,
            trust_remote_code=self.options.trust_remote_code,
            revision=self.options.revision,
        )
        self._require_unchanged()
        return model

    @remembered
    def vocabulary(self) -> TargetVocabulary:
        """The target's embedding and lm_head, which drafts share. If the target is not loaded, only these are read.

        What else is asked of the target afterwards loads all of it.
        """
        from deepspec_core.contracts.target import TargetVocabulary
        from deepspec_core.targets.vocabulary import load_vocabulary

        found = None
        if not self.is_loaded:
            self.reads.content(contents.TARGET, self.content_digest())
            found = load_vocabulary(
                self.family,
                self.where,
                dtype=self.dtype,
                device=self.device,
                trust_remote_code=self.options.trust_remote_code,
                revision=self.options.revision,
            )
            self._require_unchanged()
        if found is None:
            found = TargetVocabulary(embedding=self.model.embedding_weight(), head=self.model.head_weight())
        return found

    @property
    def is_loaded(self) -> bool:
        """Whether `model` was asked for, so that all weights are in memory."""
        return "_remembered_model" in self.__dict__

    def extra_weights(self, prefixes: Sequence[str]) -> dict[str, Tensor]:
        """The target's weights whose names begin with one of `prefixes`. Raises TargetError if one fits none."""
        from deepspec_core.targets.opening import extra_weights

        self.reads.content(contents.TARGET, self.content_digest())
        weights = extra_weights(self.where, prefixes, revision=self.options.revision)
        self._require_unchanged()
        return weights

    @remembered
    def tokenizer(self) -> ChatTokenizer:
        """The tokenizer with its chat template, after a check that the family's answers are found in it."""
        from deepspec_core.data.template_check import check_template
        from deepspec_core.data.tokenize import ChatTokenizer
        from deepspec_core.targets.chat_template import read_chat_template
        from deepspec_core.targets.opening import tokenizer_for

        self.reads.content(contents.TARGET, self.content_digest())
        tokenizer = tokenizer_for(self.where, self.options.trust_remote_code, revision=self.options.revision)
        path = None if self.options.chat_template is None else self.base / self.options.chat_template
        if path is not None:
            read_chat_template(path)  # says what is wrong with the file, before its digest is taken
            # Before the text: of a file that changes in between, the results are refused at the next start.
            self.reads.content(contents.TEMPLATE, self.template_digest() or "")
            tokenizer.chat_template = read_chat_template(path)
        self._require_unchanged()
        chat = ChatTokenizer(tokenizer, thinking=self.thinking, stop_ids=self.architecture.stop_token_ids)
        check_template(chat, self.family.conversation_format(), where=path or self.where)
        return chat

    def template_digest(self) -> str | None:
        """The digest of the file of target.chat_template; None if the run file names none.

        Raises OSError if it is gone.
        """
        if self.options.chat_template is None:
            return None
        return digests_of([self.base / self.options.chat_template])[0]

    def fingerprint(self) -> str:
        """A fingerprint that differs for every other target; see targets/opening.py.

        Of a directory, it and `content_digest` are taken once, before anything of the target is loaded: what was
        computed with weights in memory must not be labelled with those that lie in their place by now.
        """
        from deepspec_core.targets.opening import fingerprint

        if isinstance(self.where, Path):
            return self._digests[0]
        return fingerprint(self.where, revision=self.options.revision)

    def content_digest(self) -> str:
        """A digest that also differs for the same target with another tokenizer or other stop tokens."""
        from deepspec_core.targets.opening import content_digest

        if isinstance(self.where, Path):
            return self._digests[1]
        return content_digest(self.where, revision=self.options.revision)

    @remembered
    def _digests(self) -> tuple[str, str]:
        from deepspec_core.targets.opening import content_digest, fingerprint

        return fingerprint(self.where), content_digest(self.where)

    def _require_unchanged(self) -> None:
        """Raise StageError if the target is not what it was before it was loaded."""
        from deepspec_core.targets.opening import content_digest

        if isinstance(self.where, Path) and content_digest(self.where) != self.content_digest():
            raise StageError(
                "The target changed while the run was reading it",
                where=self.where,
                fix="Another process is writing the target: wait until it has finished, and run again.",
            )
