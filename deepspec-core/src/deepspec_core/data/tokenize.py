"""From conversations to tokens and loss masks, and from messages to prompts: one template for all stages.

Supervised is each assistant text up to and including its end marker; what the template puts before it is not, unless
asked for (answers.Supervision). One tokenisation of the whole text, with character offsets, decides per token. Knows
chat templates and offsets; no family, no files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from attrs import asdict, frozen

from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import ConversationFormat
from deepspec_core.data.answers import (
    Answer,
    Messages,
    Openings,
    Reply,
    Supervision,
    TemplateRefusal,
    answered,
    last_run,
    openings_of,
    replies,
    rows,
)
from deepspec_core.data.control_tokens import control_tokens, found_in
from deepspec_core.data.conversations import Conversation
from deepspec_core.data.encoding import Encoding, Row, TextRow, TokenRow, cut
from deepspec_core.data.generation_marks import within
from deepspec_core.data.left_out import LeftOut, left_out, unmarked
from deepspec_core.data.rendering import Template
from deepspec_core.data.template_day import DAY
from deepspec_core.data.tool_calls import ASKED, TOOL, CallForm, form_of
from deepspec_core.data.unicode_text import not_unicode
from deepspec_core.errors import DataError

PLAIN = Supervision()
# A conversation's texts by (its first so many messages, whether the assistant is asked); None: not rendered yet.
Renderings = Mapping[tuple[int, bool], str | None]
NOTHING_KNOWN: Final[Renderings] = MappingProxyType({})


class ControlTokens(TemplateRefusal):
    """A message contains what the chat template writes between messages."""


@frozen(kw_only=True)
class Dropped:
    """A conversation, or one row of it, that is not trained on: which, and why in words."""

    id: str
    reason: str


class ChatTokenizer:
    """A transformers fast tokenizer with a chat template. `thinking` decides how prompts end.

    `stop_ids` are the tokens at which the target stops: no text may contain one of them that is a special token.
    """

    def __init__(self, tokenizer: Any, *, thinking: bool = False, stop_ids: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.thinking = thinking
        self._stop_ids = tuple(stop_ids)
        self._template = Template(tokenizer=tokenizer)
        self._other_mode: ChatTokenizer | None = None
        self._openings: dict[str, Openings] = {}
        self._call_forms: dict[str, CallForm | None] = {}
        self._control_tokens: tuple[str, ...] | None = None
        self._refused_tokens: tuple[str, ...] | None = None
        self._known_forms: dict[bool, dict[bytes, str | None]] = {False: {}, True: {}}
        self._encoding = Encoding(tokenizer=tokenizer)
        name = tokenizer.name_or_path or "tokenizer"
        if not tokenizer.is_fast:
            raise DataError("The tokenizer has no offsets", where=name, expected="a fast tokenizer (tokenizer.json)")
        if not tokenizer.chat_template:
            raise DataError(
                "The tokenizer has no chat template",
                where=name,
                expected="chat_template.jinja, or chat_template in tokenizer_config.json",
                fix="Use the instruction-tuned model's tokenizer, or name a template's file in target.chat_template.",
            )

    def in_mode(self, thinking: bool) -> ChatTokenizer:
        """The same tokenizer and template, asking with or without thinking."""
        if thinking == self.thinking:
            return self
        if self._other_mode is None:
            self._other_mode = ChatTokenizer(self.tokenizer, thinking=thinking, stop_ids=self._stop_ids)
        return self._other_mode

    def render(
        self,
        messages: Messages,
        system_prompt: str | None,
        *,
        prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
    ) -> str:
        """The template's text; with `prompt` it ends where the assistant is to begin.

        `system_prompt` stands before messages without a system message of their own; `tools` are offered to the
        assistant; `thinking` is the tokenizer's own mode where left out.
        """
        return self._template.render(
            _with_system(messages, system_prompt),
            prompt=prompt,
            tools=tools,
            thinking=self.thinking if thinking is None else thinking,
        )

    def render_prompt(
        self, messages: Messages, system_prompt: str | None = None, tools: Sequence[Mapping[str, Any]] = ()
    ) -> tuple[int, ...]:
        """Token ids of a prompt that ends where the assistant is to begin. The last message is not the assistant's.

        TemplateRefusal where the template leaves out a message or a tool, or a message contains its control tokens or
        is not valid Unicode.
        """
        _refuse_not_unicode(messages, tools, system_prompt)
        self._refuse_control_tokens(messages, tools, system_prompt)
        text = self.render(messages, system_prompt, prompt=True, tools=tools)
        self._refuse_left_out(text, messages, tools, system_prompt, prompt=True)
        # verbose: the library would warn of a long prompt, which callers refuse or count in their own words.
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _refuse_left_out(
        self,
        text: str,
        messages: Messages,
        tools: Sequence[Mapping[str, Any]],
        system_prompt: str | None,
        *,
        prompt: bool,
    ) -> None:
        def render(said: Messages, offered: Sequence[Mapping[str, Any]]) -> str:
            return self.render(said, None, prompt=prompt, tools=offered)

        whole = _with_system(messages, system_prompt)
        first = len(messages) - len(whole)  # the system prompt has no number of its own
        missing = left_out(text, whole, tools, first=first) or unmarked(
            render, whole, tools, first=first, known=self._known_forms[prompt]
        )
        if missing is not None:
            raise LeftOut(missing)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of rendered text, and the characters each stands for."""
        return self._encoding.with_offsets(text)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def replies(
        self,
        messages: Messages,
        fmt: ConversationFormat,
        system_prompt: str | None,
        tools: Sequence[Mapping[str, Any]] = (),
        known: Renderings = NOTHING_KNOWN,
    ) -> list[Reply]:
        """The assistant's answers; DataError where the renderings do not fit `fmt`. `known` are not rendered again."""

        def rendered(messages: Messages, *, prompt: bool) -> str:
            text = known.get((len(messages), prompt))
            return self.render(messages, system_prompt, prompt=prompt, tools=tools) if text is None else text

        return replies(rendered, messages, fmt, self.openings(fmt), thinking=self.thinking)

    def renderings(self, conversations: Sequence[Conversation], system_prompt: str | None) -> list[Renderings]:
        """What `replies` renders of each conversation, made in one go, and nothing of one that is better read alone."""
        asked = [
            (number, index)
            for number, each in enumerate(conversations)
            if each.input_ids is None and not each.tools and not any("tool_calls" in said for said in each.messages)
            for index in answered(each.messages)
        ]
        found: list[dict[tuple[int, bool], str | None]] = [{} for _ in conversations]
        for prompt in (True, False):
            lengths = [(number, index if prompt else index + 1) for number, index in asked]
            said = [_with_system(conversations[number].messages[:length], system_prompt) for number, length in lengths]
            texts = self._template.render_each(said, prompt=prompt, thinking=self.thinking)
            for (number, length), text in zip(lengths, texts, strict=True):
                found[number][length, prompt] = text
        return list(found)

    def can_ask(self, thinking: bool | float, fmt: ConversationFormat) -> bool:
        """Whether the template has the mode: False always, True also where its prompts begin thinking in any case.

        Other templates write the same prompts with thinking and without.
        """
        if thinking is False:
            return True
        asked = [{"role": "user", "content": "?"}]
        without, with_thinking = (self.render(asked, None, prompt=True, thinking=mode) for mode in (False, True))
        return without != with_thinking or (thinking is True and bool(self.openings(fmt).with_thinking.strip()))

    def control_tokens(self) -> tuple[str, ...]:
        """The special tokens that the chat template itself writes, as text."""
        if self._control_tokens is None:
            self._control_tokens = control_tokens(self.tokenizer, self._template.all_it_writes())
        return self._control_tokens

    def refused_tokens(self) -> tuple[str, ...]:
        """What no text may contain: the control tokens, and the special tokens at which the target stops."""
        if self._refused_tokens is None:
            added = self.tokenizer.added_tokens_decoder
            stops = {str(added[token]) for token in self._stop_ids if token in added and added[token].special}
            self._refused_tokens = tuple(sorted({*self.control_tokens(), *stops}))
        return self._refused_tokens

    def control_token_ids(self) -> tuple[int, ...]:
        """Their ids."""
        return tuple(self.tokenizer.convert_tokens_to_ids(token) for token in self.control_tokens())

    def _refuse_control_tokens(
        self, messages: Messages, tools: Sequence[Mapping[str, Any]], system_prompt: str | None
    ) -> None:
        found = found_in(messages, tools, system_prompt, self.tokenizer, self.refused_tokens())
        if found is not None:
            raise ControlTokens(
                "A text contains a control token of the chat template or of the target",
                found=found,
                expected="text that does not encode to the template's own markers or to a stop token",
            )

    def openings(self, fmt: ConversationFormat) -> Openings:
        """What prompts say after the assistant's header."""
        if fmt.assistant_start not in self._openings:
            question = [{"role": "user", "content": "?"}]
            self._openings[fmt.assistant_start] = openings_of(
                lambda thinking: self.render(question, None, prompt=True, thinking=thinking), fmt
            )
        return self._openings[fmt.assistant_start]

    def call_form(self, fmt: ConversationFormat) -> CallForm | None:
        """How the template writes tool calls; None where it writes none."""
        if fmt.assistant_start not in self._call_forms:
            self._call_forms[fmt.assistant_start] = form_of(
                lambda answer: self.replies([ASKED, answer], fmt, None, [TOOL])[0].text,
                map(str, self.tokenizer.added_tokens_decoder.values()),
            )
        return self._call_forms[fmt.assistant_start]

    def answers(
        self,
        conversation: Conversation,
        fmt: ConversationFormat,
        system_prompt: str | None,
        supervision: Supervision = PLAIN,
        known: Renderings = NOTHING_KNOWN,
    ) -> list[Reply]:
        """The answers that are supervised, before they become tokens. Errors as of `samples`."""
        _refuse_not_unicode(conversation.id, conversation.messages, conversation.tools)
        self._refuse_control_tokens(conversation.messages, conversation.tools, system_prompt)
        answers = self.replies(conversation.messages, fmt, system_prompt, conversation.tools, known)
        if supervision.last_only:
            answers = answers[-1:]
        # Answers of weight 0 are there to be read.
        answers = [answer for answer in answers if conversation.messages[answer.index].get("weight") != 0]
        for answer in answers:
            if answer.lost is not None:
                raise LeftOut(answer.lost)
        for last in answers[-1:]:
            read = conversation.messages[: last.index + 1]
            self._refuse_left_out(last.rendering, read, conversation.tools, system_prompt, prompt=False)
        if not all(answer.text.strip() for answer in answers):
            raise TemplateRefusal("An answer says nothing", found="an answer is nothing but its end marker")
        return answers

    def samples(
        self,
        conversation: Conversation,
        fmt: ConversationFormat,
        system_prompt: str | None,
        max_length: int,
        supervision: Supervision = PLAIN,
    ) -> list[Sample]:
        """A conversation's samples, as of `tokenised`. Errors as of `sample_rows`."""
        return self.tokenised([self.sample_rows(conversation, fmt, system_prompt, supervision)], max_length)[0]

    def sample_rows(
        self,
        conversation: Conversation,
        fmt: ConversationFormat,
        system_prompt: str | None,
        supervision: Supervision = PLAIN,
        known: Renderings = NOTHING_KNOWN,
    ) -> list[Row]:
        """What samples are made of, with the help of `known` (see `renderings`): one as a rule, none without an answer.

        Where the template rewrites earlier answers it is one an answer, with ids ID#1, ID#2, and so on. Tokens that
        came with the conversation are taken as they are.

        TemplateRefusal where a text or the id is not valid Unicode, the template does not take the conversation or
        leaves something of it out (LeftOut), or an answer is nothing but its end marker. ControlTokens where a text
        contains one of the template's.
        """
        found: list[TextRow | TokenRow]
        if conversation.input_ids is not None and conversation.loss_mask is not None:
            _refuse_not_unicode(conversation.id)
            given = list(conversation.given())
            if supervision.last_only:
                given = [(ids, tuple(map(int, last_run(mask)))) for ids, mask in given[-1:]]
            found = [TokenRow(ids=ids, mask=mask) for ids, mask in given]
        else:
            answers = self.answers(conversation, fmt, system_prompt, supervision, known)
            texts = rows(answers, supervision)
            found = [
                TextRow(text=text, spans=self._between_marks(spans, answer, text, conversation, system_prompt))
                for (text, spans), answer in zip(texts, answers[len(answers) - len(texts) :], strict=True)
            ]
        names = [conversation.id] if len(found) == 1 else [f"{conversation.id}#{i + 1}" for i in range(len(found))]
        return [Row(id=name, content=content) for name, content in zip(names, found, strict=True)]

    def joins_start(self, row: Row) -> bool:
        """Whether an answer's first characters share a token with the header before it (Encoding.joins_start)."""
        return isinstance(row.content, TextRow) and self._encoding.joins_start(row.content)

    def tokenised(self, conversations: Sequence[Sequence[Row]], max_length: int) -> list[list[Sample]]:
        """The samples of each conversation's rows, of at most max_length tokens, cut one after the last supervised one.

        `original_length` counts tokens before that cut.
        """
        contents = (row.content for rows_ in conversations for row in rows_)
        encoded = self._encoding.masked([each for each in contents if isinstance(each, TextRow)], max_length)
        return [
            [
                cut(row.id, *(row.content.arrays(max_length) if isinstance(row.content, TokenRow) else next(encoded)))
                for row in rows_
            ]
            for rows_ in conversations
        ]

    def _between_marks(
        self, spans: list[Answer], last: Reply, text: str, conversation: Conversation, system_prompt: str | None
    ) -> list[Answer]:
        """What stands between {% generation %} marks of the spans of a text that ends with the answer `last`."""
        begin = len(last.head)
        own = text[:begin] + text[begin + last.added :]
        said = _with_system(conversation.messages[: last.index + 1], system_prompt)
        marks = self._template.marks(said, own, tools=conversation.tools, thinking=self.thinking)
        if marks is None:
            return spans
        return within(spans, [(b + last.added * (b >= begin), e + last.added * (e > begin)) for b, e in marks])

    def template_fingerprint(
        self, fmt: ConversationFormat, system_prompt: str | None, supervision: Supervision = PLAIN
    ) -> str:
        """Digest of what decides a sample's tokens and mask beside the vocabulary: template, system prompt, format."""
        facts = [
            self.tokenizer.chat_template,
            system_prompt,
            fmt.assistant_start,
            list(fmt.assistant_ends),
            self.thinking,
            *([asdict(supervision)] if supervision != PLAIN else []),
            *(["between generation marks"] if self._template.has_marks else []),
            *([f"day {DAY:%Y-%m-%d}"] if self._template.has_day else []),
            *(["all spaces"] if self._encoding.counts_spaces else []),
            *(["markers that swallow space"] if self._encoding.swallowing else []),
        ]
        return _digest(json.dumps(facts))

    def tokenizer_fingerprint(self) -> str:
        """Digest of the vocabulary, the merges and the normalisation."""
        return _digest(str(self.tokenizer.backend_tokenizer.to_str()))


def _refuse_not_unicode(*values: Any) -> None:
    found = not_unicode(*values)
    if found is not None:
        raise TemplateRefusal("A conversation is not valid Unicode", found=f"it holds {found}")


def _with_system(messages: Messages, system_prompt: str | None) -> list[Mapping[str, Any]]:
    """The messages, after a system prompt where they have no system message of their own."""
    if system_prompt is None or messages[0]["role"] == "system":
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
