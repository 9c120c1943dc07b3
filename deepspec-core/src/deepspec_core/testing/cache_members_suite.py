"""Clauses of what a cache format may have and may leave out: merging, fewer taps, counts, digests, shared verification.

A format that lacks a member skips its clause. This file knows the contract of cache formats. It does not know what a
format's files look like.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar
from unittest import SkipTest

import numpy as np
import torch
from attrs import evolve

from deepspec_core.contracts.cache import CacheFormat, CacheHeader, CacheReader, MergingWriter
from deepspec_core.contracts.draft import Sample
from deepspec_core.dtypes import torch_dtype
from deepspec_core.errors import CacheError
from deepspec_core.testing.conformance import Suite, clause, require
from deepspec_core.testing.damaged_files import damaged
from deepspec_core.testing.random_batches import TAPS, features_of, random_sample
from deepspec_core.testing.stored_samples import differs, error_of

_FORMAT = "deepspec_core/contracts/cache.py: CacheFormat"
_WRITER = "deepspec_core/contracts/cache.py: CacheWriter"
_MERGING = "deepspec_core/contracts/cache.py: MergingWriter"
_READER = "deepspec_core/contracts/cache.py: CacheReader"
VOCABULARY = 151_936
"""More tokens than 16 bits can number."""


class CacheMembersSuite(Suite):
    """Clauses of the optional members of `contracts.cache.CacheFormat`, its writer and its reader."""

    kind = "cache"
    dtypes: ClassVar[Sequence[str]] = ("float32", "float16", "bfloat16")
    finds_damage: ClassVar[bool] = True

    def cache(self) -> CacheFormat:
        """A new instance of the format."""
        made: CacheFormat = self.registry().build("cache", self.component)
        return made

    def header(self) -> CacheHeader:
        """The header of a cache of random samples."""
        return CacheHeader(
            target="t", revision="r", adapter="tiny", taps=TAPS, hidden_size=32, vocab_size=VOCABULARY,
            dtype=self.dtypes[0], tokenizer="k", template="m", max_length=131_072, source="s", plugins={"one": "1"},
        )  # fmt: skip

    def samples(self) -> list[Sample]:
        """Five samples of different lengths. Each has the first and the last id of a large vocabulary, and long texts.

        A number that a format stores in fewer bits than it needs is then read as another.
        """
        made = [random_sample(f"s{i}", 5 + 3 * i, seed=i) for i in range(5)]
        for number, one in enumerate(made):
            one.input_ids[number : number + 3] = torch.tensor([0, VOCABULARY - 1, 2**16 + number])
        return [evolve(one, original_length=70_000 + 3 * i) for i, one in enumerate(made)]

    @clause(
        "`absorb` takes over all samples of a finished cache and removes it; `arrange` sorts them", written=_MERGING
    )
    def test_writers_share_the_work(self) -> None:
        with self.folder() as path:
            samples, parts = self.samples(), [path.parent / "first", path.parent / "second"]
            # The order of `arrange` is another than that of writing and than that of the names.
            self.write(parts[0], samples=samples[3:])
            self.write(parts[1], samples=samples[:3])
            with closing(self._merging(path)) as writer:
                for part in parts:
                    writer.absorb(part)
                    require(not part.exists(), "the part is still there after `absorb`")
                found = writer.written()
                require(found == {one.id for one in samples}, f"written() after `absorb` of two parts: {found}")
                writer.arrange({one.id: number for number, one in enumerate(samples)})
                writer.finish()
            reader = self.cache().open(path, self.header())
            require(reader.ids() == [one.id for one in samples], f"ids() after `arrange`: {reader.ids()}")
            self._all_as_written(reader, samples, "after `absorb` and `arrange`")
            errors = [str(one) for one in self.cache().verify(path)]
            require(not errors, f"verify() after `absorb`: {errors}")

    @clause("`absorb` refuses a part that is damaged or unfinished with a CacheError", written=_MERGING)
    def test_broken_parts_are_refused(self) -> None:
        with self.folder() as path:
            part = path.parent / "part"
            with closing(self._merging(path)) as writer:
                with closing(self.cache().create(part, self.header(), shard_samples=2)) as other:
                    for sample in self.samples():
                        other.write(sample)
                said = error_of(CacheError, lambda: writer.absorb(part))
                require(said is not None, "an unfinished part is taken")
                self.write(path.parent / "cut")
                largest = max((path.parent / "cut").rglob("*"), key=lambda one: one.stat().st_size * one.is_file())
                os.truncate(largest, largest.stat().st_size // 2)
                said = error_of(CacheError, lambda: writer.absorb(path.parent / "cut"))
                require(said is not None, f"a part is taken, and half is gone of {largest.name}")

    @clause("`of_taps` gives a reader with these taps alone, in this order; the reader itself stays", written=_READER)
    def test_some_taps_are_read(self) -> None:
        with self.folder() as path:
            samples = self.samples()
            self.write(path)
            reader: Any = self.cache().open(path, None)
            if not hasattr(reader, "of_taps"):
                raise SkipTest("its reader has no `of_taps`")
            for places in ((1,), (0, 2, 3), (4, 1), ()):
                taps = tuple(TAPS[place] for place in places)
                narrowed = reader.of_taps(taps)
                require(tuple(narrowed.header.taps) == taps, f"of_taps({taps}) with the taps {narrowed.header.taps}")
                kept = evolve(self.header(), taps=taps)
                require(narrowed.header == kept, f"of_taps({taps}) has another header: {narrowed.header}")
                fewer = [_with_taps(one, places) for one in samples]
                self._all_as_written(narrowed, fewer, f"of_taps({taps})")
                self._all_as_written(pickle.loads(pickle.dumps(narrowed)), fewer, f"a copy of of_taps({taps})")
            require(tuple(reader.header.taps) == TAPS, f"the reader has the taps {reader.header.taps} after `of_taps`")
            self._all_as_written(reader, samples, "after `of_taps`")

    @clause("`samples_with` is the number that was noted of a token, or counted; else None", written=_READER)
    def test_counts_of_tokens_are_right(self) -> None:
        for noted in (False, True):
            with self.folder() as path:
                samples = self.samples()
                right = {
                    token: sum(bool((one.input_ids == token).any()) for one in samples)
                    for token in (VOCABULARY - 1, 2**16 + 1, 5)
                }
                with closing(self.cache().create(path, self.header(), shard_samples=2)) as writer:
                    for sample in samples:
                        writer.write(sample)
                    note = getattr(writer, "note_samples_with", None) if noted else None
                    if note is not None:
                        note(VOCABULARY - 1, right[VOCABULARY - 1])
                        note(2**16 + 1, right[2**16 + 1])
                    writer.finish()
                count = getattr(self.cache().open(path, None), "samples_with", None)
                if count is None:
                    raise SkipTest("its reader has no `samples_with`")
                for token, expected in right.items():
                    found = count(token)
                    must_know = note is not None and token != 5
                    fine = found == expected if must_know or found is not None else True
                    words = "was noted" if must_know else "was not noted"
                    require(fine, f"samples_with({token}) = {found}; {expected} samples have it, which {words}")

    @clause("caches that differ in their header, a token or a feature have another `digest`", written=_READER)
    def test_digests_tell_caches_apart(self) -> None:
        with self.folder() as path:
            samples, header = self.samples(), self.header()
            first, last = samples[0], samples[-1]
            changed = evolve(features_of(last), hidden=features_of(last).hidden.clone())
            changed.hidden[-1, -1] += 1
            ids_T, mask_T = first.input_ids.clone(), first.loss_mask.clone()
            ids_T[-1] += 1
            mask_T[-1] = ~mask_T[-1]
            others: dict[str, tuple[CacheHeader, list[Sample]]] = {
                "one number of the features": (header, [*samples[:-1], evolve(last, features=changed)]),
                "one token": (header, [evolve(first, input_ids=ids_T), *samples[1:]]),
                "one place of a loss mask": (header, [evolve(first, loss_mask=mask_T), *samples[1:]]),
                "the header's source": (evolve(header, source="another"), samples),
            }
            self.write(path)
            own: Any = getattr(self.cache().open(path, None), "digest", None)
            if own is None:
                raise SkipTest("its reader has no `digest`")
            require(isinstance(own, str) and own != "", f"digest = {own!r}, which is no text")
            again = getattr(self.cache().open(path, None), "digest", None)
            require(again == own, f"digest = {again!r} of the cache that had {own!r} before")
            for number, (what, (of, written)) in enumerate(others.items()):
                beside = path.parent / str(number)
                self.write(beside, of, written)
                found = getattr(self.cache().open(beside, None), "digest", None)
                require(found != own, f"the same digest for a cache that differs in {what}")

    @clause("callers of `verify` share the work: not every one of them reads all files", written=_FORMAT)
    def test_verification_is_shared(self) -> None:
        with self.folder() as path:
            self.write(path)
            found: dict[str, int] = {}
            for what, is_cut in damaged(path):
                if is_cut:
                    continue
                try:
                    parts = [self.cache().verify(path, part=part, parts=3, remembered=False) for part in range(3)]
                except CacheError:
                    # Damage of what says which files there are: every caller sees it.
                    continue
                found[what] = sum(bool(errors) for errors in parts)
            seen = {what: count for what, count in found.items() if count}
            if not seen:
                raise SkipTest("`verify` finds no flipped bit")
            require(min(seen.values()) < 3, f"each of three callers reads all: {', '.join(seen)} is found by all three")

    @clause(
        "with `remembered=False`, `verify` reads every file, also one that seems not to be changed", written=_FORMAT
    )
    def test_every_file_is_read_again(self) -> None:
        if not self.finds_damage:
            raise SkipTest("`verify` finds no flipped bit")
        with self.folder() as path:
            self.write(path)
            self.cache().verify(path)
            largest = max((one for one in path.rglob("*") if one.is_file()), key=lambda one: one.stat().st_size)
            before = largest.stat()
            with largest.open("r+b") as file:
                content = file.read()
                said = np.flatnonzero(np.frombuffer(content, dtype=np.uint8))
                at = int(said[len(said) // 2])
                file.seek(at)
                file.write(bytes([content[at] ^ 1]))
            os.utime(largest, ns=(before.st_atime_ns, before.st_mtime_ns))
            try:
                errors = self.cache().verify(path, remembered=False)
            except CacheError:
                return
            require(errors, f"after a whole verification, a bit that has flipped in {largest.name} is not found")

    def _merging(self, path: Path) -> MergingWriter:
        writer = self.cache().create(path, self.header(), shard_samples=2)
        if not isinstance(writer, MergingWriter):
            writer.close()
            raise SkipTest("its writer has no `absorb` and `arrange`")
        return writer

    def _all_as_written(self, reader: CacheReader, samples: list[Sample], words: str) -> None:
        lengths = [len(one.input_ids) for one in samples]
        require(len(reader) == len(samples), f"{words}: {len(reader)} samples of {len(samples)}")
        require(list(reader.lengths()) == lengths, f"{words}: lengths() = {reader.lengths()}, not {lengths}")
        for index, sample in enumerate(samples):
            problem = differs(reader[index], sample, torch_dtype(self.header().dtype))
            require(problem is None, f"{words}: sample {index}: {problem}")
            problem = differs(reader.tokens_of(index), evolve(sample, features=None), torch.float32)
            require(problem is None, f"{words}: tokens_of({index}): {problem}")

    def write(self, path: Path, header: CacheHeader | None = None, samples: list[Sample] | None = None) -> None:
        """Write a finished cache of these samples, of all if not given, in shards of two."""
        with closing(self.cache().create(path, header or self.header(), shard_samples=2)) as writer:
            for sample in self.samples() if samples is None else samples:
                writer.write(sample)
            writer.finish()

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A path for a cache, in a new temporary folder."""
        with TemporaryDirectory() as folder:
            yield Path(folder) / "cache"


def _with_taps(sample: Sample, places: Sequence[int]) -> Sample:
    """The sample with the features of some of its taps."""
    features = features_of(sample)
    size = features.last_hidden.shape[1]
    parts = [features.hidden[:, place * size : (place + 1) * size] for place in places]
    hidden_TC = torch.cat(parts, 1) if parts else features.hidden[:, :0]
    return evolve(sample, features=evolve(features, hidden=hidden_TC))
