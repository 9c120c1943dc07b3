"""Tokenised conversations as stages read them: by number, each read when it is needed.

Knows samples, their lengths and the order of their ids. Does not know where they are stored (stored_samples.py).

Legend: S samples.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from deepspec_core.contracts.draft import Sample


class Samples(Sequence[Sample]):
    """Samples in the order of the conversations they come from.

    No method reads their tokens but `samples[i]` and `with_token`.
    """

    @abstractmethod
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens of each sample, [S]."""

    @abstractmethod
    def ids(self) -> Iterator[str]:
        """The id of each sample, in order."""

    @abstractmethod
    def by_id(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The numbers of the samples, [S], in the order of their ids."""

    @abstractmethod
    def with_token(self, token: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The numbers of the samples that contain the token, rising. Reads the tokens of all."""

    def longest_first(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The numbers of the samples, [S], from the longest to the shortest, and in the order of ids where equal."""
        by_id = self.by_id()
        order: np.ndarray[Any, np.dtype[np.int64]] = by_id[np.argsort(-self.lengths()[by_id], kind="stable")]
        return order

    def __getitem__(self, index: Any) -> Any:
        """The sample with this number, or a list of samples for a slice."""
        if isinstance(index, slice):
            return [self.sample(number) for number in range(*index.indices(len(self)))]
        number = int(index) + len(self) * (index < 0)
        if not 0 <= number < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.sample(number)

    @abstractmethod
    def sample(self, number: int) -> Sample:
        """One sample."""


class HeldSamples(Samples):
    """Samples that are held in memory."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples = list(samples)

    def __len__(self) -> int:
        return len(self._samples)

    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """As of Samples."""
        return np.array([len(sample.input_ids) for sample in self._samples], dtype=np.int64)

    def ids(self) -> Iterator[str]:
        """As of Samples."""
        return (sample.id for sample in self._samples)

    def by_id(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """As of Samples."""
        order = sorted(range(len(self._samples)), key=lambda number: self._samples[number].id)
        return np.array(order, dtype=np.int64)

    def with_token(self, token: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """As of Samples."""
        return np.flatnonzero([bool((sample.input_ids == token).any()) for sample in self._samples])

    def sample(self, number: int) -> Sample:
        """As of Samples."""
        return self._samples[number]


def as_samples(samples: Sequence[Sample]) -> Samples:
    """The same samples, with their lengths and orders."""
    return samples if isinstance(samples, Samples) else HeldSamples(samples)
