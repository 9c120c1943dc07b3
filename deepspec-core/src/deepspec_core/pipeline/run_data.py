"""A run's conversations: from its sources, regenerated, and as tokens for training.

Knows the run file's [data] and where the regenerate stage stores its answers. Does not know how conversations are read,
rendered or masked (data/), or what a stage does with them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from attrs import define, field

from deepspec_core.config.named_files import too_long
from deepspec_core.config.schema import BUILTIN, DataOptions, SourceOptions
from deepspec_core.errors import DataError
from deepspec_core.pipeline import contents, workers
from deepspec_core.pipeline.reads import Reads
from deepspec_core.pipeline.run_target import RunTarget
from deepspec_core.plugins.registry import Registry

if TYPE_CHECKING:
    from deepspec_core.contracts.cache import CacheReader
    from deepspec_core.contracts.draft import Sample
    from deepspec_core.data.answers import Supervision
    from deepspec_core.data.bad_rows import BadRows
    from deepspec_core.data.conversations import Conversation
    from deepspec_core.data.samples import Samples
    from deepspec_core.data.split import Split
    from deepspec_core.data.tokenize import Dropped

log = logging.getLogger("deepspec")

# The file in a run's folder that keeps the rows of sources that cannot be used, with their places and the reasons.
BAD_ROWS: Final = "bad-rows.jsonl"
# The folder in a run's folder that keeps its tokenised conversations (data/token_store.py).
TOKENS: Final = "tokens"
# Counts of conversations that do not become one whole sample each, are not supervised whole, or ask what another asks.
LOSSES = (
    "unusable",
    "malformed",
    "refused",
    "control_tokens",
    "no_answer",
    "too_short",
    "truncated",
    "split",
    "duplicates",
    "renamed",
    "same_question",
    "same_prompt",
    "mask_token",
    "joined_start",
    "not_in_subset",
)


@define(kw_only=True, slots=False)
class RunData:
    """[data] in effect. `folder` is the run's.

    `regenerated` is the file of the regenerate stage, None where the run has no such stage. `mask_token` is the
    draft's, which no text should contain. `answers` reads how many answers a conversation gets. `counts` says what was
    read and what was dropped while `training_samples` was formed.
    """

    options: DataOptions
    seed: int
    base: Path
    folder: Path
    named_in: Path
    regenerated: Path | None
    target: RunTarget
    registry: Registry
    reads: Reads
    mask_token: int | None = None
    answers: Callable[[], int] = lambda: 1
    counts: Counter[str] = field(factory=Counter)
    _shipped: dict[int, str] = field(factory=dict, init=False)

    @property
    def tokens_folder(self) -> Path:
        """Where the samples are stored."""
        return self.folder / TOKENS

    @property
    def max_length(self) -> int:
        """Tokens of the longest sample: data.max_length, or the target's positions where those are fewer."""
        return min(self.options.max_length, self.target.architecture.max_positions)

    def check_length(self) -> None:
        """ConfigError for samples longer than the target has positions: it was never trained for what comes after."""
        asked, most = self.options.max_length, self.target.architecture.max_positions
        if asked > most:
            raise too_long(asked, most, self.target.options.model, where=f"{self.named_in}: data.max_length")

    @property
    def supervision(self) -> Supervision:
        """Which answers are supervised, and what beside them."""
        from deepspec_core.data.answers import Supervision

        return Supervision(
            newline=self.options.supervise_newline,
            think_block=self.options.supervise_think_block,
            last_only=self.options.supervise == "last",
        )

    def conversations(
        self,
        split: Split,
        counts: Counter[str] | None = None,
        bad_rows: BadRows | None = None,
        *,
        keep: bool = False,
    ) -> Iterator[Conversation]:
        """The conversations of the sources, as they stand there. Raises DataError if a source changes meanwhile.

        `bad_rows` receives the rows that cannot be used. Left out, they are limited by data.max_bad_rows. `keep`: the
        first process of the run also keeps them in the run's folder.
        """
        from deepspec_core.data.bad_rows import BadRows

        digests = self.noted_sources()
        if bad_rows is None:
            kept = self.folder / BAD_ROWS if keep and workers.rank() == 0 else None
            bad_rows = BadRows(most=self.options.max_bad_rows, keep_in=kept)
        read = self._read(
            self.options.sources,
            split,
            self.options.held_out,
            counts,
            bad_rows,
            duplicates=self.options.duplicates,
        )
        return self._read_unchanged(digests, read, bad_rows)

    def noted_sources(self) -> list[str | None]:
        """The digest of each source. The rule of the split and they count as read."""
        from deepspec_core.data.split import RULE

        self.reads.content(contents.SPLIT, RULE)
        digests = [self.source_digest(index, ask_hub=True) for index in range(len(self.options.sources))]
        for index, digest in enumerate(digests):
            if digest is not None:
                self.reads.content(contents.source(index), digest)
        return digests

    def _read_unchanged(
        self, digests: Sequence[str | None], conversations: Iterable[Conversation], bad_rows: BadRows
    ) -> Iterator[Conversation]:
        """The conversations. After the last one the files are compared with their digests from before the first."""
        yield from conversations
        bad_rows.finish()
        for index, digest in enumerate(digests):
            now = self.source_digest(index, ask_hub=False)
            if now is not None and now != digest:
                raise DataError(
                    "A source changed while it was read",
                    where=f"{self.named_in}: data.sources[{index}]: {self.options.sources[index].path}",
                    expected="a file that nobody writes while a run reads it",
                    fix="Restore the earlier file and run again, or start again with --force.",
                )

    def split(self) -> dict[str, Any]:
        """`rule`, `held_out` and `seed` of the held-out split: the run's own, or those of its only source."""
        from deepspec_core.data.sources import split_of

        return split_of(self.options.sources, base=self.base, held_out=self.options.held_out, seed=self.seed)

    def source_digest(self, index: int, *, ask_hub: bool) -> str | None:
        """Tells a source from an edited one; see data/source_digest.py. None where the Hub is not asked.

        Of prompts that a plugin ships, the first rows are read, once in a process.
        """
        from deepspec_core.data.shipped_prompts import rows_digest
        from deepspec_core.data.source_digest import source_digest
        from deepspec_core.data.source_rows import columns_of

        source = self.options.sources[index]
        if not source.path.startswith(BUILTIN):
            return source_digest(source, base=self.base, ask_hub=ask_hub)
        if index not in self._shipped:
            columns = columns_of(source).read
            self._shipped[index] = rows_digest(
                source.path, seed=self.seed, limit=source.limit, registry=self.registry, columns=columns
            )
        return self._shipped[index]

    def regenerated_digest(self) -> str:
        """The digest of this run's file of regenerated conversations. DataError if it cannot be read."""
        from deepspec_core.data.source_digest import file_digest

        assert self.regenerated is not None, "the run has the regenerate stage"
        try:
            return file_digest(self.regenerated)
        except OSError as error:
            raise DataError(
                "The regenerated conversations cannot be read",
                where=self.regenerated,
                found=error.strerror,
                expected="the file that the stage `regenerate` has written",
                fix="Put the file back, or make it again with --force regenerate.",
            ) from error

    def noted_regenerated(self) -> str:
        """The same digest. The file counts as read."""
        digest = self.regenerated_digest()
        self.reads.content(contents.REGENERATED, digest)
        return digest

    def held_out(self, limit: int) -> Iterator[dict[str, Any]]:
        """At most `limit` of the conversations that training never sees, as rows of an evaluation task.

        Those that are not valid Unicode, or whose prompt the chat template does not take, are left out as training
        leaves them out. The latter are counted in a warning.
        """
        from deepspec_core.data.answers import TemplateRefusal
        from deepspec_core.data.unicode_text import not_unicode

        asked, refused = 0, 0
        for row in self.conversations("held_out"):
            fields = {"id": row.id, "messages": row.messages, "tools": row.tools}
            if not_unicode(fields) is not None:
                continue
            until = next((i + 1 for i, message in enumerate(row.messages) if message["role"] == "user"), None)
            try:
                self.target.tokenizer.render_prompt(row.messages[:until], self.options.system_prompt, row.tools)
            except TemplateRefusal as error:
                refused += 1
                log.debug("held-out conversation %s is not asked: %s", row.id, error.found)
                continue
            yield fields
            asked += 1
            if asked == limit:
                break
        if refused:
            log.warning("%d held-out prompts are left out, because the chat template refuses them", refused)

    def expected_conversations(self) -> int | None:
        """How many training conversations there are at most, None where a source has no limit.

        In a run that regenerates, each answer to a conversation counts as one.
        """
        with self.reads.unnoted():  # this bound is shown to people: no result depends on it
            limits = [source.limit for source in self.options.sources]
            most = None if None in limits else sum(limit for limit in limits if limit is not None)
            return None if most is None else most * self.answers()

    def training_conversations(
        self,
        counts: Counter[str] | None = None,
        bad_rows: BadRows | None = None,
        *,
        keep: bool = False,
    ) -> Iterator[Conversation]:
        """What training learns from: the regenerated conversations where the run has that stage, else the sources'.

        `bad_rows` and `keep` are those of `conversations`. What the run regenerated itself has no bad rows.
        """
        if self.regenerated is None:
            return self.conversations("train", counts, bad_rows, keep=keep)
        self.noted_regenerated()
        # Held-out conversations were never regenerated: nothing is left to hold out.
        return self._read([SourceOptions(path=str(self.regenerated.resolve()))], "train", 0.0, counts, None, own=True)

    def _read(
        self,
        sources: Sequence[SourceOptions],
        split: Split,
        held_out: float,
        counts: Counter[str] | None,
        bad_rows: BadRows | None,
        *,
        duplicates: str = "keep",
        own: bool = False,
    ) -> Iterator[Conversation]:
        from deepspec_core.data.sources import read_sources

        return read_sources(
            sources,
            split=split,
            held_out=held_out,
            seed=self.seed,
            base=self.base,
            registry=self.registry,
            counts=counts,
            bad_rows=bad_rows,
            duplicates=duplicates,
            own=own,
        )

    def tokenized(
        self,
        conversations: Iterable[Conversation],
        counts: Counter[str],
        on_drop: Callable[[Dropped], None] = lambda _: None,
    ) -> Iterator[Sample]:
        """Conversations as training reads them: rendered, masked, cut, and short ones dropped."""
        from deepspec_core.data.tokenizing import tokenize_all

        return tokenize_all(
            conversations,
            self.target.tokenizer,
            self.target.family.conversation_format(),
            system_prompt=self.options.system_prompt,
            max_length=self.max_length,
            min_supervised_tokens=self.options.min_supervised_tokens,
            supervision=self.supervision,
            counts=counts,
            on_drop=on_drop,
            mask_token=self.mask_token,
        )

    def training_samples(self) -> Samples:
        """The training conversations, tokenised, stored in the run's folder. `counts` says what was dropped."""
        from deepspec_core.pipeline.run_tokens import stored_samples

        samples, counts = stored_samples(self)
        self.counts.clear()
        self.counts.update(counts)
        self.counts["mask_token"] = 0 if self.mask_token is None else len(samples.with_token(self.mask_token))
        if not len(samples):
            raise DataError(
                "No conversation is left to train on",
                where=f"{self.named_in}: data",
                found=", ".join(f"{name} {count}" for name, count in self.counts.items() if count)
                or "no conversations",
                fix="Add the stage regenerate to run.stages: the target answers prompts that have no answer."
                if self.counts.get("no_answer")
                else "Give more data, or lower data.min_supervised_tokens.",
            )
        return samples

    def count_mask_token(self, reader: CacheReader) -> None:
        """How many samples of a cache contain the draft's mask token: as the cache says, or counted."""
        from deepspec_core.cache.counting import samples_with

        if self.mask_token is not None and workers.rank() == 0:
            self.counts["mask_token"] = samples_with(reader, self.mask_token)
            if self.counts["mask_token"]:
                log.warning(
                    "%d samples of the cache contain the draft's mask token, %d",
                    self.counts["mask_token"],
                    self.mask_token,
                )

    def losses(self) -> dict[str, int]:
        """What became of conversations that are not one whole sample each, by reason."""
        return {name: self.counts[name] for name in LOSSES}
