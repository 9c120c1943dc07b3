"""Reading some of a cache's taps: the same samples, with the features of those layers alone.

Knows readers and headers. Does not know storage formats.

Legend: T tokens, C = taps * H, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from attrs import evolve

from deepspec_core.contracts.cache import CacheHeader, CacheReader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures


def covers(found: CacheHeader, wanted: CacheHeader) -> bool:
    """Whether the cache has all taps that are wanted."""
    return set(wanted.taps) <= set(found.taps)


def places(header: CacheHeader, taps: Sequence[int]) -> tuple[int, ...]:
    """Which of the cache's taps these are, counted from 0."""
    return tuple(header.taps.index(tap) for tap in taps)


def runs(layers: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges (first, last + 1) of consecutive layers; an empty range if there is no layer."""
    if not layers:
        return [(0, 0)]
    begins = [layers[0], *(after for before, after in pairwise(layers) if after != before + 1)]
    ends = [*(before + 1 for before, after in pairwise(layers) if after != before + 1), layers[-1] + 1]
    return list(zip(begins, ends, strict=True))


def of_layers(features: TargetFeatures, layers: Sequence[int], hidden_size: int) -> TargetFeatures:
    """The same features [T, C] of some of the layers."""
    parts = [features.hidden[:, first * hidden_size : last * hidden_size] for first, last in runs(layers)]
    return TargetFeatures(hidden=torch.cat(parts, dim=1), last_hidden=features.last_hidden)


def of_taps(reader: CacheReader, taps: Sequence[int]) -> CacheReader:
    """The cache with these taps alone. A reader that can leaves the others unread; of another they are thrown away."""
    if tuple(taps) == reader.header.taps:
        return reader
    own = getattr(reader, "of_taps", None)
    narrowed: CacheReader = FewerTaps(reader, taps) if own is None else own(tuple(taps))
    return narrowed


class FewerTaps:
    """contracts.cache.CacheReader over another one, which reads all taps."""

    def __init__(self, reader: CacheReader, taps: Sequence[int]) -> None:
        self._reader, self._layers = reader, places(reader.header, taps)
        self.header = evolve(reader.header, taps=tuple(taps))

    def __len__(self) -> int:
        return len(self._reader)

    def ids(self) -> list[str]:
        """As the other's."""
        return self._reader.ids()

    def lengths(self) -> list[int]:
        """As the other's."""
        return self._reader.lengths()

    def __getitem__(self, index: int) -> Sample:
        sample = self._reader[index]
        assert sample.features is not None, "a cache holds features"
        return evolve(sample, features=of_layers(sample.features, self._layers, self.header.hidden_size))

    def tokens_of(self, index: int) -> Sample:
        """As the other's."""
        return self._reader.tokens_of(index)
