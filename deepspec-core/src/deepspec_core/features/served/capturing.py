"""Features from servers for a cache, in the order and the number format in which it is written.

Knows samples and servers; not where the features go.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from attrs import evolve

from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.data.samples import as_samples
from deepspec_core.features.capture import require_finite
from deepspec_core.features.kept import KeptFeatures
from deepspec_core.features.served.source import FeatureServers


def captured_by(
    servers: FeatureServers | None,
    samples: Sequence[Sample],
    taps: Sequence[int],
    *,
    dtype: torch.dtype | None,
    done: Collection[str],
    kept: KeptFeatures | None = None,
    waiting: Callable[[], None] = lambda: None,
) -> Iterator[Sample]:
    """As features.capture.capture, but servers compute the features. `dtype` None: as they write them.

    Features in `kept` are taken from there, and the others are requested from `servers`; None: all are in `kept`.
    `waiting` is called now and then while servers are waited for. CacheError where a feature is not finite in `dtype`.
    """
    samples = as_samples(samples)

    def missing() -> Iterator[Sample]:
        ordered = (samples.sample(int(number)) for number in samples.longest_first())
        return (sample for sample in ordered if sample.id not in done)

    if servers is None:
        assert kept is not None, "features come from somewhere"
        yield from map(kept.of, missing())
        return
    with servers.stream(
        (sample for sample in missing() if kept is None or not kept.has(sample)), waiting=waiting
    ) as stream:
        computed = iter(stream)
        for sample in missing():
            if kept is not None and kept.has(sample):
                yield kept.of(sample)
                continue
            given = next(computed)
            assert given.features is not None, "a stream gives features"
            yield evolve(given, features=in_dtype(given.features, dtype, taps, given.id))


def in_dtype(computed: TargetFeatures, dtype: torch.dtype | None, taps: Sequence[int], sample: str) -> TargetFeatures:
    """Features as a cache stores them. `dtype` None: as they are. CacheError where one is not finite in `dtype`."""
    stored = TargetFeatures(
        hidden=computed.hidden.to(dtype or computed.hidden.dtype),
        last_hidden=computed.last_hidden.to(dtype or computed.last_hidden.dtype),
    )
    require_finite(stored, computed, taps, sample)
    return stored
