"""Which rows become conversations, and what malformed ones say."""

import json

import pytest

from deepspec_core.data.conversations import from_row
from deepspec_core.errors import DataError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def test_the_shapes_of_the_hub_are_one() -> None:
    plain = from_row({"messages": [USER, ANSWER]}, "f:1")
    shared = from_row({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "f:1")
    assert plain == shared
    assert plain.messages == (USER, ANSWER)
    assert from_row({"turns": ["Hi", "More"]}, "f:1").messages == (USER, {"role": "user", "content": "More"})


def test_ids_are_given_or_depend_on_the_content_alone() -> None:
    assert from_row({"id": 7, "messages": [USER]}, "f:1").id == "7"
    unnamed = from_row({"messages": [USER]}, "f:1")
    assert unnamed.id == from_row({"messages": [{**USER, "extra": 1}], "other": 2}, "g:9").id
    assert unnamed.id != from_row({"messages": [ANSWER]}, "f:1").id


def test_regenerated_rows_carry_their_tokens() -> None:
    row = {"messages": [USER], "prompt_ids": [5, 6, 7, 8], "prompt_answers": [[1, 3]], "output_ids": [9, 1]}
    conversation = from_row(row, "f:1")
    assert conversation.input_ids == (5, 6, 7, 8, 9, 1)
    assert conversation.loss_mask == (0, 1, 1, 0, 1, 1)


def test_tools_calls_and_reasoning_have_one_shape() -> None:
    schema = {"type": "function", "function": {"name": "weather"}}
    said = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    for call in (
        said,
        {"function": {"name": "weather", "arguments": '{"city": "Paris"}'}},
        {"name": "weather", "arguments": {"city": "Paris"}},
    ):
        row = {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [call], "reasoning": "Ask."},
                {"role": "function", "content": "sunny", "name": "weather", "tool_call_id": None},
                {**ANSWER, "tool_calls": None, "reasoning_content": ""},
            ],
            "tools": [schema],
        }
        conversation = from_row(row, "f:1")
        assert conversation.messages[1] == {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Ask.",
            "tool_calls": [said],
        }
        assert conversation.messages[2:] == ({"role": "tool", "content": "sunny", "name": "weather"}, ANSWER)
        assert conversation.tools == (schema,)
        assert from_row({**row, "tools": json.dumps([schema])}, "f:1") == conversation
    assert from_row({**row, "tools": []}, "f:1").id != conversation.id
    # Ids of rows without tools are what they always were.
    assert from_row({"messages": [USER, ANSWER]}, "f:1").id == "b97da8b3f01cb7faa516e525"


def test_earlier_answers_that_were_rewritten_are_rows_of_their_own() -> None:
    row = {"messages": [USER], "prompt_ids": [5, 6], "output_ids": [9], "rewritten": [[[5], [7, 8]]]}
    assert list(from_row(row, "f:1").given()) == [((5, 7, 8), (0, 1, 1)), ((5, 6, 9), (0, 0, 1))]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1], "not an object"),
        ({"mesages": [USER]}, "'messages' meant"),
        ({"messages": []}, "no conversation"),
        ({"messages": "Hi"}, "not a list"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "'assistant' meant"),
        ({"messages": [{"role": "user", "content": None}]}, "no content"),
        ({"messages": [{"role": "user", "content": 3}]}, "not text"),
        ({"turns": ["a", 3]}, "turns[1]"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"arguments": {}}]}]}, "names no function"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "{"}]}]}, "Not JSON"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": [1]}]}]}, "not an object"),
        ({"messages": [USER, {**ANSWER, "reasoning_content": 3}]}, "field is not text"),
        ({"messages": [USER], "tools": [1]}, "tools is not a list of objects"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "differ in length"),
        ({"input_ids": [1, 2], "loss_mask": [1, 2]}, "0 and 1"),
        ({"input_ids": [1, -2], "loss_mask": [1, 1]}, "token ids"),
        ({"input_ids": [1, 2], "loss_mask": None}, "0 and 1"),
        ({"input_ids": [1, 2**31], "loss_mask": [1, 1]}, "token ids"),
        ({"input_ids": [1, True], "loss_mask": [1, 1]}, "token ids"),
        ({"prompt_ids": [1], "output_ids": [10**30]}, "whole numbers from 0 to 2147483647"),
        ({"prompt_ids": [False], "output_ids": [1]}, "prompt_ids is not a list of token ids"),
        ({"prompt_ids": [1], "output_ids": [2], "prompt_answers": [[0, 2]]}, "has a range outside the prompt"),
    ],
)
def test_malformed_rows_say_where(row: object, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        from_row(row, "data.jsonl:12")
    assert expected in str(caught.value)
    assert "data.jsonl:12" in str(caught.value)


def test_tools_nested_deeper_than_any_schema_are_refused() -> None:
    deep: dict[str, object] = {}
    for _ in range(700):
        deep = {"properties": deep}
    asked = {"messages": [{"role": "user", "content": "x"}], "tools": [{"name": "f", "parameters": deep}]}
    call = {"function": {"name": "f", "arguments": deep}}
    called = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}]}
    for row in (asked, called):
        with pytest.raises(DataError, match="nested too deep"):
            from_row(row, "rows.jsonl:1")
