"""A cache format that may be wrong: what it changes in a right one, by what is wrong.

`CACHES` says which test of the suite has to fail, and a word of what it has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import torch
from attrs import evolve

from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.contracts.draft import Sample
from deepspec_core.errors import CacheError
from deepspec_core.testing.random_batches import features_of


class _Reader:
    """A reader that may be wrong. It is pickled as it is."""

    def __init__(self, inner: Any, what: str) -> None:
        self.inner, self.what, self.header = inner, what, inner.header
        self.kept: dict[int, Sample] = {}
        if what == "cannot be pickled":
            self.lock = lambda: None

    def __len__(self) -> int:
        return len(self.inner)

    def ids(self) -> list[str]:
        return self.inner.ids()[::-1] if self.what == "ids in another order" else self.inner.ids()

    def lengths(self) -> list[int]:
        return self.inner.lengths()

    def tokens_of(self, index: int) -> Sample:
        return self.inner[index] if self.what == "reads features for tokens" else self.inner.tokens_of(index)

    def __getitem__(self, index: int) -> Sample:
        if self.what == "another sample's features" and index == 2:
            return evolve(self.inner[2], features=self.inner[3].features)
        found = self.inner[index]
        if self.what == "loses the dtype":
            wide = evolve(found.features, hidden=found.features.hidden.double())
            return evolve(found, features=wide)
        if self.what == "loses the original length":
            return evolve(found, original_length=len(found.input_ids))
        if self.what == "loses the mask":
            return evolve(found, loss_mask=torch.ones_like(found.loss_mask))
        return self.kept.setdefault(index, found) if self.what == "hands out one sample twice" else found


class _Writer:
    """A right writer that may be wrapped."""

    def __init__(self, make: Callable[[], Any], path: Path) -> None:
        self.inner, self.path = make(), path

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


class _SealsInTheEnd(_Writer):
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.held: list[Sample] = []

    def write(self, sample: Sample) -> None:
        self.held.append(sample)

    def finish(self) -> None:
        self._flush()
        self.inner.finish()

    def close(self) -> None:
        self._flush()
        self.inner.close()

    def _flush(self) -> None:
        for sample in self.held:
            self.inner.write(sample)
        self.held = []


class _FilesNamedByIds(_Writer):
    def write(self, sample: Sample) -> None:
        self.inner.write(sample)
        (self.path / f"{sample.id}.tokens").touch()


class _Changed(_Writer):
    """Stores something else than it is given."""

    def write(self, sample: Sample) -> None:
        self.inner.write(self.changed(sample))

    def changed(self, sample: Sample) -> Sample:
        raise NotImplementedError


class _IdsIn8Bits(_Changed):
    def changed(self, sample: Sample) -> Sample:
        return evolve(sample, input_ids=sample.input_ids.to(torch.uint8).long())


class _IdsIn16Bits(_Changed):
    def changed(self, sample: Sample) -> Sample:
        return evolve(sample, input_ids=sample.input_ids.to(torch.int16).long())


class _OriginalLengthIn16Bits(_Changed):
    def changed(self, sample: Sample) -> Sample:
        return evolve(sample, original_length=sample.original_length % 2**16)


class _ClampsFeatures(_Changed):
    def changed(self, sample: Sample) -> Sample:
        return _with_features(sample, lambda part: part.clamp(-8, 8))


class _ThroughFloat16(_Changed):
    def changed(self, sample: Sample) -> Sample:
        return _with_features(sample, lambda part: part.half().to(part.dtype))


class _CompleteUntilClosed(_Writer):
    """Says in the manifest that the cache is complete with each shard, and takes it back when it is closed."""

    def write(self, sample: Sample) -> None:
        self.inner.write(sample)
        self._say(complete=True)

    def close(self) -> None:
        if not self.inner._manifest.complete:
            self._say(complete=False)
        self.inner.close()

    def _say(self, *, complete: bool) -> None:
        evolve(self.inner._manifest, complete=complete).save(self.path)


def _with_features(sample: Sample, change: Callable[[torch.Tensor], torch.Tensor]) -> Sample:
    found = features_of(sample)
    return evolve(sample, features=evolve(found, hidden=change(found.hidden), last_hidden=change(found.last_hidden)))


_WRITERS = {
    "stores token ids in 8 bits": _IdsIn8Bits,
    "stores token ids in 16 bits": _IdsIn16Bits,
    "stores original lengths in 16 bits": _OriginalLengthIn16Bits,
    "stores features of at most 8": _ClampsFeatures,
    "stores features as float16": _ThroughFloat16,
    "loses sealed shards when it is killed": _SealsInTheEnd,
    "names files by ids of samples": _FilesNamedByIds,
    "is complete until it is closed": _CompleteUntilClosed,
}


class WrongCache(HDF5Format):
    """A format that may be wrong."""

    what = ""

    def open(self, path: Path, expect: Any) -> Any:
        return _Reader(super().open(path, None if self.what == "opens any cache" else expect), self.what)

    def header(self, path: Path) -> Any:
        try:
            found = super().header(path)
        except CacheError:
            if self.what != "takes a damaged header for no cache":
                raise
            return None
        return evolve(found, template="") if found is not None and self.what == "loses the header" else found

    def create(self, path: Path, header: Any, **options: Any) -> Any:
        kind = _WRITERS.get(self.what)
        made = super().create
        return made(path, header, **options) if kind is None else kind(lambda: made(path, header, **options), path)

    def verify(self, path: Path, **options: Any) -> Any:
        if self.what == "verifies nothing":
            return []
        if self.what == "raises the library's own error for a file that is cut":
            for shard in path.glob("*.h5"):
                h5py.File(shard).close()
        found = super().verify(path, **options)
        if self.what == "verifies the largest file alone":
            largest = max(path.iterdir(), key=lambda one: one.stat().st_size)
            return [one for one in found if largest.name in str(one)]
        return found

    def bytes_per_token(self, header: Any) -> int:
        size = super().bytes_per_token(header)
        return size * 8 if self.what == "takes bytes for bits" else size


CACHES = {
    "stores token ids in 16 bits": ("what_is_written_is_read", "input_ids"),
    "stores token ids in 8 bits": ("what_is_written_is_read", "input_ids"),
    "stores original lengths in 16 bits": ("what_is_written_is_read", "original_length"),
    "stores features of at most 8": ("large_and_small_numbers_are_kept", "other numbers"),
    "stores features as float16": ("large_and_small_numbers_are_kept", "other numbers"),
    "another sample's features": ("what_is_written_is_read", "hidden"),
    "loses the dtype": ("what_is_written_is_read", "float64"),
    "loses the original length": ("what_is_written_is_read", "original_length"),
    "loses the mask": ("what_is_written_is_read", "loss_mask"),
    "ids in another order": ("what_is_written_is_read", "ids()"),
    "hands out one sample twice": ("samples_are_apart", "set to 0"),
    "reads features for tokens": ("tokens_alone", "has features"),
    "cannot be pickled": ("a_reader_is_sent", "pickle"),
    "opens any cache": ("another_header_is_refused", "opened"),
    "loses the header": ("the_header_is_kept", "template"),
    "verifies nothing": ("damage_is_found", "flipped"),
    "verifies the largest file alone": ("damage_is_found", "half is gone"),
    "takes a damaged header for no cache": ("damage_is_found", "no cache"),
    "raises the library's own error for a file that is cut": ("damage_is_found", "OSError"),
    "loses sealed shards when it is killed": ("a_killed_writer", "s0 and s1"),
    "is complete until it is closed": ("a_killed_writer", "was killed"),
    "names files by ids of samples": ("ids_are_text", "a/b"),
    "takes bytes for bits": ("sizes_are_estimated", "one more token"),
}
