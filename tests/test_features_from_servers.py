"""Runs whose features come from servers: the same draft as online, the same cache, and what is said when it fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from feature_stand_in import ONE_AT_A_TIME, FeatureStandIn, States, feature_servers
from safetensors.torch import load_file
from stand_in_server import wait_until

from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.cli.main import main
from deepspec_core.features.served.exchange import Ownership, owner_of
from deepspec_core.interface.models import Target

TAPS = (2, 4, 6, 8, 10)
MODEL = "builtin:tiny-qwen3"
SMALL = ["--set", "run.threads=1", "--set", 'run.stages=["train"]']
ONE = ["--set", "train.micro_batch_size=1"]


@pytest.fixture
def run_file(tmp_path: Path, new_run_file: Callable[[Path], Path]) -> Path:
    """The quickstart's run file with a dozen conversations that have answers, and six steps of four."""
    path, data = new_run_file(tmp_path), tmp_path / "answered.jsonl"
    with data.open("w") as file:
        for number in range(12):
            asked = {"role": "user", "content": f"What is {number} + {number}?"}
            said = {"role": "assistant", "content": f"{2 * number}. " * (number + 5)}
            file.write(json.dumps({"messages": [asked, said]}) + "\n")
    text = path.read_text()
    for old, new in {
        '{path = "builtin:tiny-dialogues", limit = 2500}': f'{{path = "{data}"}}',
        "\n[data]\n": "\n[data]\nheld_out = 0.0\nmin_supervised_tokens = 1\n",
        "global_batch_size = 16": "global_batch_size = 4",
        "micro_batch_size = 16": "micro_batch_size = 4",
        "epochs = 6": "epochs = 2\nlog_every = 1",
        "checkpoint_every = 200": "checkpoint_every = 1",
    }.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


@pytest.fixture
def states(target: Target) -> Iterator[States]:
    """ids -> [T, K, H] of the built-in target as vLLM gives them: the final state before the last norm."""
    seen: list[torch.Tensor] = []
    model: Any = target.model
    hook = model.decoder.norm.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))

    def computed(ids: list[int]) -> torch.Tensor:
        input_ids = torch.tensor([ids])
        with ONE_AT_A_TIME:
            found = model.features(input_ids, torch.ones_like(input_ids).bool(), None, None, TAPS)
            hidden = found.hidden[0].view(len(ids), len(TAPS), -1)
            return torch.cat([hidden, seen.pop()[0][:, None]], 1)

    yield computed
    hook.remove()


@pytest.fixture
def exchange(tmp_path: Path) -> Path:
    (tmp_path / "exchange").mkdir()
    return tmp_path / "exchange"


@pytest.fixture
def servers(exchange: Path, target: Target, states: States) -> Iterator[list[FeatureStandIn]]:
    """Two servers of the built-in target, in float32."""
    ids = [*(tap + 1 for tap in TAPS), target.model.architecture.num_layers]
    running = [FeatureStandIn(states, ids, exchange, model=MODEL) for _ in range(2)]
    for server in running:
        server.normed = "false"
    with feature_servers(*running):
        yield running


def served(exchange: Path, servers: list[FeatureStandIn], *changes: str) -> list[str]:
    addresses = json.dumps([server.address for server in servers])
    settings = ["features.mode=server", f"features.servers={addresses}", f"features.exchange='{exchange}'", *changes]
    return [part for setting in settings for part in ("--set", setting)]


def folder_of(run_file: Path) -> Path:
    return run_file.parent / "runs" / "quickstart-dflash"


def weights(run_file: Path) -> dict[str, torch.Tensor]:
    return load_file(folder_of(run_file) / "draft" / "model.safetensors")


