"""How fast a feature cache is read and written, beside the same bytes in one plain file. Run by `data.py cache`.

Warm reading: passes over all samples, in order and shuffled, by this process and by loader workers, which hand a sample
over as the trainer's do, in one piece of shared memory. The yardstick is a memory map of one file that holds every
sample's features, each copied out of it into a tensor once, and handed over in the same way. Cold reading: the files'
pages are dropped first (posix_fadvise), and the yardstick is plain `pread` of each sample's bytes; `pages dropped` is
how much slower plain reading is cold than warm, which is near 1 where the system keeps the pages.
Writing: against plain files of the same samples, as many as the cache has shards, each written
from its first byte to its last and synced before the next one begins: what a sealed shard promises, and no more.
`checked` is what training pays: every feature is looked at once more, to see that it is finite.

Legend: T tokens, C = taps * H, H hidden size.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from deepspec_core.cache.binary_v2 import BinaryV2Format
from deepspec_core.cache.hdf5 import HDF5Format
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.features.cached import CachedFeatures
from deepspec_core.training.one_buffer import joined, split

FORMATS = {"hdf5": HDF5Format, "deepspec-v2": BinaryV2Format}
TAPS = (1, 2, 3, 4)
SHARD_SAMPLES = 256  # about 600 MB at the default size
WORKERS = (0, 1, 2)


def header(hidden_size: int, longest: int) -> CacheHeader:
    return CacheHeader(
        target="t", revision="r", adapter="a", taps=TAPS, hidden_size=hidden_size, vocab_size=1000, dtype="bfloat16",
        tokenizer="k", template="m", max_length=longest, source="s", plugins={},
    )  # fmt: skip


def samples(number: int, hidden_size: int, seed: int = 0) -> list[Sample]:
    """Log-normal lengths around 200 tokens; random features, the same memory for all samples of one length or less."""
    lengths = np.random.default_rng(seed).lognormal(5.3, 0.6, number).astype(int).clip(16, 2048).tolist()
    drawn = torch.Generator().manual_seed(seed)
    hidden_TC = torch.randn(max(lengths), len(TAPS) * hidden_size, generator=drawn).bfloat16()
    last_TH = torch.randn(max(lengths), hidden_size, generator=drawn).bfloat16()
    return [
        Sample(
            id=f"{index:06d}",
            input_ids=torch.arange(length) % 1000,
            loss_mask=torch.arange(length) > 3,
            original_length=length,
            features=TargetFeatures(hidden=hidden_TC[:length], last_hidden=last_TH[:length]),
        )
        for index, length in enumerate(lengths)
    ]


def parts(sample: Sample) -> list[Any]:
    """The bytes of a sample: token ids, mask, features."""
    features = sample.features
    assert features is not None
    tensors = (sample.input_ids.int(), sample.loss_mask, features.hidden, features.last_hidden)
    return [tensor.contiguous().view(torch.uint8).numpy() for tensor in tensors]


class Plain(Dataset[Sample]):
    """The yardstick: samples' bytes back to back in one file, read through a memory map or by `pread`."""

    def __init__(self, path: Path, all_samples: Sequence[Sample], hidden_size: int, *, mapped: bool) -> None:
        self.path, self.size, self.mapped = path, hidden_size, mapped
        self.lengths = [len(sample.input_ids) for sample in all_samples]
        self.ends = np.cumsum([0, *(sum(part.nbytes for part in parts(sample)) for sample in all_samples)]).tolist()
        self.opened: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": None}

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Sample:
        begin, end, length = self.ends[index], self.ends[index + 1], self.lengths[index]
        if self.opened is None:
            self.opened = np.memmap(self.path, dtype=np.uint8, mode="r") if self.mapped else self.path.open("rb")
        if self.mapped:
            content = torch.from_numpy(np.array(self.opened[begin:end]))
        else:
            content = torch.empty(end - begin, dtype=torch.uint8)
            assert os.preadv(self.opened.fileno(), [memoryview(content.numpy())], begin) == end - begin
        # One tensor, as it lies there: taken apart, arrays that begin at odd bytes would be copied again.
        whole = TargetFeatures(hidden=content, last_hidden=content[:0])
        ids = torch.zeros(0, dtype=torch.int64)
        return Sample(id=str(index), input_ids=ids, loss_mask=ids > 0, original_length=length, features=whole)


class Checked(Dataset[Sample]):
    """A cache as training reads it."""

    def __init__(self, reader: Any) -> None:
        self.source = CachedFeatures(reader)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        return self.source[index]


