"""Trainings of the tiny draft by several processes over gloo: `train_in({folder: options}, ranks=2)`.

They do one training after another, because starting takes longest. As a script it is one of the processes. It knows the
options of test_trainer.py.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from attrs import evolve
from test_trainer import OPTIONS, run

from deepspec_core.contracts.draft import DraftBatch, Texts
from deepspec_core.contracts.rows import Rows
from deepspec_core.testing.tiny_draft import TinyDraft, TinySource

SAMPLES = 17  # three steps an epoch, the last one of one sample: ranks other than the first have no share of it


class RollingDraft(TinyDraft):
    """Trains on texts that its own weights choose, which must be whole where it does."""

    def rollout(self, texts: Texts, uniforms: torch.Tensor) -> Texts:
        """Each token plus a number that follows from the token and the weights."""
        shift_V = (self.embed_tokens.weight @ self.slots.sum(0)).sigmoid().mul(4).long()
        ids = (texts.input_ids + shift_V[texts.input_ids]) % len(shift_V)
        return evolve(texts, input_ids=ids)


class IdleDraft(TinyDraft):
    """Has a weight that nothing reads, and one that only sequences read whose first token is even."""

    def __init__(self, *, rank: int) -> None:
        super().__init__(rank=rank)
        self.unread = torch.nn.Parameter(torch.ones(3))
        self.seldom = torch.nn.Parameter(torch.ones(16))

    def forward(self, batch: DraftBatch) -> Rows:
        """As the tiny draft's, with `seldom` in the hidden states of even sequences."""
        rows = super().forward(batch)
        return rows if batch.input_ids[0, 0] % 2 else evolve(rows, hidden=rows.hidden * self.seldom)


class UnlikeDraft(IdleDraft):
    """Reads one of its weights on the first rank only."""

    def forward(self, batch: DraftBatch) -> Rows:
        """As the tiny draft's, with `seldom` in the hidden states of the first rank."""
        rows = TinyDraft.forward(self, batch)
        return rows if os.environ["RANK"] != "0" else evolve(rows, hidden=rows.hidden * self.seldom)


DRAFTS = {"tiny": TinyDraft, "rolling": RollingDraft, "idle": IdleDraft, "unlike": UnlikeDraft}


def train(folder: Path, *, draft: str = "tiny", **options: Any) -> Any:
    """One training of a draft of DRAFTS, by this process or its share of it."""
    source = TinySource(SAMPLES, stored=draft != "rolling")
    source.of_given_texts = True  # type: ignore[attr-defined]
    return run(folder, evolve(OPTIONS, **options), source=source, draft=DRAFTS[draft](rank=2))[1]


def begin(
    cases: Mapping[Path, Mapping[str, Any]], *, ranks: int, a_machine: int | None = None
) -> list[subprocess.Popen[str]]:
    """The processes, started. `a_machine`: how many of them say that they share a machine; None: all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(a_machine or ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, __file__, json.dumps({str(folder): options for folder, options in cases.items()})],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def train_in(
    cases: Mapping[Path, Mapping[str, Any]], *, ranks: int, a_machine: int | None = None, timeout: float = 240
) -> dict[Path, dict[str, Any]]:
    """Do every training to its end. What the first rank says came of each."""
    processes = begin(cases, ranks=ranks, a_machine=a_machine)
    try:
        said = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(said)
    return {folder: json.loads((folder / "result.json").read_text()) for folder in cases}


def main(cases: Mapping[str, Mapping[str, Any]]) -> None:
    torch.set_num_threads(1)
    for folder, options in cases.items():
        result = train(Path(folder), **options)
        if os.environ["RANK"] == "0":
            told = {"resumed_from": result.resumed_from, "damaged": result.damaged, "counts": result.counts}
            (Path(folder) / "result.json").write_text(json.dumps(told))
    # A group that outlives its process may abort it.
    torch.distributed.destroy_process_group()
    # The results are written. PyTorch's own threads abort a process once in a while when the interpreter ends.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
