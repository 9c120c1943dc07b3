"""Features from a cache. Knows the reader's contract; no storage format, no target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from deepspec_core.contracts.cache import CacheReader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.data.collate import pad_features
from deepspec_core.errors import CacheError
from deepspec_core.features.finite import all_finite

_MAKE_AGAIN: Final = "Make the cache again (--force cache), or get it again from where it came."


class CachedFeatures:
    """Samples of a cache, ordered by id: the same order as without a cache, however the cache was written."""

    def __init__(self, reader: CacheReader) -> None:
        self.reader = reader
        ids = reader.ids()
        self._order = np.array(sorted(range(len(ids)), key=ids.__getitem__), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._order)

    def lengths(self) -> Sequence[int]:
        """Tokens of each sample."""
        lengths = self.reader.lengths()
        return [lengths[index] for index in self._order.tolist()]

    def __getitem__(self, index: int) -> Sample:
        """The sample with its features.

        CacheError where a feature is not finite, since attention would spread it, and where a token id is none.
        """
        sample = self.reader[int(self._order[index])]
        self._check_ids(sample)
        features = sample.features
        assert features is not None, "a cache holds features"
        for name, values in (("hidden", features.hidden), ("last_hidden", features.last_hidden)):
            if not all_finite(values):
                token, channel = torch.nonzero(~torch.isfinite(values))[0].tolist()
                raise CacheError(
                    "A feature of the cache is not finite",
                    where=f"sample {sample.id}, token {token}, {name} channel {channel}",
                    found=float(values[token, channel]),
                    expected="a finite number",
                    fix=_MAKE_AGAIN,
                )
        return sample

    def tokens_of(self, index: int) -> Sample:
        """The sample; its features are not looked at, and not read if the format can do without."""
        sample = self.reader.tokens_of(int(self._order[index]))
        self._check_ids(sample)
        return sample

    def _check_ids(self, sample: Sample) -> None:
        wrong_ids = sample.input_ids[(sample.input_ids < 0) | (sample.input_ids >= self.reader.header.vocab_size)]
        if len(wrong_ids):
            raise CacheError(
                "A token id of the cache is not in the target's vocabulary",
                where=f"sample {sample.id}",
                found=int(wrong_ids[0]),
                expected=f"0 to {self.reader.header.vocab_size - 1}",
                fix=_MAKE_AGAIN,
            )

    def features(self, samples: Sequence[Sample], input_ids: Tensor, attention_mask: Tensor) -> TargetFeatures:
        """Stored features of a batch. Samples without theirs are read again, by id."""
        if any(sample.features is None for sample in samples):
            places = {name: index for index, name in enumerate(self.reader.ids())}
            samples = [self.reader[places[sample.id]] for sample in samples]
        features = pad_features(samples)
        assert features is not None, "a cache holds features"
        return TargetFeatures(
            hidden=features.hidden.to(input_ids.device), last_hidden=features.last_hidden.to(input_ids.device)
        )


def from_run(run: Any) -> CachedFeatures:
    """`[features] mode = "cached"`: the cache stage's result."""
    reader = run.cache.open()
    run.data.count_mask_token(reader)
    return CachedFeatures(reader)
