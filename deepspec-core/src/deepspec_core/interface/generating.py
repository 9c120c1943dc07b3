"""Continuing prompts with or without a draft, from Python.

Knows how prompts become results, and how results are streamed round by round. prompts.py knows the forms of prompts;
decoding/engine.py runs the rounds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from attrs import define, field, frozen

from deepspec_core.decoding.engine import Committed, Completion, Request, decode
from deepspec_core.decoding.stop_text import Shown, cut
from deepspec_core.decoding.text_stream import TextStream
from deepspec_core.errors import ConfigError
from deepspec_core.evaluation.sampled import sampling_at, shown_text, stop_text
from deepspec_core.interface.models import Draft, Target, check_models
from deepspec_core.interface.options import GenerateOptions, checked
from deepspec_core.interface.prompts import Prompt, PromptReader, listed
from deepspec_core.pipeline import threads
from deepspec_core.plugins.exits import no_exit


@frozen
class Round:
    """One proposal and its verification: the numbers of tokens that were proposed, accepted and committed.

    For a tree, `proposed` counts the tokens of its longest path. Committed tokens are the accepted ones and, unless an
    accepted one ends the answer, one token of the target's own. The last round may commit more tokens than
    `max_new_tokens` allows. `confidence` holds a probability for each proposed token, if the draft gives confidences.
    """

    proposed: int
    accepted: int
    committed: int
    confidence: tuple[float, ...] | None = None


@frozen(kw_only=True)
class Generation:
    """One continued prompt.

    `ids` are the new tokens, including a stop token; `text` is their text. `finish_reason` is "stop" or "length". The
    target draws the first token when it reads the prompt; `rounds` commit the others. `seconds` is the time from the
    start of the prompt to its last token, in which other prompts of the batch were decoded too.
    """

    prompt_ids: tuple[int, ...] = field(repr=False)
    ids: tuple[int, ...] = field(repr=False)
    text: str
    finish_reason: str
    rounds: tuple[Round, ...] = field(repr=False)
    seconds: float = field(eq=False)

    @property
    def accepted_length(self) -> float:
        """The mean number of tokens committed per round, the target's own included; 0 if there was no round."""
        return sum(one.committed for one in self.rounds) / len(self.rounds) if self.rounds else 0.0


@frozen(kw_only=True)
class Streamed:
    """What one round added to one answer. `prompt` is the prompt's index.

    `pieces` holds the text of each of `ids`. It is "" while a character is incomplete or the text may still become a
    stop string; the text then follows in a later piece. The draft proposed the first `accepted` ids; the target chose
    the rest.
    """

    prompt: int
    ids: tuple[int, ...]
    pieces: tuple[str, ...]
    accepted: int

    @property
    def text(self) -> str:
        """The text of all pieces."""
        return "".join(self.pieces)


@no_exit()
def generate(
    target: Target,
    draft: Draft | None,
    prompts: Prompt | Iterable[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    thinking: bool = False,
    system_prompt: str | None = None,
    seed: int = 0,
    batch_size: int = 1,
    confidence_threshold: float = 0.0,
    on_round: Callable[[Streamed], None] | None = None,
) -> list[Generation]:
    """Continue every prompt; the results are in the order of the prompts.

    A prompt is a text (one user turn), a list of messages with `role` and `content`, or a list of token ids, which are
    used unchanged. Texts and messages go through the target's chat template. With a draft the output is the same as
    without: at temperature 0 token for token, above it in distribution. Prompt i is sampled with the seed `seed` + i,
    so the other prompts of its batch do not matter. If a prompt leaves the target fewer than `max_new_tokens`
    positions, its answer ends at the last position. The order of operations is: repetition penalty, temperature, top_k,
    top_p, min_p (decoding/sampling.py). An answer ends with the token that completes one of the `stop` strings; its
    text ends before that string.

    `on_round` is called after each round with what the round added to an answer. Raises DeepSpecError for options out
    of range, for a draft that was opened for a target of other sizes, dtype or device, and for prompts that cannot be
    rendered or leave no room to answer.
    """
    check_models(target, draft)
    given = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": stop,
        "thinking": thinking,
        "system_prompt": system_prompt,
        "seed": seed,
        "batch_size": batch_size,
        "confidence_threshold": confidence_threshold,
    }
    options = checked(GenerateOptions, given, call="generate", registry=target.plugins.registry)
    if draft is not None:
        check_confidence(draft, options.confidence_threshold)
    elif options.confidence_threshold > 0:
        raise ConfigError(
            "a confidence threshold needs a draft",
            where="confidence_threshold",
            found=f"{options.confidence_threshold:g}",
            expected="a draft with a confidence head, or 0",
        )
    if on_round is not None and not callable(on_round):
        raise ConfigError(
            "on_round cannot be called",
            where="the argument `on_round`",
            found=repr(on_round),
            expected="a function of one argument",
        )
    reader = PromptReader(target, options.thinking, options.system_prompt)
    requests = [
        Request(id=str(index), prompt_ids=reader.ids(prompt, f"prompt {index}"), seed=options.seed + index)
        for index, prompt in enumerate(listed(prompts))
    ]
    return _Answers(target, on_round, options.stop).all(draft, requests, options) if requests else []


