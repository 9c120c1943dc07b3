"""A cache format whose optional members may be wrong: merging, fewer taps, counts, digests, verification.

`CACHES` says which test of the suite has to fail, and a word of what it has seen.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.contracts.draft import Sample
from deepspec_core.errors import CacheError


class _Reader:
    """A reader with all members. It is pickled as it is."""

    def __init__(self, inner: Any, what: str) -> None:
        self.inner, self.what, self.header = inner, what, inner.header
        digests = {"one digest for all caches": "x", "a digest of the header alone": _digest(inner.header)}
        self.digest = digests.get(what, inner.digest)

    def __len__(self) -> int:
        return len(self.inner)

    def ids(self) -> list[str]:
        return self.inner.ids()  # type: ignore[no-any-return]

    def lengths(self) -> list[int]:
        return self.inner.lengths()  # type: ignore[no-any-return]

    def tokens_of(self, index: int) -> Sample:
        return self.inner.tokens_of(index)  # type: ignore[no-any-return]

    def __getitem__(self, index: int) -> Sample:
        return self.inner[index]  # type: ignore[no-any-return]

    def of_taps(self, taps: tuple[int, ...]) -> Any:
        if self.what == "gives all taps where some are asked":
            return self
        found = self.inner.of_taps(tuple(sorted(taps)) if self.what == "gives taps in their own order" else taps)
        if self.what == "gives taps in their own order":
            found.header = self.inner.of_taps(taps).header
        return found

    def samples_with(self, token: int) -> int | None:
        return 1 if self.what == "counts one sample for every token" else self.inner.samples_with(token)


class _Writer:
    def __init__(self, inner: Any, what: str) -> None:
        self.inner, self.what = inner, what

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def written(self) -> set[str]:
        return self.inner.written()  # type: ignore[no-any-return]

    def write(self, sample: Sample) -> None:
        self.inner.write(sample)

    def finish(self) -> None:
        self.inner.finish()

    def close(self) -> None:
        self.inner.close()

    def absorb(self, part: Path) -> None:
        if self.what == "removes a part and takes nothing of it":
            shutil.rmtree(part)
            return
        if self.what == "fails to take a part":
            raise RuntimeError("no such part")
        try:
            self.inner.absorb(part)
        except CacheError:
            if self.what != "passes over parts that are unfinished":
                raise

    def arrange(self, order: Mapping[str, int]) -> None:
        if self.what != "leaves its shards as they came":
            self.inner.arrange(order)


class WrongMembers(HDF5Format):
    """A format that may be wrong."""

    what = ""

    def create(self, path: Path, header: CacheHeader, **options: Any) -> Any:
        return _Writer(super().create(path, header, **options), self.what)

    def open(self, path: Path, expect: CacheHeader | None) -> Any:
        return _Reader(super().open(path, expect), self.what)

    def verify(self, path: Path, *, part: int = 0, parts: int = 1, remembered: bool = True) -> list[CacheError]:
        if self.what == "verifies all files for every caller":
            part, parts = 0, 1
        known = _VERIFIED if self.what == "never reads a file again that it has verified" else {}
        now = {shard: (shard.stat().st_size, shard.stat().st_mtime_ns) for shard in path.glob("*.h5")}
        if now and all(known.get(shard) == said for shard, said in now.items()):
            return []
        known |= now
        return super().verify(path, part=part, parts=parts, remembered=remembered)


_VERIFIED: dict[Path, tuple[int, int]] = {}


def _digest(header: CacheHeader) -> str:
    return hashlib.sha256(str(header).encode()).hexdigest()


CACHES = {
    "removes a part and takes nothing of it": ("writers_share_the_work", "written()"),
    "fails to take a part": ("writers_share_the_work", "RuntimeError"),
    "leaves its shards as they came": ("writers_share_the_work", "ids() after"),
    "passes over parts that are unfinished": ("broken_parts_are_refused", "unfinished"),
    "gives all taps where some are asked": ("some_taps_are_read", "of_taps"),
    "gives taps in their own order": ("some_taps_are_read", "hidden"),
    "counts one sample for every token": ("counts_of_tokens_are_right", "samples_with"),
    "one digest for all caches": ("digests_tell_caches_apart", "one number of the features"),
    "a digest of the header alone": ("digests_tell_caches_apart", "one number of the features"),
    "verifies all files for every caller": ("verification_is_shared", "all three"),
    "never reads a file again that it has verified": ("every_file_is_read_again", "flipped"),
}
