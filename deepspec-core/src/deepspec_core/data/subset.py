"""A part of a corpus, for pilot runs: selected by a digest of each sample's id, so order and storage do not matter.

A smaller part is contained in every larger one, whether given as a share or as a number of samples. Knows ids and
samples; knows no run.

Legend: S samples of the whole, P of the part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from deepspec_core.contracts.draft import Sample
from deepspec_core.data.digest_set import digest16
from deepspec_core.data.samples import Samples

Numbers = np.ndarray[Any, np.dtype[np.int64]]


def part_of(ids: Iterable[str], subset: int | float) -> Numbers:
    """The numbers [P] of the samples in the part, rising: a share of about `subset` of them, or so many if it is whole.

    Each id has a place between 0 and 1. A share takes the places below it, a number the lowest places.
    """
    places = np.fromiter((int.from_bytes(digest16(name)[:8], "big") for name in ids), dtype=np.uint64)
    if isinstance(subset, float):
        return np.flatnonzero(places < np.uint64(subset * 2.0**64)).astype(np.int64)
    return np.sort(np.argsort(places, kind="stable")[:subset]).astype(np.int64)


class SamplesOfPart(Samples):
    """Some of the samples, by their numbers [P] among all."""

    def __init__(self, whole: Samples, numbers: Numbers) -> None:
        self._whole, self._numbers = whole, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def lengths(self) -> Numbers:
        """As of Samples."""
        return self._whole.lengths()[self._numbers]

    def ids(self) -> Iterator[str]:
        """As of Samples."""
        taken = np.zeros(len(self._whole), dtype=np.bool_)
        taken[self._numbers] = True
        return (name for name, here in zip(self._whole.ids(), taken, strict=True) if here)

    def by_id(self) -> Numbers:
        """As of Samples."""
        own = np.full(len(self._whole), -1, dtype=np.int64)
        own[self._numbers] = np.arange(len(self._numbers))
        order: Numbers = own[self._whole.by_id()]
        return order[order >= 0]

    def with_token(self, token: int) -> Numbers:
        """As of Samples."""
        return np.flatnonzero(np.isin(self._numbers, self._whole.with_token(token)))

    def sample(self, number: int) -> Sample:
        """As of Samples."""
        return self._whole.sample(int(self._numbers[number]))
