"""Features from servers: the target's own, in order, whichever server answered, whatever goes wrong on the way."""

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from attrs import evolve
from feature_stand_in import FeatureStandIn, feature_servers
from served_setup import LAYERS, OWNER, asking, expected, samples, stand_in
from stand_in_server import wait_until

from deepspec_core.contracts.draft import Sample
from deepspec_core.errors import ConfigError, DataError
from deepspec_core.features.served.exchange import Ownership
from deepspec_core.features.served.layers import AskedLayers
from deepspec_core.features.served.source import FeatureServers

# A server's faults, and what is said of each.
FAULTS = {
    "outside": "outside the exchange folder",
    "symlink": "no plain file",
    "other name": "not named after the request",
    "lost": "is not there",
    "locked": "still locked",
    "wrong ids": "other token ids",
    "truncated": "is damaged",
    "cut": "is damaged",
    "no safetensors": "is damaged",
    "nan": "not finite",
    "layers": "other layers",
    "said layers": "other layers",
    "short": "another shape",
    "double": "another shape or type",
    "no path": "no hidden states",
    "refused": "no more positions",
    "html": "no JSON",
    "500": "500",
    "busy": "429",
    "broken": "",
}


@pytest.fixture
def exchange(tmp_path: Path) -> Path:
    (tmp_path / "exchange").mkdir()
    return tmp_path / "exchange"


@pytest.fixture
def server(exchange: Path) -> Iterator[FeatureStandIn]:
    running = stand_in(exchange)
    with feature_servers(running):
        yield running


@pytest.fixture
def pair(exchange: Path) -> Iterator[list[FeatureStandIn]]:
    running = [stand_in(exchange), stand_in(exchange)]
    with feature_servers(*running):
        yield running


def taken(servers: FeatureServers, wanted: list[Sample] | None = None) -> list[Sample]:
    with servers.stream(samples() if wanted is None else wanted) as stream:
        return list(stream)


def check(found: list[Sample], wanted: list[Sample] | None = None, **tolerance: float) -> None:
    wanted = samples() if wanted is None else wanted
    assert [sample.id for sample in found] == [sample.id for sample in wanted]
    for sample in found:
        own = expected(sample)
        assert sample.features is not None
        assert own.features is not None
        bounds = tolerance or {"rtol": 0, "atol": 0}
        torch.testing.assert_close(sample.features.hidden, own.features.hidden, **bounds)
        torch.testing.assert_close(sample.features.last_hidden, own.features.last_hidden, **bounds)


def left(exchange: Path) -> list[str]:
    return sorted(path.name for path in exchange.iterdir())


def test_the_features_are_the_targets_own_to_the_bit_and_nothing_is_left(
    exchange: Path, pair: list[FeatureStandIn]
) -> None:
    for server in pair:
        server.slow = 0.1  # so that a second request comes before the first is answered, on any machine
    servers = asking(exchange, pair)
    check(taken(servers))
    assert all(server.asked for server in pair)
    assert max(server.most_at_once for server in pair) > 1
    assert left(exchange) == []
    assert (servers.tally.texts, servers.tally.failed) == (13, 0)
    assert servers.tally.bytes > 13 * 6 * 3 * 16 * 4
    body = pair[0].asked[0]
    assert (body["max_tokens"], body["temperature"]) == (1, 0.0)
    assert re.fullmatch(r"ds-[0-9a-f]{16}-0-[0-9a-f]{8}-\d{9}", body["kv_transfer_params"]["file"])


@pytest.mark.parametrize("fault", FAULTS)
def test_an_answer_that_is_wrong_is_counted_and_asked_for_again(
    exchange: Path, server: FeatureStandIn, fault: str
) -> None:
    server.faults = [fault]
    foreign = exchange / "ds-ffffffffffffffff-0-00000000-000000001.safetensors"
    foreign.write_bytes(b"another run's")
    servers = asking(exchange, [server])
    check(taken(servers))
    assert not server.faults
    assert servers.tally.failed == 1
    kept = [name for name in left(exchange) if not name.startswith("other")]
    assert kept == [foreign.name]
    if fault == "outside":
        assert list((exchange.parent / "elsewhere").iterdir()), "a file outside is not touched"


@pytest.mark.parametrize("fault", [name for name in FAULTS if name not in ("busy", "broken")])
def test_a_server_that_is_wrong_from_the_start_is_refused_with_the_reason(
    exchange: Path, server: FeatureStandIn, fault: str
) -> None:
    server.always = fault
    with pytest.raises(ConfigError) as caught:
        asking(exchange, [server]).check()
    said = str(caught.value)
    assert FAULTS[fault] in said
    assert f"features.servers: {server.address}" in said
    assert "fix:" in said


