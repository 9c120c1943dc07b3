"""`deepspec estimate RUN.toml`: the memory, disk space and operations of training, before anything is started."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deepspec_core.cli.options import no_plugin, overrides, run_file

if TYPE_CHECKING:
    from rich.table import Table

    from deepspec_core.estimating.estimate import CacheSize, Estimate

_HELD = {
    "process": "Python, libraries and kernels, as loaded here",
    "allocator": "freed memory that the C library keeps; varies from run to run",
    "target_weights": "the target's weights",
    "trained_weights": "the draft's trained weights, fp32",
    "gathered_weights": "all trained weights, gathered for a step",
    "frozen_weights": "the draft's embedding, lm_head and constants",
    "head_copies": "copies of frozen lm_heads in the dtype of matrix products",
    "optimizer_moments": "the optimizer's two moments, fp32",
    "gradients": "gradients, summed over a step's micro-batches",
    "gradient_buckets": "buffers that exchange gradients between processes",
    "batches": "ids, masks, indices and stored features",
}
_PHASES = {
    "features": "loading the batch; online, the target's forward pass",
    "forward": "the draft's forward pass",
    "rows": "the loss: activations, workspace and gradients",
    "backward": "the draft's backward pass",
    "update": "the optimizer's update",
}
_FLOPS = {
    "features": "the target's forward pass",
    "draft_forward": "the draft's forward pass",
    "draft_backward": "the draft's backward pass",
    "rows": "the loss's products with the vocabulary, forward and backward",
    "update": "the optimizer's matrix products",
}


@click.command()
@run_file
@click.option("--json", "as_json", is_flag=True, help="Machine-readable: one object, in bytes and operations.")
@click.option("--workers", type=click.IntRange(min=1), help="Processes in training. Default: one per accelerator.")
@overrides
@no_plugin
def estimate(
    path: str, as_json: bool, workers: int | None, overrides: tuple[str, ...], blocked: tuple[str, ...]
) -> None:
    """Predict the peak memory of training, the size of the feature cache, and the operations per optimizer step.

    Reads the target's config, but no weights. Assumes that every sequence has data.max_length tokens, so the figures
    are upper bounds.
    """
    from deepspec_core.config.load import load_run_file
    from deepspec_core.pipeline import workers as all_workers
    from deepspec_core.pipeline.estimating import estimate as estimate_run
    from deepspec_core.pipeline.run import Run
    from deepspec_core.plugins.discovery import load_plugins

    plugins = load_plugins(blocked=blocked)
    run = Run(file=load_run_file(path, overrides=overrides, plugins=plugins), path=Path(path), plugins=plugins)
    found = estimate_run(run, processes=workers or max(1, all_workers.visible_devices()))
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=1))
        return
    from rich.console import Console

    # Wide enough for the table also where the output is a file.
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    console.print(_table(found))
    for line in _lines(found):
        click.echo(line)


def _table(found: Estimate) -> Table:
    from rich.table import Table

    memory = found.memory
    table = Table(title=f"Memory of {'each' if found.processes > 1 else 'the'} training process, on {found.device}")
    table.add_column("held during the whole step")
    table.add_column("", justify="right")
    for name, size in memory.held.items():
        if size:
            table.add_row(_HELD[name], _bytes(size))
    table.add_section()
    table.add_row("in addition, at most, during", "", style="bold")
    for name, size in memory.phases.items():
        if size:
            mark = "  <- peak" if name == memory.peak_phase else ""
            table.add_row(_PHASES[name] + mark, _bytes(size))
    table.add_section()
    table.add_row("peak", _bytes(memory.peak_bytes), style="bold")
    return table


def _lines(found: Estimate) -> Iterator[str]:
    micro, total = found.micro_batch, sum(found.flops.values())
    per_step = "micro-batch" if found.micro_batches_per_step == 1 else "micro-batches"
    yield (
        f"These are upper bounds: every sequence is assumed to have the maximum length, with all tokens but the first "
        f"supervised. A micro-batch has {micro.sequences:,} x {micro.tokens_per_sequence:,} tokens. The draft predicts "
        f"{micro.rows:,} tokens (rows) in it, at {micro.target_positions:,} positions of the target. "
        f"{'Each process' if found.processes > 1 else 'An optimizer step'} computes {found.micro_batches_per_step:,} "
        f"{per_step}{' per optimizer step' if found.processes > 1 else ''}."
    )
    if found.device != "cpu":
        yield (
            "Attention is counted with the CPU's implementation; accelerators' kernels may take less memory. Memory "
            "that the driver and the device's allocator keep for themselves is not counted."
        )
    for what in found.not_counted:
        yield f"Not counted: {what}"
    if found.cache is not None:
        yield f"Feature cache: {_cache(found.cache)}."
    processes = f" of all {found.processes} processes together" if found.processes > 1 else ""
    yield f"Operations of one optimizer step{processes}: {_operations(total)}"
    for name, count in found.flops.items():
        if count:
            yield f"  {_operations(count):>14}  {_FLOPS[name]}"


def _cache(cache: CacheSize) -> str:
    per_token = f"{cache.bytes_per_token:,} bytes a token, {_bytes(cache.bytes_per_token * 10**6)} for a million tokens"
    twice = (
        "; twice that until the cache is complete, because features that came with answers are kept beside it"
        if cache.kept_with_answers
        else ""
    )
    if cache.most_bytes is None:
        return per_token + twice
    return f"{per_token}; at most {_bytes(cache.most_bytes)} for {cache.most_tokens:,} tokens{twice}"


def _bytes(count: float) -> str:
    """1.50 GiB, 213 MiB."""
    mebibytes = count / (1 << 20)
    for unit in ("MiB", "GiB"):
        if mebibytes < 1000:
            return f"{mebibytes:,.0f} {unit}" if unit == "MiB" else f"{mebibytes:,.2f} {unit}"
        mebibytes /= 1024
    return f"{mebibytes:,.2f} TiB"


def _operations(count: float) -> str:
    """1.5 TFLOP."""
    for unit in ("GFLOP", "TFLOP", "PFLOP"):
        count /= 1e3 if unit != "GFLOP" else 1e9
        if count < 1e3:
            break
    return f"{count:,.1f} {unit}"
