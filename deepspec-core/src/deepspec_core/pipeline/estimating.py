"""Estimates of a run's training: memory, the size of the feature cache, and operations.

Reads the target's config, but no weights and no data. Samples are assumed to be as long as the run allows and
supervised from their second token on, so the estimates are upper bounds for the run's own data. Knows runs. Does not
know how bytes and operations are counted.
"""

from __future__ import annotations

from collections.abc import Mapping

from deepspec_core.cache.estimate import cache_bytes
from deepspec_core.config.schema import CACHED, PACKED, SERVER
from deepspec_core.config.train_options import FSDP
from deepspec_core.dtypes import torch_dtype
from deepspec_core.estimating.estimate import CacheSize, Estimate, Memory, MicroBatch
from deepspec_core.estimating.features import TriedFeatures
from deepspec_core.estimating.memory import LiveBytes, bytes_of, fake_tensors
from deepspec_core.estimating.process import KERNEL_BYTES, kept_bytes, resident_bytes
from deepspec_core.estimating.step import estimate_step
from deepspec_core.pipeline.made_up import made_up_batch, made_up_features, made_up_samples
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.training import new_draft, require_trained
from deepspec_core.rows.engine import RowEngine, build_engine
from deepspec_core.training.host_batch import HostBatch

# Modes in which the training process computes no features itself.
STORED = (CACHED, SERVER)


def estimate(run: Run, *, processes: int = 1) -> Estimate:
    """The estimate for training in `processes` processes, each on a device like the one of this process.

    The draft and, with online features, the target run on fake tensors with the CPU's implementation. Kernels of
    accelerators may take less memory for attention. Raises the TargetError or ConfigError that training would raise for
    the target, its taps or the draft's options.
    """
    require_trained(run)
    run.data.check_length()
    options, on_cpu = run.file.train, run.target.device.type == "cpu"
    engine = build_engine(run.file.loss, run.plugins.registry)
    cache = _cache(run) if run.file.features.mode == CACHED else None
    process = _process_bytes(run, engine) if on_cpu else 0
    share = -(-options.global_batch_size // processes)
    sequences = min(options.micro_batch_size, share)
    micro_batches = -(-share // sequences)
    _ = run.target.adapter  # opened first, because what a plugin makes on first use needs real memory
    with fake_tensors():
        with LiveBytes() as made:
            target = run.target.adapter.skeleton(dtype=run.target.dtype)
            whole = made.now
        draft = new_draft(run)
        # The draft shares these. Training on stored features loads nothing else of the target.
        shared = target.embedding_weight(), target.head_weight()
        draft.adopt(*shared)
        in_draft = [*draft.embed_tokens.parameters(), *draft.lm_head.parameters()]
        target_bytes = 0 if run.file.features.mode in STORED else whole - bytes_of(shared)
        if draft.vocabulary is not None:
            target_bytes += bytes_of([*shared, *in_draft]) - bytes_of(in_draft)
        stored = made_up_features(run, run.data.max_length) if run.file.features.mode in STORED else None
    batch = made_up_batch(draft, made_up_samples(sequences, run.data.max_length, stored), run.file.run.seed)
    source = TriedFeatures(batch.samples, target, run.file.target.layers)
    step = estimate_step(
        draft=draft,
        engine=engine,
        batch=batch,
        source=source,
        device_type=run.target.device.type,
        compute_dtype=torch_dtype(options.precision),
        accumulates=micro_batches > 1,
        options=options,
    )
    held = {
        "process": process,
        "allocator": kept_bytes(step.small, accumulates=micro_batches > 1) if on_cpu else 0,
        "target_weights": target_bytes,
        **step.held,
        **_exchanged(step.held, processes, sharded=options.parallel == FSDP),
        "batches": _batch_bytes(batch, micro_batches),
    }
    return Estimate(
        device=run.target.device.type,
        processes=processes,
        micro_batch=MicroBatch(
            sequences=sequences,
            tokens_per_sequence=run.data.max_length,
            rows=step.rows,
            target_positions=step.positions,
        ),
        micro_batches_per_step=micro_batches,
        memory=Memory(held=held, phases=step.phases),
        cache=cache,
        flops={
            part: 0 if part == "features" and source.problem else count * options.global_batch_size // sequences
            for part, count in step.flops.items()
            if part != "update"
        }
        | {"update": step.flops["update"] * processes},
        not_counted=_not_counted(run, source.problem),
    )


def _exchanged(held: Mapping[str, int], processes: int, *, sharded: bool) -> dict[str, int]:
    """The parts of `held` that differ with several processes. Gradients are exchanged in separate buffers.

    If sharded, each process holds a part of the weights and moments, and during a step also all of the weights.
    """
    trained = held["trained_weights"]
    if processes == 1:
        return {"gathered_weights": 0, "gradient_buckets": 0}
    if not sharded:
        return {"gathered_weights": 0, "gradient_buckets": trained}
    part = -(-trained // processes)
    return {
        "trained_weights": part,
        "gathered_weights": trained,
        "optimizer_moments": -(-held["optimizer_moments"] // processes),
        "gradient_buckets": trained + part,
    }


def _not_counted(run: Run, problem: str | None) -> tuple[str, ...]:
    left_out = []
    if problem is not None:
        left_out.append(f"the target's forward pass, which cannot run on tensors without values: {problem}")
    if run.file.train.batching == PACKED:
        left_out.append("the further anchors of packed rows: a row is assumed to hold one sequence")
    return tuple(left_out)


def _process_bytes(run: Run, engine: RowEngine) -> int:
    """The memory of this process after it has loaded every library that training loads, and before it has a tensor."""
    architecture = run.target.architecture
    run.plugins.registry.load("features", run.file.features.mode)
    run.plugins.registry.load("cache", run.file.cache.format)
    run.plugins.registry.load("draft", run.file.draft.type)
    # The first request compiles the kernels, or finds out that they cannot be compiled.
    engine.choice("cpu", architecture.vocab_size)
    return resident_bytes() + KERNEL_BYTES


def _batch_bytes(batch: HostBatch, micro_batches: int) -> int:
    tensors = [batch.input_ids, batch.loss_mask, batch.attention_mask, *batch.prepared.values()]
    if batch.features is not None:
        tensors += [batch.features.hidden, batch.features.last_hidden]
    # One batch still exists when the next one arrives.
    return bytes_of(tensors) * min(micro_batches, 2)


def _cache(run: Run) -> CacheSize:
    cache_format = run.cache.format
    header, count = run.cache.bare_header(), run.cache.expected_samples()
    tokens = None if count is None else count * run.data.max_length
    return CacheSize(
        bytes_per_token=cache_format.bytes_per_token(header),
        most_tokens=tokens,
        most_bytes=None if tokens is None else cache_bytes(cache_format, header, tokens),
        kept_with_answers=run.has("regenerate") and run.file.regenerate.features,
    )
