"""Regeneration: reads conversations and writes them with the target's own answers.

It can be repeated: each finished conversation is appended to OUT.partial as one flushed line, and a rerun answers only
the missing ones. When all are done, they are written in the order of the input under the final name. Knows turns and
files. answering.py defines who answers (this process or servers); the caller provides the conversations.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Final

from attrs import define, field

from deepspec_core.config.schema import RegenerateOptions
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.contracts.target import ConversationFormat, SamplingDefaults, TargetModel
from deepspec_core.crew import ALONE, Crew
from deepspec_core.data.answering import Answer, Answerer, Turn, Unanswered, in_process
from deepspec_core.data.conversations import Conversation
from deepspec_core.data.dialogue import Dialogue, has_results
from deepspec_core.data.failure_budget import FailureBudget
from deepspec_core.data.left_out import name_of
from deepspec_core.data.regenerate_report import COUNTED, RegenerateReport, none_fits, report_of
from deepspec_core.data.regenerated_file import (
    CUT,
    MARKS,
    TOO_LONG,
    beside,
    counted,
    finish,
    tally_of,
    write_checked,
    write_line,
)
from deepspec_core.data.regenerated_parts import WorkerFiles
from deepspec_core.data.thinking import thinks
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.data.unicode_text import not_unicode
from deepspec_core.decoding.engine import Completion, Request
from deepspec_core.errors import DataError

log = logging.getLogger("deepspec")

NO_CALLS: Final = "it has tool results, and the chat template writes no tool calls"


def sample_seed(seed: int, identity: str, turn: int = 0) -> int:
    """A turn's own seed. It does not depend on other conversations or on the place in the file."""
    digest = hashlib.sha256(f"{seed}/{identity}/{turn}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def sampling_of(options: RegenerateOptions, defaults: SamplingDefaults) -> Sampling:
    """The run file's sampling, completed with the family's recommended values."""

    def choose(name: str) -> Any:
        given = getattr(options, name)
        return getattr(defaults, name) if given is None else given

    return Sampling(
        temperature=choose("temperature"), top_p=choose("top_p"), top_k=choose("top_k"), min_p=choose("min_p")
    )


def regenerate(
    conversations: Iterable[Conversation],
    *,
    target: TargetModel | None = None,
    tokenizer: ChatTokenizer,
    fmt: ConversationFormat,
    options: RegenerateOptions,
    sampling: Sampling,
    stop_ids: Sequence[int],
    out: Path,
    seed: int,
    max_length: int,
    system_prompt: str | None = None,
    total: int | None = None,
    answerer: Answerer | None = None,
    crew: Crew = ALONE,
    keep: Callable[[Mapping[str, Any], Answer], None] = lambda _line, _answer: None,
) -> RegenerateReport:
    """Answer every user turn of every conversation, in order, each on top of the target's own earlier answers.

    Where an answer calls a tool, the recorded results that follow are said, and answered in turn.

    Whoever is `answerer` answers, or `target` in this process. `keep` gets each line before it is written, and the
    answer that it ends with, or that was left out at its end.

    Lines of `out`: id, messages, tools where it has any, thinking where options.thinking is a share, prompt_ids and
    output_ids of the last answered turn, finish_reason ("stop" or "length"), prompt_answers, the token spans of the
    prompt that are earlier answers exactly as emitted, and rewritten, the prompt and output ids of those that are not;
    mismatched, the number of answers whose ids were made from text and are not as many as counted, where there are any;
    skipped_results, the number of recorded tool results that were not said, where there are any.
    A finished `out` is left as it is. Failures go to OUT.failures.jsonl with their reason, and DataError ends the run
    where they are more than options.max_failures of all. `total`, where known, is for the progress shown. Ids are
    unique.

    The conversations that are missing are dealt out to the workers of `crew` in turn. The report of a worker other than
    the first is of its own share.
    """
    partial, failures_path = beside(out, ".partial"), beside(out, ".failures.jsonl")
    if crew.told_by_first("regenerated before", out.exists()):
        if not crew.first:
            return report_of(out, failures_path, Counter(), written=0, **dict.fromkeys(COUNTED, 0))
        partial.unlink(missing_ok=True)
        before = counted(failures_path)
        return report_of(out, failures_path, tally_of(out), written=0, **{name: before[name] for name in COUNTED})
    if answerer is None:
        assert target is not None, "somebody answers"
        answerer = in_process(
            target,
            sampling=sampling,
            stop_ids=stop_ids,
            max_tokens=options.max_tokens,
            batch_size=options.batch_size,
            max_length=max_length,
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    files = WorkerFiles(partial, failures_path, crew)
    budget = FailureBudget(crew, options.max_failures, failures_path, done=len(files.finished))
    with files.lines.open("ab") as lines, files.failures.open("ab") as side:
        work = _Work(
            source=iter(conversations),
            tokenizer=tokenizer,
            fmt=fmt,
            system_prompt=system_prompt,
            stop_ids=frozenset(stop_ids),
            seed=seed,
            max_length=max_length,
            options=options,
            finished=files.finished,
            failures=side,
            budget=budget,
            crew=crew,
        )
        done = len(files.finished)
        with crew.progress(total, "regenerate", "conversations", done=done, meanwhile=budget.check) as progress:
            for outcome in answerer(work.requests):
                crew.check()
                if isinstance(outcome, Unanswered):
                    work.give_up(outcome)
                elif (line := work.settle(outcome)) is not None:
                    keep(line, outcome)
                    write_checked(lines, line)
                    progress.advance(failures=budget.failures)
        counts = {"written": work.num_written, "failures": budget.own, **{mark: work.left_out[mark] for mark in MARKS}}
        told = files.collect(counts, work.order)
    if not crew.first:
        return report_of(out, failures_path, Counter(conversations=work.num_written), **counts)
    if told["too_long"] == len(work.order) > 0:
        raise none_fits(failures_path, len(work.order), max_length)
    # A prompt without room for an answer says nothing about the share that fails.
    budget.check_all(told["failures"], len(work.order) - told["too_long"])
    tally = finish(partial, out, list(work.order))
    numbers = {**told, "cut": files.cut + told["cut"]}
    return report_of(out, failures_path, tally, **{name: numbers.get(name, 0) for name in counts})


@define
class _Work:
    """Hands out requests, takes answers back, and counts them."""

    source: Iterator[Conversation]
    tokenizer: ChatTokenizer
    fmt: ConversationFormat
    system_prompt: str | None
    stop_ids: frozenset[int]
    seed: int
    max_length: int
    options: RegenerateOptions
    finished: set[str]
    failures: IO[bytes]
    budget: FailureBudget
    crew: Crew
    order: dict[str, None] = field(factory=dict)
    under_way: dict[str, Dialogue] = field(factory=dict)
    next_turns: deque[Request] = field(factory=deque)
    left_out: Counter[str] = field(factory=Counter)
    num_written: int = 0
    num_missing: int = 0

    def requests(self) -> Iterator[Request]:
        """Next turns first. Ends when there is nothing to hand out now: turns that follow later need another call."""
        while True:
            if self.next_turns:
                yield self.next_turns.popleft()
                continue
            conversation = next(self.source, None)
            if conversation is None:
                return
            assert conversation.id not in self.order, f"conversation {conversation.id} comes twice"
            self.order[conversation.id] = None
            if conversation.id in self.finished:
                continue
            own = self.num_missing % self.crew.count == self.crew.rank
            self.num_missing += 1
            if own and (request := self._first_turn(conversation)) is not None:
                yield request

    def settle(self, answer: Answer) -> dict[str, Any] | None:
        """The finished conversation's line, or None where it goes on with another turn or is left out."""
        completion = answer.completion
        dialogue = self.under_way[completion.id]
        if completion.finish_reason == "length" and self.options.unfinished == "drop":
            return self._without_the_cut(dialogue)
        output = completion.output_ids
        text_ids = output[:-1] if output[-1] in self.stop_ids else output
        dialogue.history.append({"role": "assistant", "content": self.tokenizer.decode(text_ids)})
        dialogue.turns.append(completion)
        dialogue.mismatched += answer.mismatched
        dropped = 0
        if completion.finish_reason == "stop" and dialogue.goes_on(called=self._calls(dialogue)):
            try:
                request = self._turn(dialogue)
            except DataError as error:
                log.info(
                    "%s: the conversation ends here, without its further turns: %s (%s)",
                    completion.id,
                    error.problem,
                    error.found,
                )
            else:
                if len(request.prompt_ids) < self.max_length:
                    self.next_turns.append(request)
                    return None
            dropped = 1
            dialogue.end_with_an_answer()
        return self._line(dialogue, dropped + dialogue.questions_ahead)

    def give_up(self, unanswered: Unanswered) -> None:
        """Count the request's conversation as a failure."""
        del self.under_way[unanswered.id]
        self._fail(unanswered.id, unanswered.reason)

    def _without_the_cut(self, dialogue: Dialogue) -> dict[str, Any] | None:
        """The line of the turns before the answer that met the limit. The side file has a conversation without any."""
        if dialogue.turns:
            dialogue.end_with_an_answer()
            return self._line(dialogue, 1 + dialogue.questions_ahead)
        identity = dialogue.conversation.id
        del self.under_way[identity]
        self._leave_out(identity, f"cut at {self.options.max_tokens} tokens", CUT)
        return None

    def _line(self, dialogue: Dialogue, dropped: int) -> dict[str, Any]:
        identity, tools, last = dialogue.conversation.id, dialogue.conversation.tools, dialogue.turns[-1]
        spans, rewritten = self._earlier_answers(dialogue, dialogue.history[:-1])
        del self.under_way[identity]
        self.num_written += 1
        thinking = self.options.thinking
        return {
            "id": identity,
            "messages": dialogue.history,
            **({"tools": tools} if tools else {}),
            **({} if isinstance(thinking, bool) else {"thinking": thinks(thinking, identity)}),
            "prompt_ids": last.prompt_ids,
            "prompt_answers": spans,
            "output_ids": last.output_ids,
            "finish_reason": last.finish_reason,
            "dropped_turns": dropped,
            "rewritten": [(turn.prompt_ids, turn.output_ids) for turn in rewritten],
            **({"mismatched": dialogue.mismatched} if dialogue.mismatched else {}),
            **({"skipped_results": skipped} if (skipped := dialogue.skipped_results) else {}),
        }

    def _first_turn(self, conversation: Conversation) -> Request | None:
        reason = self._unanswerable(conversation)
        if reason is None:
            dialogue = Dialogue(conversation)
            dialogue.goes_on(called=False)  # nobody asked for results before the first question
            try:
                request = self._turn(dialogue)
            except DataError as error:
                reason = f"{error.problem}: {error.found}"
            else:
                if len(request.prompt_ids) < self.max_length:
                    self.budget.seen()
                    self.under_way[conversation.id] = dialogue
                    return request
                found = f"{len(request.prompt_ids)} prompt tokens do not fit {self.max_length}"
                self._leave_out(conversation.id, found, TOO_LONG)
                return None
        self.budget.seen()
        self._fail(conversation.id, reason)
        return None

    def _leave_out(self, identity: str, reason: str, mark: str) -> None:
        """It is no failure: nothing is wrong with the conversation."""
        self.left_out[mark] += 1
        write_line(self.failures, {"id": identity, "reason": reason, mark: True})

    def _fail(self, identity: str, reason: str) -> None:
        write_line(self.failures, {"id": identity, "reason": reason})
        self.budget.failed()

    def _tokenizer(self, identity: str) -> ChatTokenizer:
        return self.tokenizer.in_mode(thinks(self.options.thinking, identity))

    def _unanswerable(self, conversation: Conversation) -> str | None:
        found = not_unicode(conversation.id, conversation.messages, conversation.tools)
        if found is not None:
            return f"it is not valid Unicode: {found}"
        roles = {message["role"] for message in conversation.messages}
        if "user" not in roles:
            return "no user message"
        if has_results(conversation) and self._tokenizer(conversation.id).call_form(self.fmt) is None:
            return NO_CALLS
        return None

    def _calls(self, dialogue: Dialogue) -> bool:
        """Whether the last answer calls a tool."""
        form = self._tokenizer(dialogue.conversation.id).call_form(self.fmt)
        names = filter(None, map(name_of, dialogue.conversation.tools))
        return form is not None and form.is_in(dialogue.history[-1]["content"], names)

    def _turn(self, dialogue: Dialogue) -> Request:
        """Add the messages before the next answer, and make its request."""
        dialogue.say_next()
        identity = dialogue.conversation.id
        return Turn(
            id=identity,
            ends=dialogue.questions_ahead == 0,
            prompt_ids=self._tokenizer(identity).render_prompt(
                dialogue.history, self.system_prompt, dialogue.conversation.tools
            ),
            seed=sample_seed(self.seed, identity, len(dialogue.turns)),
        )

    def _earlier_answers(
        self, dialogue: Dialogue, messages: Sequence[dict[str, Any]]
    ) -> tuple[list[tuple[int, int]], list[Completion]]:
        """Token spans of earlier answers in the last prompt that equal what was emitted, and the turns that do not."""
        *earlier, last = dialogue.turns
        if not earlier:
            return [], []
        tools = dialogue.conversation.tools
        tokenizer = self._tokenizer(dialogue.conversation.id)
        text = tokenizer.render(messages, self.system_prompt, prompt=True, tools=tools)
        _, offsets = tokenizer.encode(text)
        spans, rewritten = [], []
        answers = tokenizer.replies(messages, self.fmt, self.system_prompt, tools)
        for answer, turn in zip(answers, earlier, strict=True):
            span = answer.tokens_in(text, offsets)
            if span and tuple(last.prompt_ids[slice(*span)]) == tuple(turn.output_ids):
                spans.append(span)
            else:
                rewritten.append(turn)
        return spans, rewritten
