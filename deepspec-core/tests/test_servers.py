"""Regeneration by servers: the same file whichever server answered, in every dialect, whatever goes wrong."""

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from stand_in_server import MODEL, StandIn, standing_in, wait_until

from deepspec_core.config.schema import RegenerateOptions
from deepspec_core.contracts.proposer import Sampling
from deepspec_core.data.conversations import Conversation, from_row
from deepspec_core.data.regenerate import regenerate
from deepspec_core.data.regenerate_report import RegenerateReport
from deepspec_core.data.tokenize import ChatTokenizer
from deepspec_core.errors import ConfigError, DataError
from deepspec_core.servers.answering import Answering
from deepspec_core.servers.farm import Farm
from deepspec_core.servers.wanted import Wanted
from deepspec_core.stopping import stopped_by_sigterm
from deepspec_core.testing.tiny_target import TinyTarget
from deepspec_core.testing.tiny_tokenizer import tiny_format, tiny_tokenizer

END, LONGEST, COUNT = 1, 256, 12
DIALECTS = ("vllm", "sglang", "transformers")
Servers = Callable[..., list[StandIn]]


class Talker(TinyTarget):
    """Says capital letters, whose text becomes the same tokens, and its end marker sooner or later.

    The sine keeps a greedy target this small from saying one letter for ever.
    """

    def __init__(self) -> None:
        super().__init__(vocab_size=340, hidden_size=8, num_layers=2, max_positions=512)

    def decode(self, *arguments: Any, **options: Any) -> Any:
        step = super().decode(*arguments, **options)
        logits = torch.full_like(step.logits, -1e9)
        allowed = [END, *range(35, 61)]
        logits[..., allowed] = torch.sin(20 * step.logits[..., allowed])
        logits[..., END] += 0.02
        return evolve(step, logits=logits)


@pytest.fixture(scope="module")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(tiny_tokenizer())


@pytest.fixture
def servers(tokenizer: ChatTokenizer) -> Iterator[Servers]:
    """servers("vllm", ...): running stand-ins, one for each dialect."""
    with ExitStack() as stack:
        yield lambda *dialects: stack.enter_context(standing_in(Talker(), tokenizer, (END,), *dialects))


def _wanted(tokenizer: ChatTokenizer, **changes: Any) -> Wanted:
    settings: dict[str, Any] = {"sampling": Sampling(), "max_tokens": 16, "max_length": LONGEST, "timeout": 20.0}
    settings |= {"names": (MODEL,), "vocab_size": 340, "stop_ids": (END,), "end_id": END} | changes
    return Wanted(tokenizer=tokenizer, **settings)


def _farm(tokenizer: ChatTokenizer, *servers: StandIn, **changes: Any) -> Farm:
    health = changes.pop("health_every", 30.0)
    addresses = [server.address for server in servers]
    return Farm(addresses=addresses, work=Answering(_wanted(tokenizer, **changes)), pause=0.02, health_every=health)


def _conversations(count: int, turns: int = 2) -> list[Conversation]:
    return [
        from_row({"id": f"c{i}", "turns": [f"Question {i}, part {turn}?" for turn in range(turns)]}, "test")
        for i in range(count)
    ]


def _run(
    out: Path, tokenizer: ChatTokenizer, farm: Farm | None, conversations: Any = None, **options: Any
) -> RegenerateReport:
    """Of `farm`, or of the target in this process."""
    return regenerate(
        _conversations(COUNT) if conversations is None else conversations,
        target=Talker() if farm is None else None,
        answerer=farm,
        tokenizer=tokenizer,
        fmt=tiny_format(),
        options=RegenerateOptions(**{"max_tokens": 16, "batch_size": 4, **options}),
        sampling=Sampling(),
        seed=5,
        max_length=LONGEST,
        stop_ids=(END,),
        out=out,
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, tokenizer: ChatTokenizer) -> bytes:
    """The file that the target in this process writes."""
    out = tmp_path_factory.mktemp("in-process") / "out.jsonl"
    _run(out, tokenizer, None)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["finish_reason"] for row in rows} == {"stop", "length"}
    assert max(len(row["messages"]) for row in rows) == 4
    return out.read_bytes()


