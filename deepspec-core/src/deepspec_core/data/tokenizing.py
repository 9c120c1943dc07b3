"""All conversations of a run as samples: tokenised by this process or by several, then told apart, counted and dropped.

The order is that of the conversations, and the result the same, however many processes work. Knows samples and counts;
not how one conversation becomes tokens (tokenize.py), nor where samples are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Final

from attrs import evolve, field, frozen

from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import ConversationFormat
from deepspec_core.data.answers import Supervision, TemplateRefusal
from deepspec_core.data.conversations import Conversation
from deepspec_core.data.digest_set import DigestSet, digest16
from deepspec_core.data.encoding import Row
from deepspec_core.data.tokenize import PLAIN, ChatTokenizer, ControlTokens, Dropped, Renderings
from deepspec_core.data.unicode_text import printable
from deepspec_core.errors import DataError

# Conversations that are worked on at once: each kind of work in turn, which is faster than all of it for each one.
CHUNK: Final = 64


@frozen(kw_only=True)
class Outcome:
    """What one conversation became: samples, or `dropped` (the name it is counted under, and why), or an `error`.

    `joined_start`: whether an answer of it begins with characters that share a token with the header before it.
    """

    samples: tuple[Sample, ...] = ()
    joined_start: bool = False
    dropped: tuple[str, str] | None = None
    error: DataError | None = None


@frozen(kw_only=True)
class Tokenisation:
    """How a conversation becomes samples. It can be sent to other processes.

    `vocab_size` is the target's: tokens that came with a conversation are below it. None: they are not looked at.
    """

    tokenizer: ChatTokenizer
    fmt: ConversationFormat
    system_prompt: str | None = None
    max_length: int
    supervision: Supervision = PLAIN
    vocab_size: int | None = None

    def __call__(self, conversations: Sequence[Conversation]) -> list[Outcome]:
        """The outcome for each conversation. It depends on nothing else, not on the others either."""
        known = self.tokenizer.renderings(conversations, self.system_prompt)
        read = [self._read(*each) for each in zip(conversations, known, strict=True)]
        samples = self.tokenizer.tokenised([rows if isinstance(rows, list) else [] for rows in read], self.max_length)
        return [
            Outcome(samples=tuple(made), joined_start=any(map(self.tokenizer.joins_start, found)))
            if isinstance(found, list)
            else found
            for found, made in zip(read, samples, strict=True)
        ]

    def _read(self, conversation: Conversation, known: Renderings) -> list[Row] | Outcome:
        """What becomes samples, or the outcome where none does."""
        most = max((max(ids, default=0) for ids, _ in conversation.given()), default=0)
        if self.vocab_size is not None and most >= self.vocab_size:
            return Outcome(dropped=("refused", f"token id {most}, where the target has {self.vocab_size} tokens"))
        try:
            return self.tokenizer.sample_rows(conversation, self.fmt, self.system_prompt, self.supervision, known)
        except ControlTokens as error:
            return Outcome(dropped=("control_tokens", f"it contains a control token: {error.found}"))
        except TemplateRefusal as error:
            return Outcome(dropped=("refused", f"the chat template does not take it: {error.found}"))
        except DataError as error:
            return Outcome(error=error)


Each = Callable[[Iterable[Conversation], Tokenisation], Iterable[tuple[Conversation, Outcome]]]


def in_chunks(
    conversations: Iterable[Conversation], tokenisation: Tokenisation
) -> Iterator[tuple[Conversation, Outcome]]:
    """Each conversation with its outcome, in this process."""
    rest = iter(conversations)
    while chunk := list(islice(rest, CHUNK)):
        yield from zip(chunk, tokenisation(chunk), strict=True)


@frozen(kw_only=True)
class Sorting:
    """Which samples are kept, under unique ids, and what is counted of the others.

    `counts` receives samples, tokens, supervised_tokens; `truncated`: kept ones that reach max_length; `given_tokens`:
    conversations that came with their tokens; `split`: conversations of several samples, since their template rewrites
    earlier answers; `joined_start`: conversations with an answer whose first white space is part of the header's token,
    and so is not supervised. Dropped, and told to `on_drop`: `too_short`, samples with fewer than min_supervised_tokens
    supervised tokens within max_length; `no_answer`, conversations where nobody answers; `refused`, those the template
    does not take, or not all of, and those with tokens that the target does not have; `control_tokens`, those
    whose text contains the template's own markers. Kept, and
    counted as `mask_token`: samples that contain the draft's mask token. `seen` are the ids of samples so far.
    """

    max_length: int
    min_supervised_tokens: int
    counts: Counter[str] = field(factory=Counter)
    on_drop: Callable[[Dropped], None] = lambda _: None
    mask_token: int | None = None
    seen: DigestSet = field(factory=DigestSet)

    def kept(self, conversation: Conversation, outcome: Outcome) -> list[Sample]:
        """Those of a conversation's samples that are worth training on.

        Raises DataError if its template does not fit.
        """
        if outcome.error is not None:
            error = outcome.error
            where = f"conversation {conversation.id}"
            raise DataError(error.problem, where=where, found=error.found, expected=error.expected) from error
        if outcome.dropped is not None:
            self._drop(outcome.dropped[0], conversation.id, outcome.dropped[1])
            return []
        self.counts["given_tokens"] += conversation.input_ids is not None
        self.counts["split"] += len(outcome.samples) > 1
        self.counts["joined_start"] += outcome.joined_start
        if not outcome.samples:
            self._drop("no_answer", conversation.id, "no answer to a user's message")
        return [kept for sample in outcome.samples if (kept := self._kept(conversation, sample)) is not None]

    def _kept(self, conversation: Conversation, sample: Sample) -> Sample | None:
        num_supervised = int(sample.loss_mask.sum())
        if num_supervised < self.min_supervised_tokens:
            reason = f"{num_supervised} supervised tokens of at least {self.min_supervised_tokens}"
            cut = f" (cut at {self.max_length} tokens)" if sample.original_length == self.max_length else ""
            self._drop("too_short", sample.id, reason + cut)
            return None
        if digest16(sample.id) in self.seen:
            sample = evolve(sample, id=f"{sample.id}-{conversation.digest[:12]}")
        self.seen.add(digest16(sample.id))
        self.counts["samples"] += 1
        self.counts["tokens"] += len(sample.input_ids)
        self.counts["supervised_tokens"] += num_supervised
        self.counts["truncated"] += sample.original_length == self.max_length
        self.counts["mask_token"] += self.mask_token is not None and bool((sample.input_ids == self.mask_token).any())
        return sample

    def _drop(self, kind: str, identity: str, reason: str) -> None:
        self.counts[kind] += 1
        self.on_drop(Dropped(id=printable(identity), reason=reason))


def tokenize_all(
    conversations: Iterable[Conversation],
    tokenizer: ChatTokenizer,
    fmt: ConversationFormat,
    *,
    system_prompt: str | None,
    max_length: int,
    min_supervised_tokens: int,
    supervision: Supervision = PLAIN,
    counts: Counter[str] | None = None,
    on_drop: Callable[[Dropped], None] = lambda _: None,
    mask_token: int | None = None,
) -> Iterator[Sample]:
    """The samples worth training on, under unique ids, in this process. Counts, drops and errors as of Sorting."""
    tokenisation = Tokenisation(
        tokenizer=tokenizer, fmt=fmt, system_prompt=system_prompt, max_length=max_length, supervision=supervision
    )
    sorting = Sorting(
        max_length=max_length,
        min_supervised_tokens=min_supervised_tokens,
        counts=Counter() if counts is None else counts,
        on_drop=on_drop,
        mask_token=mask_token,
    )
    return chain.from_iterable(sorting.kept(*each) for each in in_chunks(conversations, tokenisation))
