"""Samples without features, ordered by id: a base for feature sources that compute or fetch their features.

The order is that of a cache of the same samples. Knows samples; does not know where features come from.
"""

from __future__ import annotations

from collections.abc import Sequence

from deepspec_core.contracts.draft import Sample
from deepspec_core.data.samples import as_samples


class SamplesById:
    """The samples of a contracts.features.FeatureSource."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = as_samples(samples)
        self._order = self._samples.by_id()

    def __len__(self) -> int:
        return len(self._order)

    def lengths(self) -> Sequence[int]:
        """Tokens of each sample."""
        lengths: list[int] = self._samples.lengths()[self._order].tolist()
        return lengths

    def __getitem__(self, index: int) -> Sample:
        """The sample, without features."""
        return self._samples.sample(int(self._order[index]))