@pytest.mark.parametrize("dialects", [*[(name,) for name in DIALECTS], DIALECTS])
def test_the_file_is_that_of_the_target_in_this_process(
    tmp_path: Path, tokenizer: ChatTokenizer, servers: Servers, expected: bytes, dialects: tuple[str, ...]
) -> None:
    running = servers(*dialects)
    report = _run(tmp_path / "out.jsonl", tokenizer, _farm(tokenizer, *running))
    assert report.path.read_bytes() == expected
    assert (report.conversations, report.failures, report.mismatched_answers) == (COUNT, 0, 0)
    assert all(server.asked for server in running)
    assert max(server.most_at_once for server in running) > 1


def test_what_goes_wrong_is_asked_again(
    tmp_path: Path, tokenizer: ChatTokenizer, servers: Servers, expected: bytes
) -> None:
    (server,) = servers("vllm")
    server.faults = ["html", "500", "busy", "broken", "half", "no choice", "other model", "other prompt"]
    report = _run(tmp_path / "out.jsonl", tokenizer, _farm(tokenizer, server))
    assert report.path.read_bytes() == expected
    assert report.failures == 0
    assert not server.faults


@pytest.mark.parametrize("changes", [{"timeout": 1.5}, {"health_every": 0.1}])
def test_a_server_that_hangs_loses_its_work_to_another(
    tmp_path: Path, tokenizer: ChatTokenizer, servers: Servers, expected: bytes, changes: dict[str, float]
) -> None:
    bad, good = servers("vllm", "vllm")
    bad.faults = ["hang"] * 4

    def hang_up() -> None:
        wait_until(lambda: not bad.faults)
        bad.always = "html" if "timeout" in changes else None
        if "health_every" in changes:
            bad.stop()

    helper = threading.Thread(target=hang_up)
    helper.start()
    report = _run(tmp_path / "out.jsonl", tokenizer, _farm(tokenizer, bad, good, **changes))
    helper.join()
    assert report.path.read_bytes() == expected
    assert report.failures == 0


def test_a_server_that_died_is_let_in_again(
    tmp_path: Path, tokenizer: ChatTokenizer, servers: Servers, expected: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (server,) = servers("vllm")
    server.faults = ["", "", "", "stops"]

    def restart() -> None:
        wait_until(lambda: server.dead and not server.faults)
        before = len(server.asked)
        server.start_again()
        wait_until(lambda: len(server.asked) > before)

    helper = threading.Thread(target=restart)
    helper.start()
    with caplog.at_level(logging.INFO, logger="deepspec"):
        report = _run(tmp_path / "out.jsonl", tokenizer, _farm(tokenizer, server))
    helper.join()
    assert report.path.read_bytes() == expected
    assert f"{server.address} is out" in caplog.text
    assert f"{server.address} is in again" in caplog.text


def test_one_that_is_not_there_at_the_start_is_let_in_when_it_answers(
    tmp_path: Path, tokenizer: ChatTokenizer, servers: Servers, expected: bytes
) -> None:
    late, good = servers("vllm", "vllm")
    late.stop()
    good.faults = ["hang"] * 4
    late.asked.clear()

    def begin() -> None:
        wait_until(lambda: not good.faults)
        late.start_again()
        wait_until(lambda: late.asked)
        good._released.set()

    helper = threading.Thread(target=begin)
    helper.start()
    report = _run(tmp_path / "out.jsonl", tokenizer, _farm(tokenizer, late, good))
    helper.join()
    assert report.path.read_bytes() == expected
    assert late.asked


def test_when_nobody_answers_any_more_nothing_is_lost(
    tmp_path: Path, tokenizer: ChatTokenizer, servers: Servers, expected: bytes
) -> None:
    (server,) = servers("vllm")
    server.faults = [""] * 9 + ["stops"]
    out = tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=r"(?s)No server answers any more.*regenerate.timeout"):
        _run(out, tokenizer, _farm(tokenizer, server, timeout=1.0))
    written = (tmp_path / "out.jsonl.partial").read_text().splitlines()
    server.start_again()
    server.asked.clear()
    report = _run(out, tokenizer, _farm(tokenizer, server))
    assert report.skipped == len(written)
    done = {json.loads(line)["id"] for line in written}
    asked = {tokenizer.decode(body["prompt"]).split("Question ")[1].split(",")[0] for body in server.asked}
    assert not {f"c{number}" for number in asked} & done
    assert out.read_bytes() == expected


