"""Features from servers for a cache, in the order and the number format in which it is written.

Knows samples and servers; not where the features go.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from attrs import evolve

from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.data.samples import as_samples
from deepspec_core.features.capture import require_finite
from deepspec_core.features.served.source import FeatureServers


def captured_by(
    servers: FeatureServers,
    samples: Sequence[Sample],
    taps: Sequence[int],
    *,
    dtype: torch.dtype | None,
    done: Collection[str],
) -> Iterator[Sample]:
    """As features.capture.capture, but servers compute the features. `dtype` None: as they write them.

    CacheError where a feature is not finite in `dtype`.
    """
    samples = as_samples(samples)
    ordered = (samples.sample(int(number)) for number in samples.longest_first())
    with servers.stream(sample for sample in ordered if sample.id not in done) as stream:
        for sample in stream:
            computed = sample.features
            assert computed is not None, "a stream gives features"
            kept = TargetFeatures(
                hidden=computed.hidden.to(dtype or computed.hidden.dtype),
                last_hidden=computed.last_hidden.to(dtype or computed.last_hidden.dtype),
            )
            require_finite(kept, computed, taps, sample.id)
            yield evolve(sample, features=kept)