def test_what_no_server_gives_ends_the_run_with_the_reason(exchange: Path, pair: list[FeatureStandIn]) -> None:
    """The same text fails everywhere, a bounded number of times."""
    bad = samples()[4].input_ids.tolist()
    for server in pair:
        states = server.states
        server.states = lambda ids, states=states: states(ids) * (float("nan") if ids == bad else 1)
    servers = asking(exchange, pair)
    with pytest.raises(DataError) as caught:
        taken(servers)
    said = str(caught.value)
    for part in ("No server gives the features of a sample", "sample s004", "asked 5 times", "not finite"):
        assert part in said
    asked = [body["prompt"] for server in pair for body in server.asked]
    assert asked.count(bad) == 5
    assert servers.tally.reasons == {"A state is not finite": 5}
    assert left(exchange) == []


def test_a_dead_server_is_taken_out_and_let_in_again(exchange: Path, pair: list[FeatureStandIn]) -> None:
    one, _ = pair
    many = samples(60)
    for server in pair:
        server.slow = 0.01
    servers = asking(exchange, pair)
    with servers.stream(many) as stream:
        found, rest = [], iter(stream)
        found += [next(rest) for _ in range(8)]
        one.stop()
        found += [next(rest) for _ in range(12)]
        before = len(one.asked)
        one.start_again()
        for sample in rest:
            found.append(sample)
            time.sleep(0.02)  # the one that came back gets its turn
    check(found, many)
    assert len(one.asked) > before
    assert left(exchange) == []


def test_nobody_is_left(exchange: Path, server: FeatureStandIn) -> None:
    servers = asking(exchange, [server], timeout=0.4)
    with servers.stream(samples(40)) as stream:
        rest = iter(stream)
        next(rest)
        server.stop()
        with pytest.raises(DataError, match="No server answers any more"):
            list(rest)
    with pytest.raises(ConfigError, match="no server answers"):
        servers.check()


@pytest.mark.parametrize("normed", ["false", "unsaid", "true"])
def test_a_final_state_before_the_norm_is_normed(exchange: Path, server: FeatureStandIn, normed: str) -> None:
    states, server.normed = server.states, normed
    if normed != "true":

        def grown(ids: list[int]) -> torch.Tensor:
            found = states(ids)
            # Powers of two: the norm takes them out without rounding.
            found[:, -1] *= 2.0 ** (torch.arange(len(ids)) % 5 + 1)[:, None]
            return found

        server.states = grown
    check(taken(asking(exchange, [server])), rtol=1e-6, atol=1e-6)


def test_a_final_state_that_is_not_what_its_file_says_is_refused(exchange: Path, server: FeatureStandIn) -> None:
    server.normed = "false"
    with pytest.raises(ConfigError, match="not what its file says"):
        asking(exchange, [server]).check()
    with pytest.raises(ConfigError, match="cannot be read apart"):
        asking(exchange, [server], norm=None).check()
    server.normed = "unsaid"
    with pytest.raises(ConfigError, match="not known whether"):
        asking(exchange, [server], norm=None).check()


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2**-8), ("float8_e4m3", 2**-3)])
def test_states_in_few_bits(exchange: Path, server: FeatureStandIn, dtype: str, bound: float) -> None:
    """bfloat16 keeps 8 bits of a number, float8 4 of all but the smallest ones; scales share a token's largest."""
    server.dtype = dtype
    servers = asking(exchange, [server])
    found = taken(servers)
    assert all(sample.features is not None and sample.features.hidden.dtype == torch.bfloat16 for sample in found)
    for sample in found:
        own = expected(sample).features
        assert own is not None
        assert sample.features is not None
        atol = float(own.hidden.abs().max()) * 2**-9
        torch.testing.assert_close(sample.features.hidden.float(), own.hidden, rtol=bound, atol=atol)
    with pytest.raises(ConfigError, match="another number format"):
        asking(exchange, [server], stored="float32").check()


def test_servers_of_two_number_formats_are_refused(exchange: Path, pair: list[FeatureStandIn]) -> None:
    pair[1].dtype = "bfloat16"
    with pytest.raises(ConfigError, match="another number format than the others"):
        asking(exchange, pair).check()


