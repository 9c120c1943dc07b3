"""Recorded tool results are said after the target's own calls, and only there."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deepspec_core.config.schema import RegenerateOptions
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.data.answering import Answer
from deepspec_core.data.conversations import from_row
from deepspec_core.data.regenerate import regenerate
from deepspec_core.data.regenerate_report import RegenerateReport
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.decoding.engine import Completion, Request
from deepspec_core.testing.tiny_tokenizer import tiny_format, tiny_tokenizer

END = 1
# Calls as JSON between tags, and results as the user's; calls as JSON alone; no calls.
TAGGED = (
    "{%- for tool in tools or [] -%}{{ tool | tojson }}{%- endfor -%}"
    "{%- for m in messages -%}{{ '<|start|>' + m.role + '\n' + m.content }}"
    "{%- for call in m.tool_calls or [] -%}"
    '{{ \'<call>\n{"name": "\' + call.function.name + \'", "arguments": \' + call.function.arguments | tojson }}'
    "{{ '}\n</call>' }}"
    "{%- endfor -%}{{ '<|end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|start|>assistant\n' }}{%- endif -%}"
)
UNTAGGED = TAGGED.replace("<call>\n", "").replace("\n</call>", "")
REFUSING = TAGGED.replace(" in messages -%}", " in messages -%}{{ raise_exception('no') if m.role == 'tool' else '' }}")
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
RECORDED = {"tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Paris"}}}]}
MESSAGES = [
    {"role": "user", "content": "Paris?"},
    {"role": "assistant", "content": "", **RECORDED},
    {"role": "tool", "content": "sunny", "name": "weather"},
    {"role": "tool", "content": "warm", "name": "weather"},
    {"role": "assistant", "content": "", **RECORDED},
    {"role": "tool", "content": "dry", "name": "weather"},
    {"role": "assistant", "content": "Nice weather."},
    {"role": "user", "content": "Rome?"},
]
CALL = {
    TAGGED: '<call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</call>',
    UNTAGGED: '{"name":"weather", "arguments": {"city": "Paris"}}',
    REFUSING: '<call>\n{"name": "weather", "arguments": {}}\n</call>',
}


def _tokenizer(template: str, *markers: str) -> ChatTokenizer:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(markers))
    tokenizer.chat_template = template
    return ChatTokenizer(tokenizer)


def _run(
    out: Path, tokenizer: ChatTokenizer, answers: list[str], *, finish: str = "stop", **row: Any
) -> tuple[RegenerateReport, list[dict[str, Any]], list[Request]]:
    """The report, the lines, and what was asked, where the target gives these answers one after the other."""
    asked: list[Request] = []

    def answerer(hand_out: Callable[[], Iterator[Request]]) -> Iterator[Answer]:
        while (request := next(hand_out(), None)) is not None:
            asked.append(request)
            ids, last = tokenizer.encode(answers[len(asked) - 1])[0], len(asked) == len(answers)
            reason = finish if last else "stop"
            completion = Completion(
                id=request.id,
                prompt_ids=request.prompt_ids,
                output_ids=(*ids, END) if reason == "stop" else tuple(ids),
                finish_reason=reason,
                rounds=(),
            )
            yield Answer(completion=completion)

    report = regenerate(
        [from_row({"id": "c", "messages": MESSAGES, "tools": TOOLS, **row}, "test")],
        answerer=answerer,
        tokenizer=tokenizer,
        fmt=tiny_format(),
        options=RegenerateOptions(max_failures=1.0),
        sampling=Sampling(),
        stop_ids=(END,),
        out=out,
        seed=5,
        max_length=2000,
    )
    return report, [json.loads(line) for line in report.path.read_text().splitlines()], asked


def _said(line: dict[str, Any]) -> list[str]:
    return [message["content"] for message in line["messages"]]


@pytest.mark.parametrize(
    ("template", "markers"),
    [(TAGGED, ()), (TAGGED, ("<call>", "</call>")), (UNTAGGED, ())],
    ids=["text", "tokens", "json"],
)
def test_results_follow_the_targets_calls(tmp_path: Path, template: str, markers: tuple[str, ...]) -> None:
    tokenizer, call = _tokenizer(template, *markers), CALL[template]
    answers = [f"Let me see.\n{call}", call, "Good.", "Also good."]
    report, (line,), asked = _run(tmp_path / "out.jsonl", tokenizer, answers)
    assert _said(line) == ["Paris?", answers[0], "sunny", "warm", call, "dry", "Good.", "Rome?", "Also good."]
    assert line["messages"][2] == MESSAGES[2]
    assert (report.replayed_results, report.skipped_results, report.dropped_turns) == (3, 0, 0)
    assert "skipped_results" not in line
    assert len({request.seed for request in asked}) == 4
    assert list(asked[1].prompt_ids) == list(tokenizer.render_prompt(line["messages"][:4], None, TOOLS))
    # All four answers are supervised with the tokens that were emitted.
    (sample,) = tokenizer.samples(from_row(line, "test"), tiny_format(), None, 2000)
    assert tokenizer.decode(sample.input_ids[sample.loss_mask]) == "".join(f"{text}<|end|>" for text in answers)


def test_results_that_the_target_did_not_ask_for_are_skipped(tmp_path: Path) -> None:
    tokenizer, call = _tokenizer(TAGGED), CALL[TAGGED]
    report, (line,), _ = _run(tmp_path / "a.jsonl", tokenizer, ['As {"name": "x"}.', "Bye."])
    assert _said(line) == ["Paris?", 'As {"name": "x"}.', "Rome?", "Bye."]
    assert (line["skipped_results"], report.replayed_results, report.skipped_results) == (3, 0, 3)
    _, (line,), _ = _run(tmp_path / "b.jsonl", tokenizer, [call, "Sunny.", "Bye."])
    assert _said(line) == ["Paris?", call, "sunny", "warm", "Sunny.", "Rome?", "Bye."]
    assert line["skipped_results"] == 1


def test_a_conversation_may_end_in_results(tmp_path: Path) -> None:
    tokenizer, call = _tokenizer(TAGGED), CALL[TAGGED]
    _, (line,), _ = _run(tmp_path / "a.jsonl", tokenizer, [call, "Sunny."], messages=MESSAGES[:4])
    assert _said(line) == ["Paris?", call, "sunny", "warm", "Sunny."]
    early = [{"role": "tool", "content": "what?"}, *MESSAGES[:1]]
    _, (line,), _ = _run(tmp_path / "b.jsonl", tokenizer, ["Yes."], messages=early)
    assert (_said(line), line["skipped_results"]) == (["Paris?", "Yes."], 1)


def test_an_answer_without_an_end_is_the_last(tmp_path: Path) -> None:
    tokenizer, call = _tokenizer(TAGGED), CALL[TAGGED]
    report, (line,), _ = _run(tmp_path / "out.jsonl", tokenizer, [call, call], finish="length")
    assert _said(line) == ["Paris?", call, "sunny", "warm", call]
    assert (line["finish_reason"], report.dropped_turns, report.skipped_results) == ("length", 1, 1)


def test_a_template_that_refuses_results_ends_the_conversation(tmp_path: Path) -> None:
    report, (line,), _ = _run(tmp_path / "out.jsonl", _tokenizer(REFUSING), [CALL[REFUSING]])
    assert _said(line) == ["Paris?", CALL[REFUSING]]
    assert (report.dropped_turns, report.skipped_results) == (2, 3)


def test_a_template_without_calls_fails_such_conversations(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(tiny_tokenizer())
    assert tokenizer.call_form(tiny_format()) is None
    plain = {"id": "p", "messages": MESSAGES[:1]}
    report = regenerate(
        [from_row({"id": "c", "messages": MESSAGES}, "test"), from_row(plain, "test")],
        answerer=lambda hand_out: iter([_answer(request) for request in hand_out()]),
        tokenizer=tokenizer,
        fmt=tiny_format(),
        options=RegenerateOptions(max_failures=1.0),
        sampling=Sampling(),
        stop_ids=(END,),
        out=tmp_path / "out.jsonl",
        seed=5,
        max_length=2000,
    )
    assert (report.conversations, report.failures) == (1, 1)
    assert "writes no tool calls" in report.failures_path.read_text()


def _answer(request: Request) -> Answer:
    ids = (*request.prompt_ids[:0], 40, END)
    done = Completion(id=request.id, prompt_ids=request.prompt_ids, output_ids=ids, finish_reason="stop", rounds=())
    return Answer(completion=done)