class HandedOver:
    """A sample that crosses the border between processes as the trainer's batches do (host_batch.py)."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample

    def __reduce__(self) -> tuple[Any, ...]:
        features = self.sample.features
        assert features is not None
        tensors = {"ids": self.sample.input_ids, "mask": self.sample.loss_mask}
        return split, joined({**tensors, "hidden": features.hidden, "last": features.last_hidden}, shared=True)


class Order(list[int]):
    """The numbers of samples, in the order of the next pass."""


def loader(source: Any, order: Order, workers: int) -> Callable[[], Iterator[Any]]:
    if workers == 0:
        return lambda: (source[index] for index in order)
    options: dict[str, Any] = {"num_workers": workers, "prefetch_factor": 4, "persistent_workers": True}
    ready = DataLoader(source, batch_size=None, sampler=order, collate_fn=HandedOver, **options)
    return lambda: iter(ready)


def write_plain_shards(folder: Path, all_samples: Sequence[Sample]) -> None:
    folder.mkdir()
    for first in range(0, len(all_samples), SHARD_SAMPLES):
        write_plain(folder / f"{first}.bin", all_samples[first : first + SHARD_SAMPLES])


def write_plain(path: Path, all_samples: Sequence[Sample]) -> None:
    with path.open("wb", buffering=0) as file:
        for sample in all_samples:
            for part in parts(sample):
                file.write(memoryview(part).cast("B"))
        os.fsync(file.fileno())


def write_cache(folder: Path, name: str, all_samples: Sequence[Sample], about: CacheHeader) -> None:
    writer = FORMATS[name]().create(folder, about, shard_samples=SHARD_SAMPLES)
    for sample in all_samples:
        writer.write(sample)
    writer.finish()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def drop_pages(place: Path) -> None:
    for path in [place] if place.is_file() else [one for one in place.rglob("*") if one.is_file()]:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def in_turns(works: dict[str, Callable[[], float]], turns: int, yardstick: str) -> dict[str, Any]:
    """Seconds of each, A B C, B C A, ..., after one turn that does not count; ratios are taken turn by turn.

    Each comes first in some turns: a disk is slower after what came before.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for turn in range(turns + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            found = works[name]()
            if turn:
                taken[name].append(found)
    ratios = {
        name: median(base / own for base, own in zip(taken[yardstick], values, strict=True))
        for name, values in taken.items()
        if name != yardstick
    }
    return {"seconds": {name: median(values) for name, values in taken.items()}, f"rate / {yardstick}": ratios}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    all_samples = samples(options.samples, options.hidden_size)
    about = header(options.hidden_size, max(len(sample.input_ids) for sample in all_samples))
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.output) as temporary:
        place = Path(temporary)
        plain = place / "plain.bin"
        write_plain(plain, all_samples)
        for name in FORMATS:
            write_cache(place / name, name, all_samples, about)
        mapped = Plain(plain, all_samples, options.hidden_size, mapped=True)
        size = mapped.ends[-1]
        readers: dict[str, Any] = {name: kind().open(place / name, about) for name, kind in FORMATS.items()}
        sources = {"map": mapped, **readers, **{f"{name}, checked": Checked(one) for name, one in readers.items()}}
        order = Order(range(len(all_samples)))
        warm = {}
        for shuffled in (False, True):
            if shuffled:
                np.random.default_rng(1).shuffle(order)
            for workers in WORKERS:
                passes = {name: loader(source, order, workers) for name, source in sources.items()}
                works = {name: _pass(one) for name, one in passes.items()}
                case = f"{'shuffled' if shuffled else 'in order'}, {workers} workers"
                warm[case] = in_turns(works, options.turns, "map")
        return {
            "bytes": size,
            "samples": len(all_samples),
            "warm": warm,
            "cold": _cold(place, plain, all_samples, options, about),
            "writing": _writing(place, all_samples, options, about),
        }


def _pass(samples_of: Callable[[], Iterator[Sample]]) -> Callable[[], float]:
    return lambda: seconds(lambda: sum(1 for _ in samples_of()))


def _cold(
    place: Path, plain: Path, all_samples: Sequence[Sample], options: argparse.Namespace, about: CacheHeader
) -> dict[str, Any]:
    def read(open_source: Callable[[], Any], where: Path, *, cold: bool = True) -> Callable[[], float]:
        def work() -> float:
            source = open_source()
            if cold:
                drop_pages(where)
            return seconds(lambda: [source[index] for index in range(len(source))])

        return work

    def plainly() -> Plain:
        return Plain(plain, all_samples, options.hidden_size, mapped=False)

    works = {"pread": read(plainly, plain), "pread, warm": read(plainly, plain, cold=False)}
    for name, kind in FORMATS.items():
        works[name] = read(lambda kind=kind, name=name: kind().open(place / name, about), place / name)
    found = in_turns(works, options.turns, "pread")
    found["pages dropped"] = found["rate / pread"].pop("pread, warm")
    return found


def _writing(
    place: Path, all_samples: Sequence[Sample], options: argparse.Namespace, about: CacheHeader
) -> dict[str, Any]:
    def again(write: Callable[[Path], None]) -> Callable[[], float]:
        def work() -> float:
            target = place / "written"
            taken = seconds(lambda: write(target))
            shutil.rmtree(target)
            return taken

        return work

    works = {"plain": again(lambda target: write_plain_shards(target, all_samples))}
    for name in FORMATS:
        works[name] = again(lambda target, name=name: write_cache(target, name, all_samples, about))
    return in_turns(works, options.turns, "plain")
