"""Training with the target in vLLM, on two servers: as good a draft as online; servers that fail and return."""

import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from feature_server import FeatureServer

from deepspec_core.cli.main import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]

SAMPLES, EPOCHS, SEEDS = 500, 4, (1, 2, 3)
STEPS = SAMPLES * EPOCHS // 16
# Features differ by rounding, so drafts do too. Between seeds, accepted lengths are further apart than this.
BY_ROUNDING = 0.03
# Of a step's loss, relative, with the same seed. Training amplifies rounding: online, one thread and two differ in the
# median step by 1e-8 to 1e-6, and in single steps of seed 3 by 1.2e-3. Features of vLLM gave 3.8e-3 in the same step.
# Features of another layer would change every step.
LOSS_BY_ROUNDING = 1e-4
LOSS_AMPLIFIED = 2e-2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def path(new_run_file: Callable[[Path], Path], folder: Path) -> Path:
    return new_run_file(folder)


@pytest.fixture(scope="module")
def answered(path: Path) -> Path:
    """Conversations that the target answered, for every run of this file."""
    sources = 'data.sources=[{path="builtin:tiny-dialogues", limit=' + str(SAMPLES) + "}]"
    changes = ['run.stages=["regenerate"]', "run.output=answered", "run.threads=1", sources]
    assert main(["run", str(path), *(word for change in changes for word in ("--set", change))]) == 0
    return path.parent / "answered" / "regenerate" / "conversations.jsonl"


@pytest.fixture(scope="module")
def servers(path: Path, folder: Path) -> Iterator[list[FeatureServer]]:
    both = [FeatureServer(path, folder / "exchange", folder / f"{name}.log") for name in ("first", "second")]
    for server in both:
        server.begin()
    try:
        for server in both:
            server.wait()
        yield both
    finally:
        codes = [server.stop() for server in both]
    assert codes == [130, 130]


def _run(path: Path, output: str, *settings: str, seed: int = 1) -> Path:
    """Train and evaluate; the run's folder."""
    changes = [
        'run.stages=["train", "evaluate"]',
        f"run.output={output}",
        f"run.seed={seed}",
        "run.threads=1",
        'data.sources=[{path="answered/regenerate/conversations.jsonl"}]',
        f"train.epochs={EPOCHS}",
        "train.log_every=1",
        "evaluate.temperature=[0.0]",
        *settings,
    ]
    assert main(["run", str(path), *(word for change in changes for word in ("--set", change))]) == 0
    return path.parent / output


def _served(servers: list[FeatureServer]) -> list[str]:
    addresses = json.dumps([f"{server.address}/v1" for server in servers])
    return ["features.mode=server", f"features.servers={addresses}", f"features.exchange={servers[0].exchange}"]


def _length(run: Path) -> float:
    (result,) = json.loads((run / "metrics.json").read_text())["results"]
    return float(result["acceptance_length"])


def _lines(run: Path) -> list[dict[str, Any]]:
    metrics = run / "train" / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


@pytest.mark.usefixtures("answered")
def test_a_draft_is_as_good_as_one_trained_online(path: Path, servers: list[FeatureServer]) -> None:
    online, served = [], []
    for seed in SEEDS:
        began = time.monotonic()
        online.append(_length(_run(path, f"online-{seed}", "features.mode=online", seed=seed)))
        between = time.monotonic()
        run = _run(path, f"served-{seed}", *_served(servers), seed=seed)
        served.append(_length(run))
        losses = [[line["loss"] for line in _lines(folder)] for folder in (run, path.parent / f"online-{seed}")]
        apart = [abs(one / other - 1) for one, other in zip(*losses, strict=True)]
        assert statistics.median(apart) < LOSS_BY_ROUNDING, seed
        assert max(apart) < LOSS_AMPLIFIED, seed
        print(f"seed {seed}: {between - began:.0f} s online, {time.monotonic() - between:.0f} s served")  # noqa: T201
        print(json.dumps(_lines(run)[-1]))  # noqa: T201
    print("online", online, "served", served)  # noqa: T201
    assert list(servers[0].exchange.iterdir()) == []
    assert statistics.mean(served) / statistics.mean(online) == pytest.approx(1, abs=BY_ROUNDING), (served, online)


@pytest.mark.usefixtures("answered")
def test_servers_that_are_killed_return(
    path: Path, servers: list[FeatureServer], capfd: pytest.CaptureFixture[str]
) -> None:
    """One is killed: the other goes on. Then that one too: training waits until the first is back."""
    run, seen = path.parent / "killed", dict[str, int]()
    first, second = servers

    def wait_for(steps: int) -> int:
        while (done := len(_lines(run))) < steps:
            time.sleep(0.05)
        return done

    def fail() -> None:
        seen["first"] = wait_for(STEPS // 10)
        first.kill()
        seen["second"] = wait_for(seen["first"] + STEPS // 5)
        second.kill()
        first.begin()
        first.wait()

    helper = threading.Thread(target=fail, daemon=True)
    helper.start()
    _run(path, "killed", *_served(servers))
    helper.join()
    second.begin()
    second.wait()
    said = capfd.readouterr().err
    for server in servers:
        assert f"{server.address}/v1 is out" in said
    assert f"{first.address}/v1 is in again" in said
    lines = _lines(run)
    print(seen, len(lines), _length(run), json.dumps(lines[-1]))  # noqa: T201
    assert list(first.exchange.iterdir()) == [], "what the killed servers were writing is removed"
