"""CacheFormatSuite: tests that a feature cache format meets its contract. Caches are written into temporary folders.

Clauses of what a format may leave out are in cache_members_suite.py.

This file knows the contract of cache formats. It does not know what a format's files look like; it changes their bytes.
"""

from __future__ import annotations

import pickle
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from attrs import evolve

from deepspec_core.contracts.cache import CacheFormat, CacheReader, CacheWriter
from deepspec_core.dtypes import torch_dtype
from deepspec_core.errors import CacheError, DeepSpecError, StageError
from deepspec_core.testing.cache_members_suite import CacheMembersSuite
from deepspec_core.testing.conformance import Unmet, clause, require
from deepspec_core.testing.damaged_files import damaged, killed_after
from deepspec_core.testing.random_batches import features_of, random_sample
from deepspec_core.testing.stored_samples import differs, error_of

_FORMAT = "deepspec_core/contracts/cache.py: CacheFormat"
_WRITER = "deepspec_core/contracts/cache.py: CacheWriter"
_READER = "deepspec_core/contracts/cache.py: CacheReader"
_HEADER = "deepspec_core/contracts/cache.py: CacheHeader"


class CacheFormatSuite(CacheMembersSuite):
    """Clauses of `contracts.cache.CacheFormat`.

    dtypes: The dtypes that the format stores exactly.
    finds_damage: Whether `verify` finds a flipped bit in a file of samples.
    """

    @clause("`build()` gives a format, a writer and a reader with the methods of the contract", written=_FORMAT)
    def test_it_is_a_format(self) -> None:
        cache = self.cache()
        require(isinstance(cache, CacheFormat), f"{type(cache).__name__}, in which members are missing")
        with self.folder() as path:
            with closing(cache.create(path, self.header())) as writer:
                require(isinstance(writer, CacheWriter), f"{type(writer).__name__}, in which members are missing")
                require(writer.written() == set(), f"written() of a new cache: {writer.written()}")
            self.write(path)
            reader = cache.open(path, None)
            require(isinstance(reader, CacheReader), f"{type(reader).__name__}, in which members are missing")

    @clause("what is written is read: ids, lengths, tokens, masks and features, in any order", written=_READER)
    def test_what_is_written_is_read(self) -> None:
        for dtype in self.dtypes:
            with self.folder() as path:
                header, samples = evolve(self.header(), dtype=dtype), self.samples()
                self.write(path, header)
                reader = self.cache().open(path, header)
                require(len(reader) == len(samples), f"{len(reader)} samples of {len(samples)}")
                require(reader.ids() == [one.id for one in samples], f"ids() = {reader.ids()}")
                lengths = [len(one.input_ids) for one in samples]
                require(list(reader.lengths()) == lengths, f"lengths() = {reader.lengths()}, not {lengths}")
                for index in (4, 0, 2, 2, 1, 3):
                    problem = differs(reader[index], samples[index], torch_dtype(dtype))
                    require(problem is None, f"sample {index} in {dtype}: {problem}")

    @clause("features are kept over the whole range of their number format", written=_HEADER)
    def test_large_and_small_numbers_are_kept(self) -> None:
        for dtype in self.dtypes:
            sample, facts = random_sample("a", 4), torch.finfo(torch_dtype(dtype))
            for part in (features_of(sample).hidden, features_of(sample).last_hidden):
                part[0], part[1] = part[0].sign() * facts.max / 2, part[1].sign() * facts.smallest_normal
                part[2, :2] = torch.tensor([min(3e4, facts.max / 4), -min(3e4, facts.max / 4)])
            with self.folder() as path:
                header = evolve(self.header(), dtype=dtype)
                self.write(path, header, [sample])
                problem = differs(self.cache().open(path, header)[0], sample, torch_dtype(dtype))
                require(problem is None, f"features up to {facts.max / 2:.3g} in {dtype}: {problem}")

    @clause(
        "a reader gives each sample its own tensors: what is done to them changes nothing that is read", written=_READER
    )
    def test_samples_are_apart(self) -> None:
        with self.folder() as path:
            samples, dtype = self.samples(), torch_dtype(self.header().dtype)
            self.write(path)
            reader = self.cache().open(path, None)
            kept = [reader[index] for index in range(len(samples))]
            for index, one in enumerate(kept):
                problem = differs(one, samples[index], dtype)
                require(problem is None, f"sample {index}, after the others were read: {problem}")
            features_of(kept[1]).hidden.zero_()
            kept[1].input_ids.zero_()
            for index in (0, 1, 2):
                problem = differs(reader[index], samples[index], dtype)
                require(problem is None, f"sample {index}, after the tensors of sample 1 were set to 0: {problem}")

    @clause("`tokens_of` gives a sample without its features", written=_READER)
    def test_tokens_alone(self) -> None:
        with self.folder() as path:
            self.write(path)
            reader = self.cache().open(path, None)
            for index, sample in enumerate(self.samples()):
                found = reader.tokens_of(index)
                require(found.features is None, f"tokens_of({index}) has features")
                problem = differs(found, evolve(sample, features=None), torch.float32)
                require(problem is None, f"tokens_of({index}): {problem}")

    @clause("a reader can be pickled and sent to loader workers", written=_READER)
    def test_a_reader_is_sent(self) -> None:
        with self.folder() as path:
            self.write(path)
            reader = self.cache().open(path, None)
            features_of(reader[0])
            sent = pickle.loads(pickle.dumps(reader))
            problem = differs(sent[2], self.samples()[2], torch_dtype(self.header().dtype))
            require(problem is None, f"sample 2 of the copy: {problem}")

    @clause("the header is kept, and None where there is no cache", written=_FORMAT)
    def test_the_header_is_kept(self) -> None:
        cache = self.cache()
        with self.folder() as path:
            require(cache.header(path) is None, f"{cache.header(path)}, where there is none")
            with closing(cache.create(path, self.header())):
                require(cache.header(path) == self.header(), f"{cache.header(path)} of a cache that is not finished")
            self.write(path)
            require(cache.header(path) == self.header(), f"{cache.header(path)}, written as {self.header()}")
            require(cache.open(path, None).header == self.header(), "a reader with another header")

    @clause("a cache made of anything else is not opened: CacheError names the field that differs", written=_HEADER)
    def test_another_header_is_refused(self) -> None:
        cache, header = self.cache(), self.header()
        with self.folder() as path:
            self.write(path)
            changes: dict[str, Any] = {
                "target": "x", "revision": "x", "adapter": "x", "taps": (1,), "hidden_size": 8, "vocab_size": 8,
                "tokenizer": "x", "template": "x", "max_length": 8, "source": "x", "subset": "x",
            }  # fmt: skip
            for name, value in changes.items():
                said = error_of(CacheError, partial(cache.open, path, evolve(header, **{name: value})))
                require(said is not None and name in said, f"another `{name}`: {said or 'opened'}")
            free: dict[str, Any] = {"plugins": {"other": "2"}, "computed_in": "bfloat16", "split": "x"}
            for name, other in free.items():
                said = error_of(DeepSpecError, partial(cache.open, path, evolve(header, **{name: other})))
                require(said is None, f"another `{name}`, which is not compared: {said}")
            said = error_of(CacheError, lambda: cache.create(path, evolve(header, source="x")).close())
            require(said is not None, "`create` goes on with a cache of another source")

    @clause("a cache is opened when it is finished, not before", written=_FORMAT)
    def test_an_unfinished_cache_is_not_opened(self) -> None:
        with self.folder() as path:
            with closing(self.cache().create(path, self.header(), shard_samples=2)) as writer:
                for sample in self.samples():
                    writer.write(sample)
                writer.close()
                writer.close()
            said = error_of(CacheError, lambda: self.cache().open(path, None))
            require(said is not None, "opened after `close` without `finish`")

    @clause("a new writer goes on after a stop; each sample is there once", written=_WRITER)
    def test_a_writer_goes_on(self) -> None:
        with self.folder() as path:
            with closing(self.cache().create(path, self.header(), shard_samples=2)) as writer:
                for sample in self.samples()[:3]:
                    writer.write(sample)
            self._goes_on(path)

    @clause("two writers at once are refused with a StageError", written=_FORMAT)
    def test_one_writer_at_a_time(self) -> None:
        with self.folder() as path, closing(self.cache().create(path, self.header())):
            said = error_of(StageError, lambda: self.cache().create(path, self.header()).close())
            require(said is not None, "a second writer beside the first")

    @clause(
        "a writer that is killed leaves no finished cache; what it sealed is kept, and a new writer goes on",
        written=_WRITER,
    )
    def test_a_killed_writer(self) -> None:
        with self.folder() as path:

            def write() -> CacheWriter:
                writer = self.cache().create(path, self.header(), shard_samples=2)
                for sample in self.samples()[:3]:
                    writer.write(sample)
                return writer

            killed_after(write)
            require(self.cache().header(path) == self.header(), f"header() = {self.cache().header(path)}")
            said = error_of(CacheError, lambda: self.cache().open(path, None))
            require(said is not None, "opened after its writer was killed")
            self._goes_on(path)

    @clause(
        "ids of samples are text and name no files: any id is read back, and nothing lies beside the cache's folder",
        written=_FORMAT,
    )
    def test_ids_are_text(self) -> None:
        with self.folder() as path:
            names = [
                "",
                ".",
                "../x",
                "a/b",
                str(path.parent / "y"),
                "long" * 100,
                "a line\nand another",
                "\u96ea \u00e4",
            ]
            self.write(path, samples=[evolve(self.samples()[0], id=name) for name in names])
            found = self.cache().open(path, None)
            require(found.ids() == names, f"ids() = {found.ids()}, not {names}")
            read = [found[index].id for index in range(len(names))]
            require(read == names, f"the ids of the samples that are read are {read}, not {names}")
            beside = sorted(one.name for one in path.parent.iterdir() if one != path)
            require(not beside, f"beside the folder: {beside}")

    @clause(
        "`verify` finds nothing in a whole cache, and each file that is not as it was written. No damage is read as a "
        "header, and none as no cache: it is a CacheError",
        written=_FORMAT,
    )
    def test_damage_is_found(self) -> None:
        with self.folder() as path:
            self.write(path)
            errors = [str(one) for one in self.cache().verify(path)]
            require(not errors, f"of a whole cache: {errors}")
            for what, is_cut in damaged(path):
                try:
                    seen = self._seen_of_damage(path, is_cut or self.finds_damage)
                except CacheError:
                    continue
                except Exception as error:
                    raise Unmet(f"{what}: {type(error).__name__}: {error}") from error
                require(seen is None, f"{what}: {seen}")

    @clause("a cache without tapped layers holds the last hidden state alone", written=_FORMAT)
    def test_without_taps(self) -> None:
        with self.folder() as path:
            sample = random_sample("a", 7, num_taps=0)
            header = evolve(self.header(), taps=())
            self.write(path, header, [sample])
            problem = differs(self.cache().open(path, header)[0], sample, torch_dtype(header.dtype))
            require(problem is None, f"taps = (): {problem}")

    @clause("`bytes_per_token` is about what a token takes", written=_FORMAT)
    def test_sizes_are_estimated(self) -> None:
        taken = []
        for count in (8, 40):
            with self.folder() as path:
                with closing(self.cache().create(path, self.header())) as writer:
                    for index in range(count):
                        writer.write(random_sample(f"s{index}", 64, seed=index))
                    writer.finish()
                taken.append(sum(one.stat().st_size for one in path.rglob("*") if one.is_file()))
        size: Any = self.cache().bytes_per_token(self.header())
        require(type(size) is int and size > 0, f"bytes_per_token() = {size!r}")
        stored = (taken[1] - taken[0]) / (32 * 64)
        require(0.5 * stored < size < 2 * stored, f"{size} bytes, and one more token takes {stored:.0f}")

    def _goes_on(self, path: Path) -> None:
        """Continue with a new writer, after another writer has written three of the samples."""
        samples = self.samples()
        with closing(self.cache().create(path, self.header(), shard_samples=2)) as writer:
            sealed = writer.written()
            require({"s0", "s1"} <= sealed, f"written() after a stop: {sealed}, and a shard of s0 and s1 was full")
            for sample in samples:
                if sample.id not in sealed:
                    writer.write(sample)
            writer.finish()
        reader = self.cache().open(path, None)
        require(sorted(reader.ids()) == [one.id for one in samples], f"ids() = {reader.ids()}")
        for index, name in enumerate(reader.ids()):
            problem = differs(reader[index], samples[int(name[1:])], torch_dtype(self.header().dtype))
            require(problem is None, f"sample {name}: {problem}")

    def _seen_of_damage(self, path: Path, is_found: bool) -> str | None:
        """What the format reports wrongly about a damaged cache. Damage that no reader sees need not be reported."""
        header = self.cache().header(path)
        if header is None or (header != self.header() and is_found):
            return "header() is None, as where there is no cache" if header is None else f"header() = {header}"
        errors = [one for part in (0, 1) for one in self.cache().verify(path, part=part, parts=2, remembered=False)]
        if errors or not is_found:
            other = [type(one).__name__ for one in errors if not isinstance(one, CacheError)]
            return f"verify() gives {other}" if other else None
        try:
            reader = self.cache().open(path, None)
            read = [reader[index] for index in range(len(reader))]
        except CacheError as error:
            return f"verify() finds nothing, and a reader says: {error}"
        written = self.samples()
        if len(read) != len(written):
            return f"verify() finds nothing, and {len(read)} samples of {len(written)} are read"
        pairs = zip(read, written, strict=True)
        changed = (differs(one, other, torch_dtype(header.dtype)) for one, other in pairs)
        problem = next((one for one in changed if one is not None), None)
        return None if problem is None else f"verify() finds nothing, and a sample is read otherwise: {problem}"