def check_confidence(draft: Draft, threshold: float) -> None:
    """ConfigError if there is a confidence threshold and the draft gives no confidence."""
    if threshold > 0 and draft.description.gives_confidence is False:
        raise ConfigError(
            "this draft gives no confidence to compare with the threshold",
            where="confidence_threshold",
            found=f"{threshold:g}",
            expected="a draft with a confidence head, or 0",
        )


@define(slots=False)
class _Answers:
    """Answers in progress: when each one started, and its text as far as it has been streamed."""

    target: Target
    on_round: Callable[[Streamed], None] | None
    stop: tuple[str, ...]
    started: dict[str, float] = field(factory=dict)
    streams: dict[str, tuple[TextStream, Shown]] = field(factory=dict)
    told: float = 0.0  # seconds spent in on_round, which are no decoding

    def all(self, draft: Draft | None, requests: list[Request], options: GenerateOptions) -> list[Generation]:
        architecture, model = self.target.architecture, self.target.model
        batch_size = min(options.batch_size, len(requests))
        longest = max(len(request.prompt_ids) for request in requests)
        with threads.using(threads.for_decoding(architecture, model.device, batch_size=batch_size)):
            found = {
                done.id: self._finish(done)
                for done in decode(
                    model,
                    None if draft is None else draft.proposer(),
                    self._start(requests),
                    sampling=sampling_at(options, options.temperature),
                    stop_ids=architecture.stop_token_ids,
                    max_new_tokens=options.max_new_tokens,
                    batch_size=batch_size,
                    max_length=min(architecture.max_positions, longest + options.max_new_tokens),
                    confidence_threshold=options.confidence_threshold,
                    stop_text=stop_text(options, self.target.tokenizer),
                    on_round=None if self.on_round is None else self._tell,
                )
            }
        return [found[request.id] for request in requests]

    def _start(self, requests: list[Request]) -> Iterator[Request]:
        """The engine takes a request when it has a slot for it, and begins at once."""
        for request in requests:
            self.started[request.id] = self._now()
            yield request

    def _now(self) -> float:
        return time.perf_counter() - self.told

    def _finish(self, done: Completion) -> Generation:
        seconds = self._now() - self.started[done.id]
        if done.id in self.streams:
            stream, shown = self.streams.pop(done.id)
            if rest := shown.push(stream.rest()) + shown.rest():
                self._show(Streamed(prompt=int(done.id), ids=(), pieces=(rest,), accepted=0))
        return Generation(
            prompt_ids=done.prompt_ids,
            ids=done.output_ids,
            text=cut(self._text([token for token in done.output_ids if not self._stops(token)]), self.stop),
            finish_reason=done.finish_reason,
            rounds=tuple(
                Round(
                    proposed=one.proposal_length,
                    accepted=one.accepted_draft_length,
                    committed=one.acceptance_length,
                    confidence=None if one.confidence is None else tuple(map(_sigmoid, one.confidence)),
                )
                for one in done.rounds
            ),
            seconds=seconds,
        )

    def _tell(self, committed: Committed) -> None:
        stream, shown = self.streams.setdefault(committed.id, (TextStream(self._text), Shown(self.stop)))
        pieces = tuple("" if self._stops(token) else shown.push(stream.push(token)) for token in committed.ids)
        self._show(Streamed(prompt=int(committed.id), ids=committed.ids, pieces=pieces, accepted=committed.accepted))

    def _show(self, streamed: Streamed) -> None:
        assert self.on_round is not None
        start = time.perf_counter()
        self.on_round(streamed)
        self.told += time.perf_counter() - start

    def _stops(self, token: int) -> bool:
        # A stop token ends the answer, so there is one at most, the last. Not every family marks it as special.
        return token in self.target.architecture.stop_token_ids

    def _text(self, ids: Sequence[int]) -> str:
        return shown_text(self.target.tokenizer)(ids)


def _sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