class _Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 7])
def test_killed_and_resumed_elsewhere(
    tmp_path: Path, tokenizer: ChatTokenizer, servers: Servers, expected: bytes, at: int
) -> None:
    """By another kind of server, and at last in this process."""
    exact, text = servers("vllm", "transformers")

    def killed(farm: Farm, after: int) -> Any:
        def answers(hand_out: Any) -> Iterator[Any]:
            for count, outcome in enumerate(farm(hand_out)):
                if count == after:
                    raise _Killed
                yield outcome

        return answers

    out = tmp_path / "out.jsonl"
    for server in (exact, text):
        with pytest.raises(_Killed):
            _run(out, tokenizer, killed(_farm(tokenizer, server), at))
    assert not out.exists()
    _run(out, tokenizer, None)
    assert out.read_bytes() == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_and_resumed(
    tmp_path: Path, tokenizer: ChatTokenizer, servers: Servers, expected: bytes, number: signal.Signals
) -> None:
    (server,) = servers("sglang")
    server.faults = [""] * 12 + ["hang"] * 6  # so that it cannot finish before the signal comes

    def send() -> None:
        wait_until(lambda: not server.faults)
        os.kill(os.getpid(), number)

    helper = threading.Thread(target=send)
    out = tmp_path / "out.jsonl"
    # A shell that starts the tests in the background has them ignore SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    helper.start()
    try:
        with pytest.raises(KeyboardInterrupt), stopped_by_sigterm():
            _run(out, tokenizer, _farm(tokenizer, server))
    finally:
        signal.signal(signal.SIGINT, before)
    helper.join()
    server._released.set()
    assert not out.exists()
    assert _run(out, tokenizer, _farm(tokenizer, server)).skipped > 0
    assert out.read_bytes() == expected


def test_what_nobody_can_answer_is_a_failure(tmp_path: Path, tokenizer: ChatTokenizer, servers: Servers) -> None:
    (server,) = servers("vllm")
    poison = tokenizer.render_prompt([{"role": "user", "content": "Question 3, part 0?"}])
    answer = server._answer

    def poisoned(body: dict[str, Any], limit: int, fault: str | None) -> dict[str, Any]:
        return answer(body, limit, "no choice" if body["prompt"] == list(poison) else fault)

    server._answer = poisoned  # type: ignore[method-assign]
    report = _run(tmp_path / "out.jsonl", tokenizer, _farm(tokenizer, server), max_failures=0.08)
    assert (report.conversations, report.failures) == (COUNT - 1, 1)
    (failure,) = [json.loads(line) for line in report.failures_path.read_text().splitlines()]
    assert failure["id"] == "c3"
    assert "no choice with a text" in failure["reason"]
    server.always = "no choice"
    with pytest.raises(ConfigError, match="no choice"):
        _farm(tokenizer, server).check()


def test_a_budget_of_failures_ends_the_run(tmp_path: Path, tokenizer: ChatTokenizer, servers: Servers) -> None:
    (server,) = servers("vllm")
    refuse = server._refused
    server._refused = lambda body: refuse(body) or ((400, "no") if body["max_tokens"] > 1 else None)  # type: ignore[method-assign]
    with pytest.raises(DataError, match="Too many conversations cannot be regenerated"):
        _run(tmp_path / "out.jsonl", tokenizer, _farm(tokenizer, server), max_failures=0)


def test_other_counts_of_tokens_are_counted(
    tmp_path: Path, tokenizer: ChatTokenizer, servers: Servers, expected: bytes
) -> None:
    (server,) = servers("sglang")
    server.faults = ["other count"] * 3
    report = _run(tmp_path / "out.jsonl", tokenizer, _farm(tokenizer, server), _conversations(COUNT, turns=1))
    assert (report.conversations, report.mismatched_answers) == (COUNT, 3)
    assert _run(report.path, tokenizer, None).mismatched_answers == 3


