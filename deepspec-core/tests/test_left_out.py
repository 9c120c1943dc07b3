"""What a template leaves out is found, and what it only spells otherwise is not taken for left out."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepspec_core.data import written as module
from deepspec_core.data.left_out import left_out

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
CALL = {
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "São Paulo", "days": 3, "wet": True}},
}
MESSAGES: tuple[dict[str, Any], ...] = (
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "  Rain?\nIn two lines. "},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": '{"rain": [1, 2]}', "name": "get_weather"},
    {"role": "assistant", "content": "Yes."},
)


def _rendered(arguments: str) -> str:
    tools = json.dumps(TOOL)
    return f"{tools}|Be brief.|Rain?\nIn two lines.|get_weather {arguments}|{json.dumps(MESSAGES[3]['content'])}|Yes."


@pytest.mark.parametrize(
    "arguments",
    [
        json.dumps(CALL["function"]["arguments"]),
        json.dumps(CALL["function"]["arguments"], ensure_ascii=False, indent=2),
        "<parameter=city>\nSão Paulo\n</parameter><parameter=days>3</parameter><parameter=wet>True</parameter>",
        "city: São Paulo, days: 3, wet: true",
    ],
)
def test_any_spelling_will_do(arguments: str) -> None:
    assert left_out(_rendered(arguments), MESSAGES, [TOOL]) is None


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("Be brief.", "message 0 (system)"),
        ("In two lines.", "message 1 (user)"),
        ("São Paulo", "the argument 'São Paulo'"),
        ("3", "the argument '3'"),
        ("rain", "message 3 (tool)"),
    ],
)
def test_what_is_missing_is_named(missing: str, says: str) -> None:
    text = _rendered("city: São Paulo, days: 3, wet: true").replace(missing, "")
    assert says in str(left_out(text, MESSAGES, [TOOL]))


def test_a_tool_on_offer_or_called() -> None:
    text = _rendered("city: São Paulo, days: 3, wet: true")
    assert left_out(text, MESSAGES, [{"name": "search"}]) == "the tool 'search' that is on offer"
    assert "the call of" in str(left_out(text.replace("get_weather", ""), MESSAGES, []))


def test_letters_are_looked_at_only_where_a_part_does_not_stand_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(text: str) -> str:
        raise AssertionError("letters were looked at")

    monkeypatch.setattr(module, "_letters", refuse)
    assert left_out("Be brief.|Rain?\nIn two lines.|get_weather", MESSAGES[:2], [TOOL]) is None


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text)).casefold()


def _signs(text: str) -> str:
    return "".join(text.split())


_TEXT = st.text(alphabet='aAß\u017fİ\u0131Σςé1²\n "\\.ﬁ\u0345', max_size=6)


@given(_TEXT, _TEXT, _TEXT, st.sampled_from([str, str.strip, str.upper, str.lower, json.dumps, repr]), st.booleans())
def test_a_part_is_found_exactly_if_its_letters_are_or_its_signs_where_it_has_none(
    before: str, part: str, after: str, spell: Any, there: bool
) -> None:
    text = before + (spell(part) if there else "") + after
    read, spoken = (_letters, _letters) if _letters(part) else (_signs, lambda spelling: _signs(spelling[1:-1]))
    spellings = (json.dumps(part, ensure_ascii=False), json.dumps(part))
    content = read(part) in read(text) or any(spoken(spelling) in read(text) for spelling in spellings)
    assert (left_out(text, [{"role": "user", "content": part}], []) is None) == content
    assert (left_out(text, [], [{"name": part}]) is None) == (read(part) in read(text))
