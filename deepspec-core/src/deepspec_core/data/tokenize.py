"""From conversations to tokens and loss masks, and from messages to prompts: one template for all stages.

Answers are located by rendering, never by searching for markers, which users may write too: two renderings that differ
in one message's text part where that text begins. Supervised is the assistant's text up to and including its end
marker; what the template puts before it (an empty think block) is not. Knows chat templates and offsets; no family, no
files.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from attrs import frozen

from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import ConversationFormat
from deepspec_core.data.conversations import Conversation
from deepspec_core.errors import DataError

Messages = Sequence[Mapping[str, str]]


@frozen(kw_only=True)
class Answer:
    """Characters of a rendered conversation: the text [start, text_end), then the end marker [text_end, end)."""

    start: int
    text_end: int
    end: int


class ChatTokenizer:
    """A transformers fast tokenizer with a chat template. `thinking` decides how prompts end."""

    def __init__(self, tokenizer: Any, *, thinking: bool = False) -> None:
        self.tokenizer = tokenizer
        self.thinking = thinking
        name = tokenizer.name_or_path or "tokenizer"
        if not tokenizer.is_fast:
            raise DataError("The tokenizer has no offsets", where=name, expected="a fast tokenizer (tokenizer.json)")
        if not tokenizer.chat_template:
            raise DataError(
                "The tokenizer has no chat template",
                where=name,
                expected="chat_template.jinja, or chat_template in tokenizer_config.json",
                fix="Use the instruction-tuned model's tokenizer.",
            )

    def render(self, messages: Messages, system_prompt: str | None, *, prompt: bool) -> str:
        """The template's text; with `prompt` it ends where the assistant is to begin."""
        from jinja2 import TemplateError

        whole = [dict(message) for message in messages]
        if system_prompt is not None and whole[0]["role"] != "system":
            whole.insert(0, {"role": "system", "content": system_prompt})
        options = {"enable_thinking": self.thinking} if prompt else {}
        try:
            text = self.tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=prompt, **options)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in whole)
            raise DataError("The chat template refuses a conversation", found=f"{error} (roles: {roles})") from error
        return str(text)

    def render_prompt(self, messages: Messages, system_prompt: str | None = None) -> tuple[int, ...]:
        """Token ids of a prompt that ends where the assistant is to begin. The last message is not the assistant's."""
        text = self.render(messages, system_prompt, prompt=True)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of rendered text, and the characters each stands for."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def answers(
        self, text: str, messages: Messages, fmt: ConversationFormat, system_prompt: str | None, *, prompt: bool = False
    ) -> list[Answer]:
        """Where the assistant speaks in `text`, the rendering of `messages`; DataError where it does not fit `fmt`."""
        found = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            begin = self._content_begin(text, messages, index, system_prompt, prompt)
            marker = text.rfind(fmt.assistant_start, 0, begin)
            if marker < 0:
                raise DataError(
                    "The chat template and the family's conversation format disagree",
                    found=repr(text[:begin][-60:]) + " before an answer",
                    expected=repr(fmt.assistant_start),
                )
            content = message["content"]
            # An answer with reasoning of its own is rewritten by templates and then begins right after the marker.
            as_given = any(text.startswith(form, begin) for form in (content, content.lstrip(), content.strip()))
            start = begin if as_given else marker + len(fmt.assistant_start)
            limit = len(text)
            if index + 1 < len(messages):
                limit = self._content_begin(text, messages, index + 1, system_prompt, prompt)
            text_end, end = _last_marker(text, start, limit, fmt.assistant_ends)
            if end < 0:
                raise DataError(
                    "An answer has no end marker in the chat template's rendering",
                    found=repr(text[start:limit][-60:]),
                    expected=" or ".join(map(repr, fmt.assistant_ends)),
                )
            found.append(Answer(start=start, text_end=text_end, end=end))
        return found

    def tokenize(
        self, conversation: Conversation, fmt: ConversationFormat, system_prompt: str | None, max_length: int
    ) -> Sample:
        """A sample of at most max_length tokens, cut one token after its last supervised one.

        Tokens that came with the conversation are taken as they are. `original_length` counts tokens before that cut.
        """
        if conversation.input_ids is not None and conversation.loss_mask is not None:
            ids, mask = list(conversation.input_ids), [bool(flag) for flag in conversation.loss_mask]
        else:
            text = self.render(conversation.messages, system_prompt, prompt=False)
            answers = self.answers(text, conversation.messages, fmt, system_prompt)
            ids, offsets = self.encode(text)
            mask = supervised(offsets[:max_length], answers)
        ids, mask = ids[:max_length], mask[:max_length]
        last = max((index for index, flag in enumerate(mask) if flag), default=-1)
        keep = min(last + 2, len(ids))
        return Sample(
            id=conversation.id,
            input_ids=torch.tensor(ids[:keep], dtype=torch.long),
            loss_mask=torch.tensor(mask[:keep], dtype=torch.bool),
            original_length=len(ids),
        )

    def template_fingerprint(self, fmt: ConversationFormat, system_prompt: str | None) -> str:
        """Digest of what decides a sample's tokens beside the vocabulary: template, system prompt, format."""
        facts = [
            self.tokenizer.chat_template,
            system_prompt,
            fmt.assistant_start,
            list(fmt.assistant_ends),
            self.thinking,
        ]
        return _digest(json.dumps(facts))

    def tokenizer_fingerprint(self) -> str:
        """Digest of the vocabulary, the merges and the normalisation."""
        return _digest(str(self.tokenizer.backend_tokenizer.to_str()))

    def _content_begin(self, text: str, messages: Messages, index: int, system_prompt: str | None, prompt: bool) -> int:
        """Where the text of message `index` begins: up to there, another text in its place renders the same."""
        content = messages[index]["content"].lstrip()
        swapped = [dict(message) for message in messages]
        swapped[index]["content"] = "Y" if content.startswith("X") else "X"
        other = self.render(swapped, system_prompt, prompt=prompt)
        return _common_prefix(text, other)