@pytest.mark.parametrize("by_servers", [True, False])
def test_answers_that_meet_the_limit_are_dropped_where_asked(
    tmp_path: Path, tokenizer: ChatTokenizer, servers: Servers, expected: bytes, by_servers: bool
) -> None:
    farm = _farm(tokenizer, *servers("vllm")) if by_servers else None
    report = _run(tmp_path / "out.jsonl", tokenizer, farm, unfinished="drop")
    kept = [json.loads(line) for line in expected.splitlines()]
    first = {row["id"] for row in kept if row["finish_reason"] == "length" and len(row["messages"]) == 2}
    rows = [json.loads(line) for line in report.path.read_text().splitlines()]
    assert {row["id"] for row in rows} == {row["id"] for row in kept} - first
    assert (report.cut, report.failures, report.unfinished) == (len(first), 0, 0)
    assert first
    taken_back = [row for row in kept if row["finish_reason"] == "length" and row["id"] not in first]
    assert report.dropped_turns == len(taken_back) > 0
    for row in rows:
        assert row["finish_reason"] == "stop"
        assert row["prompt_ids"] == list(tokenizer.render_prompt(row["messages"][:-1]))
    again = _run(tmp_path / "out.jsonl", tokenizer, farm, unfinished="drop")
    assert (again.cut, again.failures) == (len(first), 0)
    report.path.rename(tmp_path / "out.jsonl.partial")

    def nobody(hand_out: Any) -> Iterator[Any]:
        assert not list(hand_out()), "what was cut was answered"
        yield from ()

    assert _run(tmp_path / "out.jsonl", tokenizer, nobody, unfinished="drop").cut == len(first)  # type: ignore[arg-type]


def test_servers_that_cannot_be_used_are_refused_at_once(tokenizer: ChatTokenizer, servers: Servers) -> None:
    engine, text, deaf = servers("vllm", "transformers", "deaf")

    def refused(*which: StandIn, **changes: Any) -> str:
        with pytest.raises(ConfigError) as error:
            _farm(tokenizer, *which, **changes).check()
        return str(error.value)

    _farm(tokenizer, engine, text).check()
    assert "A server ignores a sampling setting" in refused(engine, deaf)
    assert deaf.address in refused(engine, deaf)
    text.has_hub_cache = True
    _farm(tokenizer, engine, text).check()
    for server in (engine, text):
        assert "regenerate.served_as" in refused(server, names=("another/model",))
    assert "no server answers" not in refused(engine, names=("another/model",))
    engine.max_model_len = LONGEST - 1
    assert "A server holds shorter texts" in refused(engine, text)
    engine.always = "html"
    assert "Welcome to the gateway" in refused(engine, text)
    text.stop()
    assert "no server answers" in refused(text)


def test_settings_are_sent_as_they_are(tmp_path: Path, tokenizer: ChatTokenizer, servers: Servers) -> None:
    engine, text = servers("vllm", "transformers")
    sampling = Sampling(temperature=0.7, top_p=0.8, top_k=20, min_p=0.05, repetition_penalty=1.2)
    for server in (engine, text):
        _run(tmp_path / server.dialect, tokenizer, _farm(tokenizer, server, sampling=sampling), _conversations(1))
    sent, config = engine.asked[0], json.loads(text.asked[0]["generation_config"])
    for settings in (sent, config):
        assert {name: settings[name] for name in ("temperature", "top_p", "top_k", "min_p")} == {
            "temperature": 0.7,
            "top_p": 0.8,
            "top_k": 20,
            "min_p": 0.05,
        }
        assert settings["repetition_penalty"] == 1.2
    assert config["do_sample"] is True
    assert sent["seed"] == text.asked[0]["seed"]
    assert sent["stop_token_ids"] == config["eos_token_id"] == [END]


def test_a_key_opens_and_is_in_no_message(tokenizer: ChatTokenizer, servers: Servers) -> None:
    (server,) = servers("vllm")
    server.key = "opensesame"
    _farm(tokenizer, server, key="opensesame").check()
    with pytest.raises(ConfigError, match=r"regenerate\.api_key_env") as error:
        _farm(tokenizer, server, key="closesesame").check()
    assert "closesesame" not in str(error.value)
    assert "closesesame" not in repr(_farm(tokenizer, server, key="closesesame"))
