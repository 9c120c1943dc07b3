"""Runs a target's chat template: it returns the rendered messages, or the reason why the template refuses them.

Templates come with targets, and rows from anywhere. So any error inside a template refuses the row and does not stop
the run. Knows how transformers runs a template, and what templates expect; knows neither tokens nor supervision.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final

from attrs import define

from deepspec_core.data.answers import Messages, TemplateRefusal
from deepspec_core.data.generation_marks import marked_spans, with_signs
from deepspec_core.data.template_day import asks_for_the_day, told_the_day, without_the_day
from deepspec_core.errors import DataError

_ARGUMENTS: Final = {"key": "value"}
_ASKED: Final = {"role": "user", "content": "?"}
_ANSWER: Final = {"role": "assistant", "content": "!"}
_TOOL: Final = {
    "type": "function",
    "function": {"name": "f", "description": "!", "parameters": {"type": "object", "properties": {}}},
}


@define(slots=False, kw_only=True)
class Template:
    """The chat template of a transformers tokenizer."""

    tokenizer: Any

    def render(
        self,
        messages: Messages,
        *,
        prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool = False,
        source: str | None = None,
    ) -> str:
        """The text; with `prompt` it ends where the assistant is to begin. `source`: another template in its place.

        Raises TemplateRefusal if the template raises any error. Raises DataError if it is no template.
        """
        called = any(message.get("tool_calls") for message in messages)
        said = [_with_text(message) for message in messages] if called and self._wants_text else messages
        return self._run(said, prompt=prompt, tools=tools, thinking=thinking, source=source)

    def render_each(
        self, conversations: Sequence[Messages], *, prompt: bool, thinking: bool = False
    ) -> list[str | None]:
        """The texts of conversations without tools and calls, each as of `render`; None in place of a refused one.

        One call for all takes half the time of one for each.
        """
        if not conversations:
            return []
        try:
            texts = self.tokenizer.apply_chat_template(
                [[dict(message) for message in messages] for messages in conversations],
                chat_template=told_the_day(self.source()),
                tokenize=False,
                add_generation_prompt=prompt,
                enable_thinking=thinking,
            )
        except Exception:  # `render` reports the reason
            if len(conversations) == 1:
                return [None]
            half = len(conversations) // 2
            return [
                text
                for some in (conversations[:half], conversations[half:])
                for text in self.render_each(some, prompt=prompt, thinking=thinking)
            ]
        return list(map(str, texts))

    def marks(
        self, messages: Messages, rendering: str, *, tools: Sequence[Mapping[str, Any]], thinking: bool
    ) -> list[tuple[int, int]] | None:
        """The spans between {% generation %} marks in the rendering of finished messages; None: there are no marks."""
        if not self.has_marks:
            return None
        source = self.source(tools)
        signed = with_signs(source)
        if signed == source:
            return None
        text, spans = marked_spans(self.render(messages, prompt=False, tools=tools, thinking=thinking, source=signed))
        if text != rendering:
            raise TemplateRefusal(
                "The chat template refuses a conversation", found="its {% generation %} marks cannot be followed"
            )
        return spans

    @cached_property
    def has_marks(self) -> bool:
        """Whether the template marks the text to supervise."""
        return any(with_signs(source) != source for source in (self.source(), self.source([_TOOL])))

    @cached_property
    def has_day(self) -> bool:
        """Whether the template writes the present date (template_day.DAY)."""
        return any(asks_for_the_day(source) for source in (self.source(), self.source([_TOOL])))

    def source(self, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The template's own text; some tokenizers have another one for tools.

        Raises DataError if none is the default.
        """
        try:
            return str(self.tokenizer.get_chat_template(None, list(tools) or None))
        except ValueError as error:
            raise DataError(
                "The tokenizer has no default chat template",
                where=self.tokenizer.name_or_path or "tokenizer",
                found=error,
                fix="Name a template's file in target.chat_template.",
            ) from error

    def all_it_writes(self) -> str:
        """The template's source, and its renderings of conversations with everything that a template may use."""
        call = {**_call(_ARGUMENTS), "reasoning_content": "!"}
        whole = [{"role": "system", "content": "!"}, _ASKED, call, _result(), {**_ANSWER, "reasoning_content": "!"}]
        texts = [self.source(), self.source([_TOOL])]
        for messages, tools in (([_ASKED, _ANSWER], []), ([_ASKED], []), (whole, [_TOOL]), (whole[1:], [_TOOL])):
            for thinking in (False, True):
                prompt = messages[-1]["role"] == "user"
                try:
                    texts.append(self.render(messages, prompt=prompt, tools=tools, thinking=thinking))
                except TemplateRefusal:
                    continue  # the template refuses such conversations
        return "\n".join(texts)

    @cached_property
    def _wants_text(self) -> bool:
        """Whether it takes the arguments of a call as JSON text: it fails on an object, or writes it as Python does."""

        def written(arguments: Any) -> str | None:
            try:
                return self._run([_ASKED, _call(arguments), _result(), _ANSWER], prompt=False)
            except TemplateRefusal:
                return None

        text, of_object = json.dumps(_ARGUMENTS), written(_ARGUMENTS)
        return (of_object is None or repr(_ARGUMENTS) in of_object) and text in (written(text) or "")

    def _run(
        self,
        messages: Messages,
        *,
        prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool = False,
        source: str | None = None,
    ) -> str:
        from jinja2 import TemplateError, TemplateSyntaxError

        source = self.source(tools) if source is None else source
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=told_the_day(source),
                tokenize=False,
                add_generation_prompt=prompt,
                enable_thinking=thinking,
            )
        except TemplateSyntaxError as error:
            raise DataError(
                "The chat template is not a valid Jinja template",
                where=self.tokenizer.name_or_path or "tokenizer",
                found=f"line {without_the_day(error.lineno, source)}: {error.message}",
            ) from error
        except Exception as error:  # a template computes with what a row says, and so fails as any program does
            roles = ", ".join(message["role"] for message in messages)
            said = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            raise TemplateRefusal(
                "The chat template refuses a conversation", found=f"{said} (roles: {roles})"
            ) from error
        return str(text)


def _call(arguments: Any) -> dict[str, Any]:
    # Some templates ask for an identity of nine letters and digits.
    call = {"id": "a12345678", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _result() -> dict[str, Any]:
    return {"role": "tool", "name": "f", "content": "!", "tool_call_id": "a12345678"}


def _with_text(message: Mapping[str, Any]) -> dict[str, Any]:
    def as_text(function: Mapping[str, Any]) -> dict[str, Any]:
        return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}

    calls = [{**call, "function": as_text(call["function"])} for call in message.get("tool_calls", ())]
    return {**message, "tool_calls": calls} if calls else dict(message)
