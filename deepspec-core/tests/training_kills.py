"""Trainings that are killed at random moments and begun again, until enough kills have hit one at work.

    python training_kills.py FOLDER RANKS PARALLEL KILLS SEED

Writes a JSON object: the folders of finished trainings, and what each kill hit. Processes are forked from this one,
which has imported everything and computed nothing, so that a start takes no seconds. It knows the options of
test_trainer.py.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from attrs import evolve
from test_trainer import OPTIONS, run

from deepspec_core.testing.tiny_draft import TinySource
from deepspec_core.training.checkpoint import latest, step_of

SAMPLES = 17
OFTEN = evolve(OPTIONS, checkpoint_every=1, log_every=1, epochs=8)  # 24 steps
SECONDS_TO_END = 60.0


def _start(folder: Path, rank: int, ranks: int, port: int, parallel: str) -> int:
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        if ranks > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        run(folder, evolve(OFTEN, parallel=parallel), source=TinySource(SAMPLES))
        if ranks > 1:
            torch.distributed.destroy_process_group()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _ended(children: list[int], until: float) -> dict[int, int]:
    """Exit codes of those that end by then."""
    codes: dict[int, int] = {}
    while len(codes) < len(children) and time.monotonic() < until:
        for child in children:
            if child not in codes:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return codes


def _what(folder: Path) -> str:
    """What a kill hit."""
    checkpoints = folder / "checkpoints"
    if list(checkpoints.glob(".step-*.unfinished")):
        return "a checkpoint half written"
    if list(checkpoints.glob(".step-*.removed")):
        return "a checkpoint half removed"
    return "between checkpoints" if list(checkpoints.glob("step-*")) else "before the first checkpoint"


def _at_work(log: Path, before: int, first: bool, checkpoint: Path | None) -> bool:
    """Whether this life has taken up its log, or, with `first`, written a step to it."""
    if not log.exists() or log.stat().st_mtime_ns == before:
        return False
    return not first or log.read_text().count("\n") > (0 if checkpoint is None else step_of(checkpoint))


def _life(folder: Path, ranks: int, parallel: str, moment: float, draw: random.Random) -> str | None:
    """Train until killed `moment` seconds after training began. What was hit; None where it ended before."""
    folder.mkdir(exist_ok=True)
    port = _port()
    children = [_start(folder, rank, ranks, port, parallel) for rank in range(ranks)]
    log = folder / "metrics.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0
    began = time.monotonic()
    # A moment counts from where the process takes up its folder, or, three times out of four, from its first step:
    # meeting each other and the first step take longer than all others.
    first = draw.random() < 0.75
    while time.monotonic() < began + 30 and not _at_work(log, before, first, checkpoint=latest(folder)):
        time.sleep(0.002)
    codes = _ended(children, time.monotonic() + moment)
    if len(codes) == ranks:
        assert set(codes.values()) == {0}, codes
        return None
    # One of them first; the launcher ends the others a little later.
    victims = draw.sample(children, len(children))
    hit = _what(folder)
    for victim in victims:
        if victim not in codes:
            os.kill(victim, signal.SIGKILL)
            time.sleep(draw.uniform(0, 0.05))
    left = [child for child in children if child not in codes]
    assert len(_ended(left, time.monotonic() + SECONDS_TO_END)) == len(left)
    return hit


def main(base: Path, ranks: int, parallel: str, kills: int, seed: int) -> None:
    draw, hits, folders = random.Random(seed), list[str](), list[str]()
    while len(hits) < kills or not folders:
        folder = base / str(len(folders))
        while True:
            # A training that has been killed often enough may end.
            moment = draw.uniform(0.0, 0.8) if len(hits) < kills else 240.0
            hit = _life(folder, ranks, parallel, moment, draw)
            if hit is None:
                break
            hits.append(hit)
        folders.append(str(folder))
    sys.stdout.write(json.dumps({"folders": folders, "hits": hits}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
