"""A server that answers its probes and spoils or refuses everything else costs no conversation."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from stand_in_server import wait_until
from test_servers import COUNT, Servers, _conversations, _farm, _run, _wanted, expected, servers, tokenizer

from deepspec_core.data.answering import Unanswered
from deepspec_core.data.conversations import Conversation
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.decoding.engine import Request
from deepspec_core.servers.connection import Fault, Kind
from deepspec_core.servers.level import START
from deepspec_core.servers.reading import read

__all__ = ["expected", "servers", "tokenizer"]  # fixtures


def _refuses(server: Any, *, after: int, prompt: list[int] | None = None) -> None:
    """After so many answers it refuses everything, or `prompt`."""
    refuse, asked = server._refused, 0

    def refused(body: dict[str, Any]) -> tuple[int, str] | None:
        nonlocal asked
        asked += body["max_tokens"] > 1
        hit = asked > after and body["max_tokens"] > 1 and prompt in (None, body["prompt"])
        return refuse(body) or ((400, "CUDA error") if hit else None)

    server._refused = refused


def test_a_text_that_is_not_unicode_is_no_answer(tokenizer: ChatTokenizer) -> None:
    content = {
        "choices": [{"text": "AB\ud83d", "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 3},
    }
    with pytest.raises(Fault, match="half of a surrogate pair") as error:
        read(content, Request(id="x", prompt_ids=(5, 6), seed=0), _wanted(tokenizer), model="tiny")
    assert error.value.kind is Kind.BAD


def test_what_one_server_refuses_another_answers(
    tmp_path: Path, tokenizer: ChatTokenizer, servers: Servers, expected: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    sick, well = servers("vllm", "vllm")
    _refuses(sick, after=2)
    report = _run(tmp_path / "out.jsonl", tokenizer, evolve(_farm(tokenizer, sick, well), pause=5.0), max_failures=0)
    assert report.path.read_bytes() == expected
    assert report.failures == 0
    assert f"{sick.address} is out: it does not take what another server answers: 400" in caplog.text
    assert len(sick.asked) == 2
    assert well.asked


def test_what_both_refuse_is_a_failure_and_no_servers_fault(
    tmp_path: Path, tokenizer: ChatTokenizer, servers: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    both = servers("vllm", "vllm")
    poison = list(tokenizer.render_prompt([{"role": "user", "content": "Question 3, part 0?"}]))
    refusals = []
    for server in both:
        _refuses(server, after=0, prompt=poison)
        server._refused = lambda body, refused=server._refused: refusals.append(said := refused(body)) or said
    farm = _farm(tokenizer, *both)
    with caplog.at_level(logging.INFO, logger="deepspec"):
        report = _run(tmp_path / "out.jsonl", tokenizer, farm, max_failures=0.1)
    assert (report.conversations, report.failures) == (COUNT - 1, 1)
    assert json.loads(report.failures_path.read_text())["reason"].endswith(
        'does not take it: 400 \'{"error": "CUDA error"}\''
    )
    assert refusals.count((400, "CUDA error")) == 2
    assert "is out" not in caplog.text
    assert "1 failed" not in caplog.text


def test_one_that_refuses_at_once_does_not_read_the_whole_source(
    tmp_path: Path, tokenizer: ChatTokenizer, servers: Servers
) -> None:
    sick, well = servers("vllm", "vllm")
    _refuses(sick, after=0)
    gate, count, read = threading.Event(), 40, 0
    well.faults = ["gate"] * START
    well._misbehaves = lambda _handler, fault: fault == "gate" and not gate.wait(10)  # type: ignore[method-assign]

    def source() -> Iterator[Conversation]:
        nonlocal read
        for conversation in _conversations(count, turns=1):
            read += 1
            yield conversation

    def open_the_gate() -> None:
        wait_until(lambda: not well.faults)
        time.sleep(0.5)  # in which it would read on
        early.append(read)
        gate.set()

    early: list[int] = []
    helper = threading.Thread(target=open_the_gate)
    helper.start()
    report = _run(tmp_path / "out.jsonl", tokenizer, _farm(tokenizer, sick, well), source())
    helper.join()
    assert (report.conversations, report.failures) == (count, 0)
    assert early == [2 * START]


def test_what_is_refused_waits_for_a_server_that_is_probed_after_a_pause(
    tokenizer: ChatTokenizer, servers: Servers
) -> None:
    sick, well = servers("vllm", "vllm")
    _refuses(sick, after=0)
    slow, refuse = threading.Event(), well._refused

    def late(body: dict[str, Any]) -> tuple[int, str] | None:
        if body["max_tokens"] == 1 and slow.is_set():
            time.sleep(0.3)
        return refuse(body)

    well._refused = late
    todo = [Request(id="first", prompt_ids=(5, 6), seed=0)]
    answers = evolve(_farm(tokenizer, sick, well), idle=0.2)(lambda: iter([todo.pop()] if todo else []))
    assert not isinstance(next(answers), Unanswered)
    time.sleep(0.5)
    slow.set()
    todo.append(Request(id="second", prompt_ids=(5, 7), seed=0))
    assert not isinstance(next(answers), Unanswered)
    assert list(answers) == []
