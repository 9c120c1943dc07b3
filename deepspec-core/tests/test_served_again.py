"""Servers that come back, come late or go on with a stage: only what gives the same features is let in."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from feature_stand_in import FeatureStandIn, feature_servers
from served_setup import asking, samples, stand_in
from stand_in_server import wait_until

from deepspec_core.errors import ConfigError, StageError
from deepspec_core.features.served.server_probe import Reference, precision_of
from deepspec_core.features.served.source import FeatureServers
from deepspec_core.features.served.stage_record import ServedRecord, read_record

WHERE = Path("served.safetensors")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[list[FeatureStandIn]]:
    (tmp_path / "exchange").mkdir()
    running = [stand_in(tmp_path / "exchange"), stand_in(tmp_path / "exchange")]
    with feature_servers(*running):
        yield running


def work_of(servers: FeatureServers) -> Any:
    return servers.farm.work


def begun_with(folder: Path, server: FeatureStandIn) -> ServedRecord:
    servers = asking(folder, [server])
    servers.check()
    return ServedRecord.of(work_of(servers), server.address)


def going_on(folder: Path, servers: list[FeatureStandIn], record: ServedRecord, **changes: Any) -> FeatureServers:
    made = asking(folder, servers, **changes)
    work_of(made).references = (record.reference(work_of(made), where=WHERE),)
    return made


def another_model(server: FeatureStandIn) -> None:
    states = server.states
    server.states = lambda ids: states(ids).flip(0)


def test_a_server_that_comes_back_as_another_model_stays_out(
    pair: list[FeatureStandIn], caplog: pytest.LogCaptureFixture
) -> None:
    one, other = pair
    record = begun_with(one.folder, one)
    wanted, own = samples(40), other.states
    with going_on(one.folder, pair, record).stream(wanted) as stream:
        rest = iter(stream)
        found = [next(rest) for _ in range(8)]
        wait_until(lambda: all_is_read_ahead(one, other))
        one.slow = 30.0
        while not one.at_once:  # a request is under way when it stops
            found.append(next(rest))
            time.sleep(0.1)
        one.stop()
        wait_until(lambda: one.at_once == 0)
        one.slow = 0.0
        another_model(one)
        before = len(one.asked)
        one.start_again()
        wait_until(lambda: f"{one.address} stays out" in caplog.text)
        found += list(rest)
    assert len(one.asked) == before
    assert "not those of this target" in caplog.text
    assert_features_of(own, found)


def test_a_server_that_is_replaced_while_nobody_asks_stays_out(
    pair: list[FeatureStandIn], caplog: pytest.LogCaptureFixture
) -> None:
    """Training may use what was read ahead for minutes. No request breaks off when the server goes."""
    one, other = pair
    record = begun_with(one.folder, one)
    wanted, own = samples(40), other.states
    servers = going_on(one.folder, pair, record)
    servers.farm.idle = 0.2
    with servers.stream(wanted) as stream:
        rest = iter(stream)
        found = [next(rest) for _ in range(8)]
        wait_until(lambda: all_is_read_ahead(one, other))
        time.sleep(0.4)
        before = len(one.asked)
        one.stop()
        another_model(one)
        one.start_again()
        found += list(rest)
    assert len(one.asked) == before
    assert f"{one.address} stays out" in caplog.text
    assert f"{other.address} is" not in caplog.text  # it is the same after a pause: nothing to tell
    assert_features_of(own, found)


def all_is_read_ahead(one: FeatureStandIn, other: FeatureStandIn) -> bool:
    """After the first 8, with `prefetch` 8."""
    return len(one.asked) + len(other.asked) == 16 and one.at_once + other.at_once == 0


def assert_features_of(states: Any, found: list[Any]) -> None:
    assert len(found) == 40
    for sample in found:
        expected = states(sample.input_ids.tolist())[:, :2].flatten(1)
        torch.testing.assert_close(sample.features.hidden, expected, rtol=0, atol=0)


def test_a_stream_begins_without_a_server_that_was_replaced(
    pair: list[FeatureStandIn], caplog: pytest.LogCaptureFixture
) -> None:
    record = begun_with(pair[0].folder, pair[0])
    another_model(pair[1])
    servers = going_on(pair[0].folder, pair, record)
    with servers.stream(samples()) as stream:
        assert len(list(stream)) == 13
    assert not pair[1].asked
    assert f"{pair[1].address} stays out" in caplog.text
    another_model(pair[0])
    with pytest.raises(ConfigError, match="not those of this target"), servers.stream(samples()) as stream:
        list(stream)


@pytest.mark.parametrize(("begun", "later"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_stage_goes_on_in_the_precision_it_was_begun_in(
    pair: list[FeatureStandIn], tmp_path: Path, begun: str, later: str
) -> None:
    """Files are in float32 on both sides: only the numbers show what the server computes in."""
    one, states = pair[0], pair[0].states
    one.normed = "false"  # a state that was rounded after the norm would be measured as normed
    ways = {
        "float32": lambda ids: grown(states(ids)),
        "bfloat16": lambda ids: grown(states(ids)).bfloat16().float(),
    }
    one.states = ways[begun]
    record = begun_with(one.folder, one)
    record.write(tmp_path / WHERE)
    record = read_record(tmp_path / WHERE)
    assert record.precisions == (begun,)
    going_on(one.folder, [one], record).check()
    one.states = ways[later]
    with pytest.raises(ConfigError, match=r"features are not those|in another precision"):
        going_on(one.folder, [one], record).check()
    # Another kernel: the same precision, and other last bits.
    one.states = lambda ids: ways[begun](ids) * (1 + 1e-5) if begun == "float32" else ways[begun](ids)
    going_on(one.folder, [one], record).check()


def grown(states: torch.Tensor) -> torch.Tensor:
    states = states.clone()
    states[:, -1] *= 3.0
    return states


def test_a_damaged_record_is_refused_with_a_fix(pair: list[FeatureStandIn], tmp_path: Path) -> None:
    record = begun_with(pair[0].folder, pair[0])
    path = tmp_path / "train" / WHERE
    record.write(path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    whole = path.read_bytes()
    for content in (b"", whole[:-10], whole.replace(b"float32", b"float99")):
        path.write_bytes(content)
        with pytest.raises(StageError, match="--force train"):
            read_record(path)
    path.write_bytes(whole)
    of_another_text = evolve(read_record(path), ids=record.ids + 1)
    with pytest.raises(StageError, match="--force train"):
        of_another_text.reference(work_of(asking(pair[0].folder, pair)), where=path)


def test_servers_that_were_apart_from_the_start_may_stay_so(pair: list[FeatureStandIn]) -> None:
    one, other = pair
    states = one.states
    other.states = lambda ids: states(ids) * 1.01
    servers = asking(one.folder, pair)
    servers.check()
    record = ServedRecord.of(work_of(servers), one.address)
    assert record.spread == pytest.approx(0.01, rel=1e-3)
    assert record.bound == pytest.approx(0.02, rel=1e-3)
    going_on(one.folder, pair, record).check()
    other.states = lambda ids: states(ids) * 1.03
    with pytest.raises(ConfigError, match="not those of this target"):
        going_on(one.folder, pair, record).check()


@pytest.mark.parametrize("fault", ["lost", "nan", "500", "truncated", "html"])
def test_a_passing_fault_at_a_probe_is_asked_again_and_a_lasting_one_leaves_the_other_server(
    pair: list[FeatureStandIn], fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = pair
    other.sample, other.faults = None, [fault]  # the next request, which is a probe
    servers = asking(one.folder, pair)
    servers.check()
    assert not other.faults
    assert work_of(servers).tried.keys() == {one.address, other.address}
    other.always = fault
    servers = asking(one.folder, pair)
    servers.check()
    assert work_of(servers).tried.keys() == {one.address}
    assert f"{other.address} stays out" in caplog.text
    one.always = fault
    with pytest.raises(ConfigError):
        asking(one.folder, pair).check()


def test_a_server_that_hangs_is_named_and_left_out(
    pair: list[FeatureStandIn], caplog: pytest.LogCaptureFixture
) -> None:
    pair[1].always = "hang"
    caplog.set_level(logging.WARNING)
    servers = asking(pair[0].folder, pair, timeout=0.5, say_after=0.1)
    servers.check()
    assert f"waiting for {pair[1].address}" in caplog.text
    assert "does not answer in time" in caplog.text
    assert work_of(servers).tried.keys() == {pair[0].address}


def test_the_precision_of_numbers() -> None:
    exact = torch.randn(4, 8)
    assert precision_of(exact) == "float32"
    assert precision_of(exact.bfloat16().float()) == "bfloat16"
    assert precision_of(exact.half().float()) == "float16"
    assert precision_of(exact.half()) == "float16"
    reference = Reference(states={"a": exact}, whose="it", most=1e-3)
    assert "the same to the bit" in reference.require({"a": exact}, "float32", where="here")