def supervised(offsets: Sequence[tuple[int, int]], answers: Sequence[Answer]) -> list[bool]:
    """Per token, whether it lies within an answer. Of a marker that is cut off, no token counts."""
    seen = offsets[-1][1] if offsets else 0
    spans = iter([(answer.start, answer.end if answer.end <= seen else answer.text_end) for answer in answers])
    mask, (start, end) = [], next(spans, (seen, seen))
    for begin, stop in offsets:
        while begin >= end and end < seen:
            start, end = next(spans, (seen, seen))
        mask.append(start <= begin < stop <= end)
    return mask


def tokenize_all(
    conversations: Iterable[Conversation],
    tokenizer: ChatTokenizer,
    fmt: ConversationFormat,
    *,
    system_prompt: str | None,
    max_length: int,
    min_supervised_tokens: int,
    counts: Counter[str] | None = None,
) -> Iterator[Sample]:
    """The samples worth training on. `counts` receives samples, tokens, supervised_tokens, truncated and too_short.

    `too_short` are those dropped for having fewer than min_supervised_tokens supervised tokens within max_length;
    `truncated` are kept ones that reach max_length.
    """
    counts = Counter() if counts is None else counts
    for conversation in conversations:
        try:
            sample = tokenizer.tokenize(conversation, fmt, system_prompt, max_length)
        except DataError as error:
            raise DataError(error.problem, where=f"conversation {conversation.id}", found=error.found) from error
        num_supervised = int(sample.loss_mask.sum())
        if num_supervised < min_supervised_tokens:
            counts["too_short"] += 1
            continue
        counts["samples"] += 1
        counts["tokens"] += len(sample.input_ids)
        counts["supervised_tokens"] += num_supervised
        counts["truncated"] += sample.original_length == max_length
        yield sample


def _last_marker(text: str, start: int, limit: int, markers: Sequence[str]) -> tuple[int, int]:
    begin, end = -1, -1
    for marker in markers:
        at = text.rfind(marker, start, limit)
        if at + len(marker) > end and at >= 0:
            begin, end = at, at + len(marker)
    return begin, end


def _common_prefix(one: str, other: str) -> int:
    """Its length, by bisection: slices compare at memory speed."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
