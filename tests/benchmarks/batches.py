"""Padding of the three kinds of batching, and the time of a training step on packed rows beside padded ones.

    python tests/benchmarks/batches.py --output runs/batches [--quickstart FOLDER] [--repeats 5] [--drafts dflash ...]

Two sets of lengths: those of the quickstart's answers (it is run first unless a finished run is named), and 20,000 from
a log-normal distribution with a median of 545 tokens, sigma 0.9, cut at 4,096. Padding is the share of a whole epoch's
positions that no token fills, for several sizes of step and micro-batch. Steps of 16 conversations are timed with
random ids: the target's features, then the draft's forward and backward pass. Padded and packed take turns on the same
conversations, step by step, so that they run under the same load of the machine. Times are medians over steps, and the
ratio is the median of each step's own. Writes batches.json and prints the tables of RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import deepspec_core as ds
from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.config.load import load_run_file
from deepspec_core.config.schema import BATCHING
from deepspec_core.contracts.draft import DraftModel, Sample
from deepspec_core.features.online import OnlineFeatures
from deepspec_core.pipeline import threads
from deepspec_core.pipeline.machine import machine_of
from deepspec_core.rows.engine import build_engine
from deepspec_core.training.epoch_order import ORDERS
from deepspec_core.training.loader import MicroBatches, Plan, StepPlans
from deepspec_core.training.sampler import GlobalBatches
from deepspec_core.training.step import TrainingStep

sys.path.insert(0, str(Path(__file__).parent))
from drafters import QUICKSTART, run
from trees import commit

TARGET, TAPS, STEP, MICRO = "builtin:tiny-qwen3", (2, 4, 6, 8, 10), 16, 4
SIZES = ((16, 4), (16, 16), (64, 4), (64, 16), (512, 4), (512, 16))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5, help="steps that are timed")
    parser.add_argument("--drafts", nargs="+", default=["dflash", "dspark", "eagle3"])
    parser.add_argument("--quickstart", type=Path, help="the folder of a quickstart run that has its cache")
    options = parser.parse_args()
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    lengths = {
        "quickstart": quickstart_lengths(options.quickstart or output / "quickstart"),
        "log-normal": np.clip(np.random.default_rng(0).lognormal(6.3, 0.9, 20_000), 16, 4096).astype(int).tolist(),
    }
    padding = [
        {"lengths": name, "step": step, "micro_batch": micro, "batching": kind, **padded(values, step, micro, kind)}
        for name, values in lengths.items()
        for step, micro in SIZES
        for kind in BATCHING
    ]
    print(padding_table(padding), flush=True)
    with threads.using(1):
        target = ds.load_target(TARGET)
        times = [
            time_of
            for draft in options.drafts
            for name, values in lengths.items()
            for time_of in timed(target, draft, name, values, options.repeats)
        ]
        machine = machine_of(target.model.device)
    report = {"commit": commit(), "machine": machine, "padding": padding, "times": times}
    (output / "batches.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(times_table(times))


def quickstart_lengths(folder: Path) -> list[int]:
    """Tokens of the quickstart's training samples, from its cache, which is made where it is not there."""
    if not (folder / "cache" / "manifest.json").exists():
        run(QUICKSTART / "train.toml", [f'run.output="{folder}"', 'run.stages=["regenerate","cache"]'])
    return HDF5Format().open(folder / "cache", None).lengths()


def plans_of(lengths: Sequence[int], step: int, micro: int, kind: str) -> StepPlans:
    batches = GlobalBatches(lengths, global_batch_size=step, epochs=1, seed=0, order=ORDERS[kind])
    return StepPlans(
        batches,
        range(batches.steps_per_epoch),
        rank=0,
        world_size=1,
        micro_batch_size=micro,
        row_tokens=max(lengths) if kind == "packed" else None,
    )


def padded(lengths: Sequence[int], step: int, micro: int, kind: str) -> dict[str, Any]:
    """The share of padding in an epoch, and how many micro-batches it has."""
    positions = tokens = count = 0
    for plan in plans_of(lengths, step, micro, kind):
        sizes, rest = plan.row_sizes or (1,) * len(plan.indices), iter(plan.indices)
        rows = [sum(lengths[next(rest)] for _ in range(size)) for size in sizes]
        positions, tokens, count = positions + max(rows) * len(rows), tokens + sum(rows), count + 1
    return {"padding": 1 - tokens / positions, "micro_batches": count}


