"""Peak memory of a training step by the length of its one sequence, for three drafters, with and without recomputing.

    python tests/benchmarks/long_context.py --output runs/long-context [--lengths 4096 8192 ...] [--drafts dflash ...]

Each figure comes from a process of its own: it makes a draft of small width (H 128, two query heads of 32, V 4,096) and
one sequence with bfloat16 features of five taps, and does one optimizer step (forward, loss, backward, clipping, AdamW)
in bfloat16 autocast. `peak_bytes` is how far the process's peak resident memory rises above what it held before the
step, that is beyond weights and the batch. `estimated_bytes` is what `deepspec estimate` counts for the same. A step is
linear in the length where both no more than double from one length to the next. Eagle3's time is quadratic, because
each position attends to all before it. Writes long_context.json and prints the table of RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from trees import commit

from deepspec_core.config.schema import LossOptions, TrainOptions
from deepspec_core.contracts.draft import DraftModel, Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.estimating.memory import fake_tensors
from deepspec_core.estimating.process import resident_bytes
from deepspec_core.estimating.step import estimate_step
from deepspec_core.layers.recomputing import recompute_layers
from deepspec_core.pipeline.machine import machine_of
from deepspec_core.plugins.discovery import load_plugins
from deepspec_core.plugins.registry import Registry
from deepspec_core.rows.engine import build_engine
from deepspec_core.training.host_batch import HostBatch
from deepspec_core.training.loader import MicroBatches, Plan
from deepspec_core.training.reduction import normalise
from deepspec_core.training.step import TrainingStep

LENGTHS = (4096, 8192, 16384, 32768)
HIDDEN, VOCAB, TAPS = 128, 4096, (1, 3, 5, 7, 9)
OPTIONS: dict[str, dict[str, Any]] = {
    "dflash": {"num_layers": 3, "block_size": 8, "num_anchors": 256, "mask_token_id": VOCAB - 1},
    "dspark": {"num_layers": 3, "block_size": 7, "num_anchors": 256, "mask_token_id": VOCAB - 1},
    "eagle3": {"ttt_length": 3, "num_anchors": 256},
}


class OneSequence:
    """A source of one sequence with features."""

    def __init__(self, length: int) -> None:
        self.sample = Sample(
            id="long",
            input_ids=torch.randint(2, VOCAB - 2, (length,)),
            loss_mask=torch.arange(length) > 0,
            original_length=length,
            features=TargetFeatures(
                hidden=torch.randn(length, HIDDEN * len(TAPS)).bfloat16(),
                last_hidden=torch.randn(length, HIDDEN).bfloat16(),
            ),
        )

    def __len__(self) -> int:
        return 1

    def lengths(self) -> list[int]:
        return [len(self.sample.input_ids)]

    def __getitem__(self, index: int) -> Sample:
        return self.sample

    def features(self, *_: Any) -> TargetFeatures:
        raise AssertionError("features are stored")


def new_draft(registry: Registry, algorithm: str, *, recomputes: bool) -> DraftModel:
    """A draft for a Qwen3-like target of small width, with new weights."""
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=12,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=max(LENGTHS),
        eos_token_id=1,
        pad_token_id=0,
    )
    adapter = registry.load("target", registry.adapter_for("qwen3").name)(config, None, None)
    options = registry.get("draft", algorithm).options
    assert options is not None
    draft: DraftModel = registry.load("draft", algorithm)(options(**OPTIONS[algorithm]), adapter, TAPS)
    if recomputes:
        recompute_layers(draft)
    return draft


def measure(algorithm: str, length: int, *, recomputes: bool, runs: bool = True) -> dict[str, Any]:
    """The figures of one step, in this process; only the estimate unless it `runs`."""
    torch.manual_seed(0)
    registry = load_plugins().registry
    loss = LossOptions(terms={"ce": 1.0} if algorithm == "dflash" else {"kl": 1.0})
    source = OneSequence(length)
    draft = new_draft(registry, algorithm, recomputes=recomputes)
    batch: HostBatch = MicroBatches(source, draft.preparation, seed=0)[Plan(epoch=0, indices=(0,))]
    with fake_tensors():
        fake = new_draft(registry, algorithm, recomputes=recomputes)
    estimated = estimate_step(
        draft=fake, engine=build_engine(loss, registry), batch=batch, source=source, device_type="cpu",
        compute_dtype=torch.bfloat16, accumulates=False, options=TrainOptions(),
    )  # fmt: skip
    if not runs:
        most = max(estimated.phases.values())
        return {"draft": algorithm, "length": length, "recomputes": recomputes, "estimated_bytes": most}
    step = TrainingStep(draft.train(), build_engine(loss, registry), compute_dtype=torch.bfloat16)
    trained = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, fused=True)
    short = OneSequence(256)
    one_step(step, optimizer, MicroBatches(short, draft.preparation, seed=0)[Plan(epoch=0, indices=(0,))], short)
    before, began = resident_bytes(), time.monotonic()
    one_step(step, optimizer, batch, source)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "draft": algorithm,
        "length": length,
        "recomputes": recomputes,
        "peak_bytes": peak - before,
        "estimated_bytes": max(estimated.phases.values()),
        "rows": estimated.rows,
        "seconds": round(time.monotonic() - began, 2),
    }


def one_step(step: TrainingStep, optimizer: torch.optim.Optimizer, batch: HostBatch, source: OneSequence) -> None:
    """Forward, loss, backward, clipping, optimizer."""
    result = step(batch.to_draft_batch(source, torch.device("cpu")))
    result.total.backward()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    normalise(trained, result.denominator, world_size=1, clip_norm=1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main() -> None:
    """Measure each case in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/long-context"))
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--drafts", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    parser.add_argument("--estimate", action="store_true", help="count bytes only, in a moment, without a step")
    parser.add_argument("--one", nargs=3, metavar=("DRAFT", "LENGTH", "RECOMPUTES"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        algorithm, length, recomputes = asked.one
        print(json.dumps(measure(algorithm, int(length), recomputes=recomputes == "yes")))
        return
    asked.output.mkdir(parents=True, exist_ok=True)
    cases: list[dict[str, Any]] = []
    for algorithm in asked.drafts:
        for recomputes in ("no", "yes"):
            for length in asked.lengths:
                if asked.estimate:
                    cases.append(measure(algorithm, length, recomputes=recomputes == "yes", runs=False))
                else:
                    one = [sys.executable, __file__, "--one", algorithm, str(length), recomputes]
                    said = subprocess.run(one, check=True, capture_output=True, text=True).stdout
                    cases.append(json.loads(said.splitlines()[-1]))
                print(cases[-1], file=sys.stderr, flush=True)
                report = {"commit": commit(), "machine": machine_of(torch.device("cpu")), "cases": cases}
                (asked.output / "long_context.json").write_text(json.dumps(report, indent=1))
    print("| drafter | recomputed | " + " | ".join(f"T {length:,}" for length in asked.lengths) + " |")
    print("|---|---|" + "---|" * len(asked.lengths))
    for algorithm in asked.drafts:
        for recomputes in (False, True):
            row = [one for one in cases if (one["draft"], one["recomputes"]) == (algorithm, recomputes)]
            told = [f"{one['estimated_bytes'] / 1e6:,.0f} MB" for one in row]
            if not asked.estimate:
                told = [f"{one['peak_bytes'] / 1e6:,.0f} MB ({text})" for one, text in zip(row, told, strict=True)]
            print(f"| {algorithm} | {'layers' if recomputes else 'nothing'} | {' | '.join(told)} |")


if __name__ == "__main__":
    main()