def test_taps_stand_in_the_order_asked(exchange: Path, server: FeatureStandIn) -> None:
    (found,) = taken(asking(exchange, [server], layers=AskedLayers(taps=(2, 0), num_layers=4)), samples(1))
    (own,) = taken(asking(exchange, [server]), samples(1))
    assert found.features is not None
    assert own.features is not None
    torch.testing.assert_close(found.features.hidden, own.features.hidden.view(-1, 2, 16).flip(1).flatten(1))
    assert LAYERS.ids == (1, 3, 4)
    assert AskedLayers(taps=(-1, 30), num_layers=48).ids == (0, 31, 48)


def test_the_folder_never_holds_more_than_its_bound(exchange: Path, server: FeatureStandIn) -> None:
    """A bound of three of the longest files, with sixteen requests at once: most wait, and none is lost."""
    same = [evolve(sample, input_ids=samples()[0].input_ids) for sample in samples(30)]
    servers = asking(exchange, [server], at_once=16, prefetch=30, stored="float32")
    work = servers.farm.work
    most = 3 * work.bytes_of(len(same[0].input_ids))  # type: ignore[attr-defined]
    server.slow = 0.01
    servers = asking(exchange, [server], at_once=16, prefetch=30, stored="float32", most=most)
    assert len(taken(servers, same)) == 30
    peak = servers.farm.work.exchange.peak  # type: ignore[attr-defined]
    assert most / 2 < peak <= most
    assert server.most_at_once == 3


def test_samples_are_asked_for_ahead_as_far_as_prefetch_says(exchange: Path, server: FeatureStandIn) -> None:
    with asking(exchange, [server], prefetch=5).stream(samples()) as stream:
        rest = iter(stream)
        wait_until(lambda: len(server.asked) == 5)
        time.sleep(0.1)
        assert len(server.asked) == 5
        next(rest)
        wait_until(lambda: len(server.asked) == 6)
    assert left(exchange) == []


def test_what_a_killed_process_left_is_removed_and_nobody_elses(exchange: Path, server: FeatureStandIn) -> None:
    """Rank 1 of 2 cleans up after ranks 1 and 3 of an earlier session with four; ranks 0 and 2 are not its business."""

    def write(owner: str, rank: int) -> str:
        name = f"{Ownership(owner=owner, rank=rank).beginning}000000001.safetensors"
        (exchange / name).write_bytes(b"half a file")
        (exchange / f"{name}.lock").touch()
        return name

    own = [write(OWNER, rank) for rank in (1, 3)]
    others = [write(OWNER, rank) for rank in (0, 2)] + [write("f" * 16, 1)]
    (exchange / "notes.txt").touch()
    servers = asking(exchange, [server], ownership=Ownership(owner=OWNER, rank=1, world=2))
    assert servers.farm.work.exchange.clear() == (2, 2 * len(b"half a file"))  # type: ignore[attr-defined]
    assert left(exchange) == sorted([*others, *(f"{name}.lock" for name in others), "notes.txt"])
    assert not any(name in left(exchange) for name in own)


def test_two_runs_in_one_folder_leave_each_other_alone(exchange: Path, pair: list[FeatureStandIn]) -> None:
    many = samples(40)
    runs = [asking(exchange, pair, ownership=Ownership(owner=digit * 16)) for digit in "ab"]
    found: dict[int, list[Sample]] = {}
    # Both clear what is theirs again and again while the other works.
    over = threading.Event()

    def clearing() -> None:
        while not over.is_set():
            asking(exchange, pair, ownership=Ownership(owner="c" * 16)).farm.work.exchange.clear()  # type: ignore[attr-defined]

    threads = [threading.Thread(target=lambda n=n: found.update({n: taken(runs[n], many)})) for n in range(2)]
    cleaner = threading.Thread(target=clearing)
    for thread in (cleaner, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    over.set()
    cleaner.join()
    for number in range(2):
        check(found[number], many)
        assert runs[number].tally.failed == 0
    assert left(exchange) == []


def test_a_stream_that_is_closed_early_ends_at_once_and_removes_its_files(
    exchange: Path, server: FeatureStandIn
) -> None:
    server.faults = ["", *["hang"] * 12]
    with asking(exchange, [server], timeout=60.0).stream(samples()) as stream:
        next(iter(stream))
        wait_until(lambda: server.at_once == 4)
        threading.Timer(0.1, stream.close).start()
        assert len(list(stream)) < 12, "whoever waits for a sample waits no longer"
    assert left(exchange) == []
