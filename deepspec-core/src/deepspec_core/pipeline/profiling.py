"""`deepspec profile`: a cost table of a target, measured on this machine.

Knows targets by name and where the table is written. The measuring is in decoding/profiling.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from deepspec_core.decoding.profiling import Step, measure_steps
from deepspec_core.disk import full_disk_is_an_error, why_not_writable
from deepspec_core.dtypes import dtype_name, torch_dtype
from deepspec_core.errors import ConfigError
from deepspec_core.evaluation.cost_table import served_place, write_cost_table
from deepspec_core.locks import lock
from deepspec_core.pipeline import threads, workers
from deepspec_core.pipeline.machine import machine_of
from deepspec_core.plugins.registry import Registry
from deepspec_core.targets.opening import fingerprint, load_target, open_target_alone, resolve_model


@frozen(kw_only=True)
class Shapes:
    """What is measured: batch sizes, up to `draft_tokens` besides each sequence's own, after `context` tokens."""

    batch_sizes: tuple[int, ...]
    draft_tokens: int
    context: int
    repeats: int
    seed: int = 0

    @property
    def widths(self) -> tuple[int, ...]:
        """New tokens of a sequence in one step: powers of two, and one more than `draft_tokens`."""
        most = self.draft_tokens + 1
        return tuple(sorted({most} | {2**power for power in range(most.bit_length()) if 2**power <= most}))


def profile(
    model: str,
    shapes: Shapes,
    *,
    dtype: str | None,
    out: Path,
    registry: Registry,
    versions: Mapping[str, str],
) -> tuple[list[Step], Sequence[Path]]:
    """Measure a target and write the table to `out`. Returns the steps and what was written, none of which may exist.

    Raises ConfigError for shapes that the target has no positions for and for a place that is taken, and StageError if
    another process is measuring for this place.
    """
    _require_free(out)
    if (problem := why_not_writable(out.parent)) is not None:
        raise ConfigError("the cost table cannot be written to this place", where=out, found=problem)
    repeated = [size for size in shapes.batch_sizes if shapes.batch_sizes.count(size) > 1]
    if repeated:
        raise ConfigError("a batch size is given twice", where="--batch-size", found=repeated[0])
    where = resolve_model(model, base=Path.cwd(), registry=registry)
    adapter, _ = open_target_alone(where, registry=registry)
    longest, room = shapes.context + shapes.draft_tokens + 1, adapter.architecture.max_positions
    if longest > room:
        raise ConfigError(
            "the sequences would be longer than the target has positions",
            where="--context",
            found=f"{shapes.context} tokens and {shapes.draft_tokens + 1} new ones",
            expected=f"at most {room} in all",
        )
    device = workers.device()
    number = torch_dtype(dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    revision = fingerprint(where)
    served = served_place(out)
    problem, fix = (
        "Another `deepspec profile` is measuring for this place",
        "Wait for it, or choose another with --out.",
    )
    # Both files are of one measurement.
    with full_disk_is_an_error(out.parent), lock(out.parent, name=f".{served.name}.lock", problem=problem, fix=fix):
        _require_free(out)  # another process may have finished meanwhile
        target = load_target(adapter, where, dtype=number, device=device)
        count = threads.for_decoding(adapter.architecture, device, batch_size=max(shapes.batch_sizes))
        with threads.using(count):
            steps = measure_steps(
                target,
                batch_sizes=shapes.batch_sizes,
                widths=shapes.widths,
                context=shapes.context,
                repeats=shapes.repeats,
                seed=shapes.seed,
            )
            machine = machine_of(device)
        about: dict[str, Any] = {
            "target": {"model": model, "revision": revision, "dtype": dtype_name(number)},
            "machine": machine,
            "plugins": dict(versions),
            "settings": {"context": shapes.context, "repeats": shapes.repeats, "seed": shapes.seed},
        }
        _require_free(out)  # nor is a file overwritten that came from elsewhere
        write_cost_table(out, steps, about)
    return steps, (out, served)


def _require_free(out: Path) -> None:
    for place in (out, served_place(out)):
        if place.exists():
            raise ConfigError("this file exists already", where=place, fix="Choose another with --out, or remove it.")