def timed(target: Any, name: str, of: str, lengths: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Seconds of each kind's features and draft, step by step."""
    draft, registry = new_draft(target, name), target.plugins.registry
    loss = load_run_file(QUICKSTART / f"{name}.toml", plugins=target.plugins).loss
    step = TrainingStep(draft, build_engine(loss, registry))
    kinds = ("padded", "packed")
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for number in range(repeats + 1):
        # One step's conversations: the same for both kinds.
        for kind in kinds:
            plans = plans_of(lengths, STEP, MICRO, kind).of_step(number)
            source = Drawn(lengths, target.model)
            spent = (0.0, 0.0)
            for plan in plans:
                taken, done = once(source, draft, step, plan)
                spent = spent[0] + taken, spent[1] + done
            if number:  # the first pays for memory and the choice of kernels
                seconds[kind].append(spent)
    figures = []
    for kind in kinds:
        record: dict[str, Any] = {"draft": name, "lengths": of, "batching": kind, "steps": seconds[kind]}
        for part, title in enumerate(("features", "draft")):
            own, base = ([pair[part] for pair in seconds[way]] for way in (kind, "padded"))
            record[f"{title}_seconds"] = statistics.median(own)
            record[f"{title}_ratio"] = statistics.median(a / b for a, b in zip(own, base, strict=True))
        figures.append(record)
        print(json.dumps({part: value for part, value in record.items() if part != "steps"}), flush=True)
    return figures


def once(source: Drawn, draft: DraftModel, step: TrainingStep, plan: Plan) -> tuple[float, float]:
    """Seconds of the target's features, and of the draft's forward and backward pass."""
    host = MicroBatches(source, draft.preparation, seed=0)[plan]
    began = time.perf_counter()
    batch = host.to_draft_batch(source, torch.device("cpu"))
    taken = time.perf_counter()
    step(batch).total.backward()
    return taken - began, time.perf_counter() - taken


class Drawn(OnlineFeatures):
    """Conversations of random ids, supervised in their second half, made when they are asked for."""

    def __init__(self, lengths: Sequence[int], target: Any) -> None:
        super().__init__([], target, TAPS)
        self._lengths, self._vocab_size = lengths, target.architecture.vocab_size

    def __getitem__(self, index: int) -> Sample:
        length = self._lengths[index]
        ids = torch.randint(self._vocab_size, (length,), generator=torch.Generator().manual_seed(index))
        return Sample(
            id=str(index), input_ids=ids, loss_mask=torch.arange(length) >= length // 2, original_length=length
        )


def new_draft(target: Any, name: str) -> DraftModel:
    """The quickstart's draft of this type, with new weights."""
    file = load_run_file(QUICKSTART / f"{name}.toml", plugins=target.plugins)
    torch.manual_seed(0)
    draft: DraftModel = target.plugins.registry.load("draft", name)(file.draft.options, target.adapter, TAPS)
    draft.adopt(target.model.embedding_weight(), target.model.head_weight())
    return draft


def padding_table(records: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| lengths | conversations a step | micro-batch | padded | bucketed | packed |",
        "|---|---|---|---|---|---|",
    ]
    for at in range(0, len(records), len(BATCHING)):
        group = records[at : at + len(BATCHING)]
        shares = " | ".join(f"{100 * one['padding']:.1f} % in {one['micro_batches']:,}" for one in group)
        lines.append(f"| {group[0]['lengths']} | {group[0]['step']} | {group[0]['micro_batch']} | {shares} |")
    return "\n".join(lines)


def times_table(records: Sequence[dict[str, Any]]) -> str:
    lines = ["| draft | lengths | batching | features, s a step | of padded | draft, s a step | of padded |"]
    lines.append("|---|---|---|---|---|---|---|")
    for one in records:
        lines.append(
            f"| {one['draft']} | {one['lengths']} | {one['batching']} | {one['features_seconds']:.2f} | "
            f"{one['features_ratio']:.2f} | {one['draft_seconds']:.2f} | {one['draft_ratio']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
