"""Chat templates that write today's date render the same text every day."""

from datetime import datetime

import pytest
from transformers.utils import chat_template_utils

from deepspec_core.data.conversations import Conversation
from deepspec_core.data.template_day import DAY, told_the_day
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.errors import DataError
from deepspec_core.testing.tiny_tokenizer import tiny_format, tiny_tokenizer

MESSAGES = ({"role": "user", "content": "What?"},)


def _chat(beginning: str) -> ChatTokenizer:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = beginning + str(tokenizer.chat_template)
    return ChatTokenizer(tokenizer)


@pytest.mark.parametrize("form", ["%d %b %Y", "%Y-%m-%d", "%H:%M:%S", "%A, %-d %B", "100%% of %y", "no code"])
def test_the_day_is_always_the_same(form: str) -> None:
    says = "{%- if strftime_now is defined %}\n{%- set today = strftime_now('" + form + "') %}{{ today }}\n{%- endif %}"
    chat = _chat(says)
    plain = ChatTokenizer(tiny_tokenizer()).render(MESSAGES, None, prompt=True)
    assert chat.render(MESSAGES, None, prompt=True) == DAY.strftime(form) + plain
    conversation = Conversation(id="c", messages=(*MESSAGES, {"role": "assistant", "content": "That."}))
    (together,) = chat.renderings([conversation], None)
    assert together[1, True] == DAY.strftime(form) + plain


@pytest.mark.parametrize("beginning", ["", "\n", "  {% set x = 1 %}\n", "\n\n  {%- set x = 1 %}a", "{{- 'a' }}\n"])
def test_nothing_else_of_a_template_changes(beginning: str) -> None:
    own = beginning + "{{ messages[0]['content'] }}{# strftime_now #}\n"
    said, _ = chat_template_utils.render_jinja_template([list(MESSAGES)], chat_template=own)
    told, _ = chat_template_utils.render_jinja_template([list(MESSAGES)], chat_template=told_the_day(own))
    assert told == said


def test_the_day_is_part_of_the_fingerprint_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprints() -> list[str]:
        return [_chat(text).template_fingerprint(tiny_format(), None) for text in ("", "{{- strftime_now('%Y') }}")]

    plain, dated = fingerprints()
    monkeypatch.setattr("deepspec_core.data.tokenize.DAY", datetime(2025, 1, 1))
    assert [found == before for found, before in zip(fingerprints(), (plain, dated), strict=True)] == [True, False]


def test_a_mistake_in_such_a_template_is_told_by_its_own_line() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y') }}\n{% if %}"
    with pytest.raises(DataError, match="line 2:"):
        ChatTokenizer(tokenizer).render(MESSAGES, None, prompt=True)
