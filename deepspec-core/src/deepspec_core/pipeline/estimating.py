"""What a run's training will take, before anything is started: memory, the size of the feature cache, arithmetic.

Reads the target's config, no weights and no data. Sizes are those of the longest samples the run allows, supervised
from their second token on, so they are upper bounds for its own data. Knows runs; not how bytes and operations are
counted.
"""

from __future__ import annotations

from deepspec_core.cache.estimate import cache_bytes
from deepspec_core.dtypes import torch_dtype
from deepspec_core.estimating.estimate import CacheSize, Estimate, Memory, MicroBatch
from deepspec_core.estimating.features import TriedFeatures
from deepspec_core.estimating.memory import LiveBytes, bytes_of, fake_tensors
from deepspec_core.estimating.process import KERNEL_BYTES, kept_bytes, resident_bytes
from deepspec_core.estimating.step import estimate_step
from deepspec_core.pipeline.made_up import made_up_batch, made_up_features, made_up_samples
from deepspec_core.pipeline.run import Run
from deepspec_core.pipeline.training import new_draft
from deepspec_core.rows.engine import RowEngine, build_engine
from deepspec_core.training.host_batch import HostBatch

CACHED = "cached"


def estimate(run: Run, *, processes: int = 1) -> Estimate:
    """The run's training by `processes` processes, each on a device like this one's.

    The draft and, with online features, the target run as they do on the CPU, on tensors without memory: kernels of
    accelerators may take less for attention. TargetError or ConfigError where the target, its taps or the draft's
    options would stop training too.
    """
    options, on_cpu = run.file.train, run.target.device.type == "cpu"
    engine = build_engine(run.file.loss, run.plugins.registry)
    cache = _cache(run) if run.file.features.mode == CACHED else None
    process = _process_bytes(run, engine) if on_cpu else 0
    share = -(-options.global_batch_size // processes)
    sequences = min(options.micro_batch_size, share)
    micro_batches = -(-share // sequences)
    with fake_tensors():
        with LiveBytes() as made:
            # Training holds the target whatever its features come from.
            target = run.target.adapter.skeleton(dtype=run.target.dtype)
            target_bytes = made.now
        draft = new_draft(run)
        stored = made_up_features(run, run.data.max_length) if run.file.features.mode == CACHED else None
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
    )
    held = {
        "process": process,
        "allocator": kept_bytes(step.small, accumulates=micro_batches > 1) if on_cpu else 0,
        "target_weights": target_bytes,
        **step.held,
        # Data-parallel training sends gradients in buffers of its own.
        "gradient_buckets": step.held["trained_weights"] if processes > 1 else 0,
        "batches": _batch_bytes(batch, micro_batches),
    }
    # A checkpoint is copied on the host before it is written, both moments at once; there are no gradients then.
    checkpoint = max(0, held["optimizer_moments"] - held["gradients"]) if on_cpu else 0
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
        memory=Memory(held=held, phases={**step.phases, "checkpoint": checkpoint}),
        cache=cache,
        flops={
            part: 0 if part == "features" and source.problem else count * options.global_batch_size // sequences
            for part, count in step.flops.items()
        },
        not_counted=() if source.problem is None else (f"the target's forward pass: {source.problem}",),
    )


def _process_bytes(run: Run, engine: RowEngine) -> int:
    """What this process has, once it has loaded what training loads before it has any tensor."""
    architecture = run.target.architecture
    run.plugins.registry.load("features", run.file.features.mode)
    run.plugins.registry.load("cache", run.file.cache.format)
    run.plugins.registry.load("draft", run.file.draft.type)
    # Kernels are compiled, or found not to, when they are first asked for.
    engine.choice("cpu", architecture.vocab_size)
    return resident_bytes() + KERNEL_BYTES


def _batch_bytes(batch: HostBatch, micro_batches: int) -> int:
    tensors = [batch.input_ids, batch.loss_mask, batch.attention_mask, *batch.prepared.values()]
    if batch.features is not None:
        tensors += [batch.features.hidden, batch.features.last_hidden]
    # One is still there when the next comes.
    return bytes_of(tensors) * min(micro_batches, 2)


def _cache(run: Run) -> CacheSize:
    cache_format = run.cache.format
    header, count = run.cache.bare_header(), run.data.expected_conversations()
    tokens = None if count is None else count * run.data.max_length
    return CacheSize(
        bytes_per_token=cache_format.bytes_per_token(header),
        most_tokens=tokens,
        most_bytes=None if tokens is None else cache_bytes(cache_format, header, tokens),
    )
