"""In-process regeneration: one line a conversation whatever the batch size or interruptions; failures told apart."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve

from deepspec_core.config.schema import RegenerateOptions, SourceOptions
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.contracts.target import SamplingDefaults
from deepspec_core.data.conversations import Conversation, from_row
from deepspec_core.data.regenerate import regenerate, sample_seed, sampling_of
from deepspec_core.data.regenerate_report import RegenerateReport
from deepspec_core.data.sources import read_sources
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.errors import DataError
from deepspec_core.testing.tiny_target import TinyTarget
from deepspec_core.testing.tiny_tokenizer import tiny_format, tiny_tokenizer

END = 1
FMT = tiny_format()


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(tiny_tokenizer())


class Talker(TinyTarget):
    """A tiny target that says capital letters and, sooner or later, its end marker.

    Capitals come back as the same tokens when a prompt is rendered; small letters, where allowed, merge.
    """

    def __init__(self, *, small_letters: bool = False) -> None:
        super().__init__(vocab_size=340, hidden_size=8, num_layers=2, max_positions=512)
        self._allowed = [END, *range(35, 93 if small_letters else 61)]

    def decode(self, *arguments: Any, **options: Any) -> Any:
        step = super().decode(*arguments, **options)
        logits = torch.full_like(step.logits, -1e9)
        logits[..., self._allowed] = step.logits[..., self._allowed]
        logits[..., END] += 1.5
        return evolve(step, logits=logits)


def _conversations(count: int, turns: int = 1) -> list[Conversation]:
    return [
        from_row({"id": f"c{i}", "turns": [f"Question {i}, part {turn}?" for turn in range(turns)]}, "test")
        for i in range(count)
    ]


def _run(out: Path, conversations: list[Conversation], tokenizer: ChatTokenizer, **changes: Any) -> RegenerateReport:
    options = {"max_tokens": 24, "batch_size": 4, **changes.pop("options", {})}
    settings = {
        "target": Talker(),
        "sampling": Sampling(temperature=1.0),
        "seed": 5,
        "max_length": 256,
        "stop_ids": (END,),
        **changes,
    }
    return regenerate(
        conversations, tokenizer=tokenizer, fmt=FMT, options=RegenerateOptions(**options), out=out, **settings
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_hold_what_was_read_and_emitted(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    out = tmp_path / "run" / "out.jsonl"
    report = _run(out, _conversations(12), tokenizer)
    rows = _rows(out)
    assert [row["id"] for row in rows] == [f"c{i}" for i in range(12)]
    assert report.conversations == report.written == 12
    assert report.failures == report.skipped == 0
    assert report.output_tokens == sum(len(row["output_ids"]) for row in rows)
    assert report.unfinished == sum(row["finish_reason"] == "length" for row in rows)
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    for row in rows:
        assert tuple(row["prompt_ids"]) == tokenizer.render_prompt(row["messages"][:1])
        text = row["messages"][-1]["content"]
        assert tokenizer.decode(row["output_ids"]) == text + ("<|end|>" if row["finish_reason"] == "stop" else "")
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.jsonl", "out.jsonl.failures.jsonl"]


def test_training_reads_the_emitted_tokens(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    out = tmp_path / "out.jsonl"
    _run(out, _conversations(5), tokenizer)
    read = read_sources(
        [SourceOptions(path="out.jsonl")], split="train", held_out=0.0, seed=0, base=tmp_path, registry=None
    )
    for conversation, row in zip(read, _rows(out), strict=True):
        (sample,) = tokenizer.samples(conversation, FMT, None, 256)
        assert sample.input_ids.tolist() == row["prompt_ids"] + row["output_ids"]
        assert sample.input_ids[sample.loss_mask].tolist() == row["output_ids"]


def test_batch_size_and_order_change_nothing(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    _run(tmp_path / "a.jsonl", _conversations(5, turns=2), tokenizer)
    _run(tmp_path / "b.jsonl", _conversations(5, turns=2), tokenizer, options={"batch_size": 1})
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    _run(tmp_path / "c.jsonl", _conversations(5, turns=2)[::-1], tokenizer)
    assert _rows(tmp_path / "c.jsonl")[::-1] == _rows(tmp_path / "a.jsonl")
    _run(tmp_path / "d.jsonl", _conversations(5, turns=2), tokenizer, seed=6)
    assert (tmp_path / "d.jsonl").read_bytes() != (tmp_path / "a.jsonl").read_bytes()


def test_every_turn_is_answered_in_order(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    given = from_row(
        {
            "id": "x",
            "messages": [
                {"role": "user", "content": "One?"},
                {"role": "assistant", "content": "The old answer."},
                {"role": "user", "content": "Two?"},
            ],
        },
        "test",
    )
    out = tmp_path / "out.jsonl"
    report = _run(out, [given, *_conversations(30, turns=3)], tokenizer, options={"max_tokens": 60})
    rows = _rows(out)
    assert all("The old answer." not in message["content"] for message in rows[0]["messages"])
    complete = [row for row in rows if row["dropped_turns"] == 0]
    assert len(complete) > 10
    supervised_earlier = 0
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert tuple(row["prompt_ids"]) == tokenizer.render_prompt(row["messages"][:-1])
        answers = [message["content"] for message in row["messages"][1:-1:2]]
        spans = [tokenizer.decode(row["prompt_ids"][begin:end]) for begin, end in row["prompt_answers"]]
        assert set(spans) <= {answer + "<|end|>" for answer in answers}
        assert len(spans) + len(row["rewritten"]) == len(answers)
        supervised_earlier += len(spans)
        if row["dropped_turns"]:
            assert row["finish_reason"] == "length"
    assert supervised_earlier > 20
    assert report.rerendered_answers == 0
    assert report.dropped_turns == sum(row["dropped_turns"] for row in rows) > 0


def test_answers_that_render_otherwise_are_counted_and_kept_as_rows_of_their_own(
    tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    target, out = Talker(small_letters=True), tmp_path / "out.jsonl"
    report = _run(out, _conversations(10, turns=2), tokenizer, target=target, options={"max_tokens": 40})
    rows = _rows(out)
    assert report.rerendered_answers == sum(len(row["rewritten"]) for row in rows) > 0
    read = read_sources(
        [SourceOptions(path="out.jsonl")], split="train", held_out=0.0, seed=0, base=tmp_path, registry=None
    )
    for conversation, row in zip(read, rows, strict=True):
        assert len(row["prompt_answers"]) == len(row["messages"]) // 2 - 1 - len(row["rewritten"])
        samples = tokenizer.samples(conversation, FMT, None, 512)
        assert len(samples) == 1 + len(row["rewritten"])
        for sample, (prompt, output) in zip(samples, row["rewritten"], strict=False):
            assert sample.input_ids.tolist() == prompt + output
            assert sample.input_ids[sample.loss_mask].tolist() == output
            assert tokenizer.decode(prompt).endswith("<|start|>assistant\n<think>\n\n</think>\n\n")


class _Killed(Exception):
    pass


def test_an_interrupted_run_loses_nothing_and_repeats_nothing(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    _run(whole, _conversations(20), tokenizer)

    def interrupted():
        for index, conversation in enumerate(_conversations(20)):
            if index == 11:
                raise _Killed
            yield conversation

    with pytest.raises(_Killed):
        _run(out, interrupted(), tokenizer)
    partial = tmp_path / "out.jsonl.partial"
    lines = partial.read_bytes().splitlines(keepends=True)
    assert 3 <= len(lines) < 12
    assert not out.exists()
    partial.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # torn, as a kill leaves it
    report = _run(out, _conversations(20), tokenizer)
    assert report.skipped == len(lines) - 1
    assert report.written == 20 - report.skipped
    assert out.read_bytes() == whole.read_bytes()
    assert not partial.exists()

    class Untouchable(Talker):
        def decode(self, *arguments: Any, **options: Any) -> Any:
            raise AssertionError("a finished file needs no target")

    again = _run(out, _conversations(20), tokenizer, target=Untouchable())
    assert (again.written, again.skipped) == (0, 20)
    assert out.read_bytes() == whole.read_bytes()


def test_a_line_that_changed_is_answered_again(
    tmp_path: Path, tokenizer: ChatTokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    _run(whole, _conversations(6), tokenizer)

    def interrupted():
        yield from _conversations(6)
        raise _Killed

    with pytest.raises(_Killed):
        _run(out, interrupted(), tokenizer)
    partial = tmp_path / "out.jsonl.partial"
    first, *others = partial.read_bytes().splitlines(keepends=True)
    entry = json.loads(first)
    begin = first.index(b'"output_ids": [') + len(b'"output_ids": [')
    changed = first[:begin] + (b"4" if first[begin : begin + 1] != b"4" else b"5") + first[begin + 1 :]
    assert json.loads(changed)["output_ids"] != entry.pop("output_ids")
    partial.write_bytes(changed + b"".join(others))
    report = _run(out, _conversations(6), tokenizer)
    assert "1 damaged lines were removed" in caplog.text
    assert report.skipped == len(others)
    assert out.read_bytes() == whole.read_bytes()
    # Versions before wrote no checksums.
    partial.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:2]))
    out.unlink()
    assert _run(out, _conversations(6), tokenizer).skipped == 2
    assert out.read_bytes() == whole.read_bytes()


def test_tools_are_offered_and_kept(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    offering = tiny_tokenizer()
    offering.chat_template = "{{ tools | tojson if tools else '' }}" + offering.chat_template
    tools = [{"type": "function", "function": {"name": "weather"}}]
    given = [from_row({"id": f"c{i}", "turns": ["Paris?", "Rome?"], "tools": tools}, "test") for i in range(4)]
    out = tmp_path / "out.jsonl"
    _run(out, given, ChatTokenizer(offering), options={"max_tokens": 60})
    for row in _rows(out):
        assert row["tools"] == tools
        assert tokenizer.decode(row["prompt_ids"]).startswith('[{"type": "function"')
        spans = [tokenizer.decode(row["prompt_ids"][begin:end]) for begin, end in row["prompt_answers"]]
        assert len(spans) == len(row["messages"]) // 2 - 1


def test_failures_go_to_a_side_file(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    bad = [
        from_row({"id": "long", "turns": ["word " * 200]}, "test"),
        from_row({"id": "mute", "messages": [{"role": "system", "content": "Be."}]}, "test"),
        from_row(
            {"id": "tool", "messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}]}, "test"
        ),
    ]
    out = tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=r"(?s)2 of 10.*max_failures"):
        _run(out, [*_conversations(8), *bad], tokenizer, options={"max_failures": 0.05})
    assert not out.exists()
    report = _run(out, [*_conversations(8), *bad], tokenizer, options={"max_failures": 0.5})
    assert (report.conversations, report.failures, report.too_long, report.skipped) == (8, 2, 1, 8)
    left_out = {row["id"]: row for row in _rows(report.failures_path)}
    assert left_out.keys() == {"long", "mute", "tool"}
    assert "do not fit 256" in left_out["long"]["reason"]
    assert [name for name, row in left_out.items() if row.get("too_long")] == ["long"]
    again = _run(out, [], tokenizer)
    assert (again.failures, again.too_long) == (2, 1)


def test_any_number_of_prompts_may_be_too_long(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    """Nothing is wrong with them, and how many there are says nothing about the others."""
    long = [from_row({"id": f"long {i}", "turns": ["word " * 200]}, "test") for i in range(20)]
    report = _run(tmp_path / "out.jsonl", [*long, *_conversations(2)], tokenizer, options={"max_failures": 0.0})
    assert (report.conversations, report.failures, report.too_long) == (2, 0, 20)
    with pytest.raises(DataError, match=r"(?s)No prompt leaves room.*20 conversations.*data.max_length \(256\)"):
        _run(tmp_path / "none.jsonl", long, tokenizer)


def test_prompts_that_are_too_long_hide_no_failures(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    long = [from_row({"id": f"long {i}", "turns": ["word " * 200]}, "test") for i in range(200)]
    bad = [from_row({"id": f"mute {i}", "messages": [{"role": "system", "content": "Be."}]}, "test") for i in range(8)]
    with pytest.raises(DataError, match=r"8 of 16"):
        _run(tmp_path / "out.jsonl", [*long, *bad, *_conversations(8)], tokenizer, options={"max_failures": 0.05})


def test_a_line_of_the_side_file_counts_once(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    out = tmp_path / "out.jsonl"
    report = _run(out, _conversations(2), tokenizer)
    both = {"id": "x", "reason": "y", "cut": True, "too_long": True}
    report.failures_path.write_text(json.dumps(both) + "\n" + '{"id": "z", "reas' + "\n")
    again = _run(out, [], tokenizer)
    assert (again.failures, again.cut, again.too_long) == (1, 1, 0)


@pytest.mark.parametrize(
    "row",
    [
        {"turns": ["\ud800"]},
        {"turns": ["x", "\ud800"]},
        {"turns": ["x"], "tools": [{"name": "\ud800"}]},
        {"id": "\ud800", "turns": ["x"]},
    ],
)
def test_what_is_no_unicode_is_a_failure(tmp_path: Path, tokenizer: ChatTokenizer, row: dict[str, Any]) -> None:
    report = _run(tmp_path / "out.jsonl", [*_conversations(2), from_row(row, "test")], tokenizer)
    assert (report.conversations, report.failures) == (2, 1)
    (failure,) = report.failures_path.read_bytes().decode("utf-8", "surrogatepass").splitlines()
    assert "half of a surrogate pair, '\\ud800'" in json.loads(failure)["reason"]


def test_mistakes_are_told(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    out = tmp_path / "out.jsonl"
    with pytest.raises(DataError, match="No conversation"):
        _run(out, [], tokenizer)
    partial = tmp_path / "out.jsonl.partial"
    line = {
        "id": "gone",
        "messages": [{"role": "assistant", "content": "x"}],
        "output_ids": [1],
        "finish_reason": "stop",
        "dropped_turns": 0,
        "rewritten": [],
    }
    partial.write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=r"(?s)no longer in the sources.*gone"):
        _run(out, _conversations(2), tokenizer)
    damaged = ["nonsense", "{}", "null", "[1]", '"x"', "[" * 10**5]
    damaged += [json.dumps({**line, name: None}) for name in line]
    damaged += [json.dumps({**line, "messages": messages}) for messages in ([], [3], [{}])]
    for text in damaged:
        partial.write_text(json.dumps({**line, "id": "c0"}) + "\n" + text + "\n")
        with pytest.raises(DataError, match=r"(?s)A line is not.*partial:2.*is regenerated"):
            _run(out, _conversations(2), tokenizer)
    out.write_text("{}\n")
    with pytest.raises(DataError, match=r"(?s)A line is not.*out.jsonl:1.*Remove the file"):
        _run(out, _conversations(2), tokenizer)


@pytest.mark.parametrize("line", ["[]", "null", "5", '{"cut": true}', '{"cut": true, "id": [1]}', "[" * 10**5])
def test_a_damaged_line_of_the_side_file_costs_that_line_alone(
    tmp_path: Path, tokenizer: ChatTokenizer, line: str
) -> None:
    side = tmp_path / "out.jsonl.failures.jsonl"
    kept = {"id": "c0", "reason": "cut at 3 tokens", "cut": True}
    side.write_text(f"{line}\n{json.dumps(kept)}\n")
    report = _run(tmp_path / "out.jsonl", _conversations(3), tokenizer)
    assert (report.conversations, report.cut) == (2, 1)
    assert [json.loads(entry) for entry in side.read_text().splitlines()] == [kept]


def test_sampling_is_the_run_files_then_the_familys() -> None:
    family = SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20)
    assert sampling_of(RegenerateOptions(temperature=0.0), family) == Sampling(temperature=0.0, top_p=0.8, top_k=20)
    assert sample_seed(1, "a") != sample_seed(1, "a", 1) != sample_seed(2, "a", 1)


def test_a_later_turn_that_cannot_be_asked_is_dropped(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    """What was answered before it is kept."""
    rows = [from_row({"id": f"c{i}", "turns": ["One?", "Two, <|end|>?", "Three?"]}, "test") for i in range(6)]
    report = _run(tmp_path / "out.jsonl", rows, tokenizer, options={"max_tokens": 60})
    assert (report.conversations, report.failures, report.dropped_turns) == (6, 0, 12)
    assert all([message["role"] for message in row["messages"]] == ["user", "assistant"] for row in _rows(report.path))