def test_a_draft_trained_from_servers_is_the_one_trained_online(
    run_file: Path, exchange: Path, servers: list[FeatureStandIn]
) -> None:
    """To the bit: one sequence a batch, float32 files, and the same operations on the same memory."""
    run = ["run", str(run_file), *SMALL, *ONE, "--force", "train"]
    assert main([*run, "--set", "features.mode=online"]) == 0
    expected = weights(run_file)
    assert main([*run, *served(exchange, servers)]) == 0
    found = weights(run_file)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_servers_are_compared_with_the_target_before_the_first_stage(
    run_file: Path,
    exchange: Path,
    servers: list[FeatureStandIn],
    states: States,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(*changes: str) -> str:
        assert main(["run", str(run_file), *SMALL, "--force", "train", *served(exchange, servers, *changes)]) == 2
        said = capsys.readouterr()
        assert "train: starting" not in said.out
        return said.err

    one, other = servers
    # vLLM started with L in place of L + 1: each state is the one below.
    moved = states(list(range(5, 25)))
    one.states = lambda ids: states(ids)[:, [0, 0, 1, 2, 3, 5]]
    message = refused("features.probe=target")
    assert "A server counts layers otherwise" in message
    assert "layer 4: error" in message
    assert "nearer to layer 2 (error 0)" in message
    assert one.address in message
    assert "A server counts layers otherwise" in refused()
    one.states = lambda ids: states(ids) + 0.3 * moved.abs().mean() * torch.randn(len(ids), 6, moved.shape[-1])
    assert "not those of this target" in refused("features.probe=target")
    one.states, one.model = states, "somebody/else"
    assert "serves another model" in refused()
    one.model = MODEL
    one.stop()
    other.stop()
    assert "no server answers" in refused()


def test_what_is_missing_is_said_before_the_first_stage(
    run_file: Path, exchange: Path, servers: list[FeatureStandIn], target: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*changes: str, workers: int = 1) -> str:
        run = ["run", str(run_file), *SMALL, "--workers", str(workers), "--force", "train"]
        assert main([*run, *served(exchange, servers, *changes)]) == 2
        said = capsys.readouterr()
        assert "train: starting" not in said.out
        return said.err

    assert "is no folder" in refused("features.exchange=nowhere")
    assert "features.exchange_gb" in refused("features.exchange_gb=0.0001")
    longest = 384 * (8 + 6 * 4 * target.model.architecture.hidden_size) + 8192
    message = refused(f"features.exchange_gb={1.5 * longest / 1e9}", workers=2)
    assert "for each of 2 processes" in message
    assert "no server is named" in refused("features.servers=[]")
    assert 'features.mode = "online"' in refused("features.mode=online")
    for server in servers:
        server.max_model_len = 384
    message = refused()
    assert "shorter texts" in message
    assert "385" in message


def test_a_cache_is_built_by_servers_and_says_so(
    run_file: Path, exchange: Path, servers: list[FeatureStandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    """In float32, and one sample a batch in this process: the same to the bit."""
    stages = ["--set", 'run.stages=["cache", "train"]', "--set", "features.mode=cached"]
    run = ["run", str(run_file), "--set", "run.threads=1", *stages]
    run += ["--set", "cache.dtype=float32", "--set", "cache.batch_size=1", "--stages", "cache"]
    asking = served(exchange, servers, "features.mode=cached")
    assert main([*run, "--force", "cache"]) == 0
    own = cached(run_file)
    assert main([*run, *asking]) == 2, "another computer of features under the same cache"
    assert "What computes the features of the cache changed" in capsys.readouterr().err
    assert main([*run, *asking, "--force", "cache"]) == 0
    theirs = cached(run_file)
    assert theirs.keys() == own.keys()
    for name, (hidden, last_hidden) in own.items():
        torch.testing.assert_close(theirs[name][0], hidden, rtol=0, atol=0)
        torch.testing.assert_close(theirs[name][1], last_hidden, rtol=0, atol=0)
    summary = json.loads((folder_of(run_file) / "cache" / "stage.json").read_text())["summary"]
    assert summary["texts from servers"] == summary["samples"] == len(own)
    assert list(exchange.iterdir()) == []
    # Which servers there are is nothing to the results: the stage is skipped although nobody listens there.
    assert main([*run, "--set", "features.servers=['http://127.0.0.1:9/v1']", *asking[4:]]) == 0


def cached(run_file: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    reader = HDF5Format().open(folder_of(run_file) / "cache", None)
    samples = [reader[number] for number in range(len(reader))]
    return {one.id: (one.features.hidden, one.features.last_hidden) for one in samples if one.features is not None}


@pytest.mark.slow
def test_what_a_killed_run_left_is_removed_when_it_goes_on(
    run_file: Path, exchange: Path, servers: list[FeatureStandIn], capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", str(run_file), *SMALL, *served(exchange, servers)]
    assert main([*run, "--set", "train.max_steps=2"]) == 0
    own = Ownership(owner=owner_of(folder_of(run_file))).beginning
    for name in (f"{own}000000007.safetensors", f"{own}000000007.safetensors.lock", f"{own}000000008.safetensors"):
        (exchange / name).write_bytes(b"half")
    other = exchange / "ds-ffffffffffffffff-0-00000000-000000001.safetensors"
    other.write_bytes(b"another run's")
    assert main([*run, "--force", "train"]) == 0
    assert "removed 2 files (8 bytes) of an earlier process" in capsys.readouterr().err
    assert list(exchange.iterdir()) == [other]
    lines = [json.loads(line) for line in (folder_of(run_file) / "train" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["served_bytes"] > 2 * 12 * 1000
    assert lines[-1]["served_failures"] == 0
    assert 0 <= lines[-1]["loader_wait"] <= 1
    # Another format would mix two kinds of features in one draft: the stage is unfinished again, as after a kill.
    shutil.rmtree(folder_of(run_file) / "train" / "checkpoints" / "step-000006")
    record = folder_of(run_file) / "train" / "stage.json"
    record.write_text(record.read_text().replace('"complete": true', '"complete": false'))
    capsys.readouterr()
    for server in servers:
        server.dtype = "bfloat16"
    assert main(run) == 2
    assert "another number format than the others, or than this run began with" in capsys.readouterr().err
    for server in servers:
        server.dtype = "float32"
    assert main(run) == 0


@pytest.mark.slow
def test_killed_in_the_middle_and_gone_on_with_it_is_the_same_draft(
    run_file: Path, exchange: Path, servers: list[FeatureStandIn]
) -> None:
    run = ["run", str(run_file), *SMALL, *served(exchange, servers)]
    assert main([*run, "--force", "train"]) == 0
    expected = weights(run_file)
    shutil.rmtree(folder_of(run_file) / "train")
    for server in servers:
        server.slow = 0.5
    run += ["--set", "features.prefetch=2"]
    process = subprocess.Popen([sys.executable, "-m", "deepspec_core", *run], stdout=subprocess.DEVNULL)
    checkpoints = folder_of(run_file) / "train" / "checkpoints"
    wait_until(lambda: any(checkpoints.glob("step-00000[2-4]")) and sum(one.at_once for one in servers), seconds=200)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for server in servers:
        server.slow = 0.0
        wait_until(lambda server=server: server.at_once == 0)
    assert any(exchange.iterdir()), "servers write what nobody waits for any more"
    assert main(run) == 0
    torch.testing.assert_close(weights(run_file), expected, rtol=0, atol=0)
    assert list(exchange.iterdir()) == []


@pytest.mark.slow
def test_stopped_while_no_server_answers_and_gone_on_with_it_is_the_same_draft(
    run_file: Path, exchange: Path, servers: list[FeatureStandIn]
) -> None:
    """Schedulers give a minute between their signal and the end, and a server may take longer."""
    run = ["run", str(run_file), *SMALL, *served(exchange, servers), "--set", "train.checkpoint_every=100"]
    assert main([*run, "--force", "train"]) == 0
    expected = weights(run_file)
    shutil.rmtree(folder_of(run_file) / "train")
    metrics = folder_of(run_file) / "train" / "metrics.jsonl"

    def stop() -> None:
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, seconds=100)
        for server in servers:
            server.stop()
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    assert main([*run, "--set", "features.prefetch=2", "--set", "features.timeout=60"]) == 128 + signal.SIGTERM
    stopper.join()
    (saved,) = (folder_of(run_file) / "train" / "checkpoints").glob("step-*")
    assert 2 <= int(saved.name.removeprefix("step-")) < 6
    for server in servers:
        server.start_again()
    assert main(run) == 0
    torch.testing.assert_close(weights(run_file), expected, rtol=0, atol=0)
    assert list(exchange.iterdir()) == []


@pytest.mark.slow
def test_the_summary_counts_what_all_workers_got(
    run_file: Path, exchange: Path, servers: list[FeatureStandIn], capfd: pytest.CaptureFixture[str]
) -> None:
    run = ["run", str(run_file), *SMALL, *ONE, *served(exchange, servers, "features.in_flight=1"), "--workers", "2"]
    assert main(run) == 0
    summary = json.loads((folder_of(run_file) / "train" / "stage.json").read_text())["summary"]
    assert summary["texts from servers"] == 2 * 12
    assert capfd.readouterr().err.count("features.in_flight = 1 is less than the 2 processes of this run") == 1
