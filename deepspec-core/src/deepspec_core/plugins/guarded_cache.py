"""A plugin's cache format whose failures are told as the plugin's: its own, its writers' and its readers'.

Knows the contract of formats, and how failures are told. Does not know what a format stores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from deepspec_core.contracts.cache import CacheFormat, CacheHeader, CacheReader, CacheWriter, MergingWriter
from deepspec_core.contracts.draft import Sample
from deepspec_core.errors import CacheError
from deepspec_core.plugins.guarded import Told


class GuardedFormat:
    """`inner`, its code called within `told`. contracts.cache.CacheFormat."""

    def __init__(self, inner: CacheFormat, told: Told) -> None:
        self._inner, self._told = inner, told

    def create(self, path: Path, header: CacheHeader, *, shard_samples: int = 512) -> CacheWriter:
        """As of the contract."""
        with self._told():
            writer = self._inner.create(path, header, shard_samples=shard_samples)
        guard = _GuardedMerging if isinstance(writer, MergingWriter) else _GuardedWriter
        return guard(writer, self._told)

    def header(self, path: Path) -> CacheHeader | None:
        """As of the contract."""
        with self._told():
            return self._inner.header(path)

    def open(self, path: Path, expect: CacheHeader | None) -> CacheReader:
        """As of the contract."""
        with self._told():
            return cast(CacheReader, _GuardedReader(self._inner.open(path, expect), self._told))

    def verify(self, path: Path, *, part: int = 0, parts: int = 1, remembered: bool = True) -> Sequence[CacheError]:
        """As of the contract."""
        with self._told():
            return list(self._inner.verify(path, part=part, parts=parts, remembered=remembered))

    def bytes_per_token(self, header: CacheHeader) -> int:
        """As of the contract."""
        with self._told():
            return self._inner.bytes_per_token(header)


class _Guarded:
    """What the contract leaves open is the inner object's own; methods are called within `told`."""

    def __init__(self, inner: Any, told: Told) -> None:
        self._inner, self._told = inner, told

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # nothing is asked of an object that is only being unpickled
            raise AttributeError(name)
        found = getattr(self._inner, name)
        return self._within(found) if callable(found) else found

    def _within(self, method: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            with self._told():
                return method(*arguments, **options)

        return call


class _GuardedWriter(_Guarded):
    """contracts.cache.CacheWriter."""

    def written(self) -> set[str]:
        with self._told():
            return cast(set[str], self._inner.written())

    def write(self, sample: Sample) -> None:
        with self._told():
            self._inner.write(sample)

    def finish(self) -> None:
        with self._told():
            self._inner.finish()

    def close(self) -> None:
        with self._told():
            self._inner.close()


class _GuardedMerging(_GuardedWriter):
    """contracts.cache.MergingWriter."""

    def absorb(self, part: Path) -> None:
        with self._told():
            self._inner.absorb(part)

    def arrange(self, order: Mapping[str, int]) -> None:
        with self._told():
            self._inner.arrange(order)


class _GuardedReader(_Guarded):
    """contracts.cache.CacheReader. `of_taps` and the other optional members are there where the inner one has them."""

    def __len__(self) -> int:
        with self._told():
            return len(self._inner)

    def __getitem__(self, index: int) -> Sample:
        with self._told():
            return cast(Sample, self._inner[index])

    def _within(self, method: Any) -> Any:
        inner = super()._within(method)
        if getattr(method, "__name__", "") != "of_taps":
            return inner
        return lambda taps: _GuardedReader(inner(taps), self._told)
