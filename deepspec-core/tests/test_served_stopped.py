"""Stopping while servers are waited for, and what an earlier process's requests leave after the next has begun."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from feature_stand_in import FeatureStandIn, feature_servers
from served_setup import OWNER, asking, samples, stand_in
from stand_in_server import wait_until

from deepspec_core.errors import DataError, StageError
from deepspec_core.features.served.exchange import OWNER as OWNER_FILE
from deepspec_core.features.served.exchange import Exchange, Ownership, owner_of
from deepspec_core.features.served.stream import Tally, totals
from deepspec_core.stopping import Stopped, StopRequest


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FeatureStandIn]:
    (tmp_path / "exchange").mkdir()
    running = stand_in(tmp_path / "exchange")
    with feature_servers(running):
        yield running


def test_whoever_waits_for_a_server_can_be_stopped(server: FeatureStandIn) -> None:
    """Not only between two samples: the next one may take as long as features.timeout."""
    request = StopRequest()
    server.slow = 20.0
    with asking(server.folder, [server]).stream(samples(), waiting=request.check) as stream:
        wait_until(lambda: server.at_once > 0)
        request.number = 15
        with pytest.raises(Stopped):
            next(iter(stream))
    assert server.at_once, "it has not answered yet"
    assert list(server.folder.iterdir()) == []


def test_the_end_says_why_no_server_was_of_use(server: FeatureStandIn) -> None:
    """The cause, such as a full disk, is the server's; the run waited for it in vain."""
    with asking(server.folder, [server], timeout=0.3, file_timeout=0.05).stream(samples(40)) as stream:
        rest = iter(stream)
        next(rest)
        server.always = "lost"
        with pytest.raises(DataError) as caught:
            list(rest)
    assert "No server answers any more" in str(caught.value)
    assert f"{server.address}: A server's file is not there" in str(caught.value)


def test_what_an_earlier_process_asked_for_and_comes_late_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine goes on with what a killed process asked for. Without this the folder could hold twice its bound."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    exchange = Exchange(folder=tmp_path, ownership=Ownership(owner=OWNER), most=10**6, late=60.0)
    assert exchange.take_over() == (0, 0)
    earlier = tmp_path / f"{Ownership(owner=OWNER).beginning}000000001.safetensors"
    others = tmp_path / f"{Ownership(owner='f' * 16).beginning}000000001.safetensors"
    for path in (earlier, others):
        path.touch()
    clock[0] += 10
    exchange.sweep()
    assert list(tmp_path.iterdir()) == [others]


def test_a_folder_in_place_of_the_file_that_identifies_a_run_is_said(tmp_path: Path) -> None:
    (tmp_path / OWNER_FILE).mkdir()
    with pytest.raises(StageError, match="A folder has the name of a file of the run"):
        owner_of(tmp_path)


def test_what_all_workers_got_is_counted(server: FeatureStandIn) -> None:
    """A failure that only another worker than the first saw is told, too."""
    parts: list[dict[str, Any]] = []
    for fault in ([], ["nan", "lost"], ["nan"]):
        server.faults = list(fault)
        servers = asking(server.folder, [server], file_timeout=0.05)
        with servers.stream(samples(4)) as stream:
            list(stream)
        parts.append(servers.tally.summary())
    found = totals(parts)
    assert found["texts from servers"] == 12
    assert found["bytes from servers"] == sum(part["bytes from servers"] for part in parts)
    assert found["failed exchanges"] == {"A server's file is not there": 1, "A state is not finite": 2}
    assert totals([Tally().summary()]) == Tally().summary()
