"""How each family's template writes tool calls, and which answers make one."""

import pytest
from test_loss_masks import formats, tokenizers

from deepspec_core.contracts.target import ConversationFormat
from deepspec_core.data.tokenize import ChatTokenizer

__all__ = ["formats", "tokenizers"]  # fixtures

CHATML = '<tool_call>\n{"name": "%s", "arguments": {"city": "Paris"}}\n</tool_call>'
CALLS = {
    "qwen3": CHATML,
    "qwen2": CHATML,
    "llama": '{"name": "%s", "parameters": {"city": "Paris"}}',
    "gemma4": '<|tool_call>call:%s{city:<|"|>Paris<|"|>}<tool_call|>',
}


@pytest.mark.parametrize("family", CALLS)
def test_a_call_is_told_from_the_template(
    family: str, tokenizers: dict[str, ChatTokenizer], formats: dict[str, ConversationFormat]
) -> None:
    for thinking in (False, True):
        form = tokenizers[family].in_mode(thinking).call_form(formats[family])
        assert form is not None
        call = CALLS[family] % "weather"
        for answer in (call, f"Let me see.\n{call}", f"<think>\nHm.\n</think>\n\n{call}"):
            assert form.is_in(answer, ["time", "weather"])
        for answer in ("Sunny.", "I could call weather.", '{"name": "Paris", "country": "France"}'):
            assert not form.is_in(answer, ["time", "weather"])


def test_only_a_marker_makes_a_call_of_an_unknown_tool(
    tokenizers: dict[str, ChatTokenizer], formats: dict[str, ConversationFormat]
) -> None:
    found = {family: tokenizers[family].call_form(formats[family]) for family in CALLS}
    called = {family: form.is_in(CALLS[family] % "other", ["weather"]) for family, form in found.items() if form}
    assert called == {"qwen3": True, "qwen2": True, "llama": False, "gemma4": True}


def test_a_template_without_calls_has_no_form(
    tokenizers: dict[str, ChatTokenizer], formats: dict[str, ConversationFormat]
) -> None:
    assert tokenizers["gemma3"].call_form(formats["gemma3"]) is None
