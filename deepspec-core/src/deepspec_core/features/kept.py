"""Features that were received with answers, stored on disk until a cache is filled with them.

They are stored in a cache format, each under a digest of its token ids. So a text finds its features whatever its id
is, and never the features of another text. A journal beside them records for every regenerated text whether its
features were received, or why not. Knows token ids and a cache format; does not know who computed the features.

Legend: T tokens, C = taps * H, H hidden size.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import numpy as np
import torch
from attrs import evolve
from torch import Tensor

from deepspec_core.contracts.cache import CacheFormat, CacheHeader, CacheReader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.errors import CacheError, DeepSpecError

STORE: Final = "store"
JOURNAL: Final = "journal.jsonl"
# A kill loses the features of so many answers at most. They are asked for again.
SHARD_SAMPLES: Final = 32
LOST: Final = "it was lost when a run was interrupted"
UNKNOWN: Final = "no answer has these token ids"


def name_of(ids_T: Tensor) -> str:
    """The name under which the features of this text are stored."""
    return hashlib.sha256(ids_T.numpy().astype(np.int64).tobytes()).hexdigest()[:32]


class KeptWriter:
    """Stores features in `folder`, in addition to those there. They can be read after the `with` block.

    CacheError if the features there have another header, or are damaged.
    """

    def __init__(self, cache_format: CacheFormat, folder: Path, header: CacheHeader) -> None:
        self._writer = cache_format.create(folder / STORE, header, shard_samples=SHARD_SAMPLES)
        self._names = set(self._writer.written())
        self._path = folder / JOURNAL
        self._journal = self._path.open("ab")
        self._journal.write(b"\n")  # ends a line that a kill tore
        self._broken = False

    def keep(self, ids_T: Tensor, features: TargetFeatures) -> None:
        """Store a text's features, [T, C] and [T, H], unless they are stored already."""
        name = name_of(ids_T)
        if name not in self._names:
            mask = torch.zeros(len(ids_T), dtype=torch.bool)
            self._broken = True  # unless it is written
            self._writer.write(
                Sample(id=name, input_ids=ids_T, loss_mask=mask, original_length=len(ids_T), features=features)
            )
            self._broken = False
            self._names.add(name)
        self._note(name, None)

    def lacks(self, ids_T: Tensor, reason: str) -> None:
        """Record that a text has no features, and why."""
        self._note(name_of(ids_T), reason)

    def told(self) -> Counter[str]:
        """The number of texts with features (""), and of others by reason; those of earlier processes too."""
        return Counter(
            (LOST if name not in self._names else "") if reason is None else reason
            for name, reason in dict(_entries(self._path)).items()
        )

    def _note(self, name: str, reason: str | None) -> None:
        self._journal.write(json.dumps([name, reason]).encode() + b"\n")
        self._journal.flush()

    def __enter__(self) -> KeptWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            # Also if servers failed or the run is stopping, so that no stored features have to be requested again.
            if not self._broken:
                self._writer.finish()
        finally:
            self._writer.close()
            self._journal.close()


class KeptFeatures:
    """The features stored in `folder`. CacheError if they are unfinished, damaged, or have another header."""

    def __init__(self, cache_format: CacheFormat, folder: Path, header: CacheHeader) -> None:
        self._folder = folder
        self._reader: CacheReader = cache_format.open(folder / STORE, header)
        self._places = {name: place for place, name in enumerate(self._reader.ids())}
        self._said = dict(_entries(folder / JOURNAL))

    def __len__(self) -> int:
        return len(self._places)

    def has(self, sample: Sample) -> bool:
        """Whether features of exactly the sample's token ids are stored."""
        return name_of(sample.input_ids) in self._places

    def why_not(self, sample: Sample) -> str:
        """Why the sample's features are not stored, in words."""
        name = name_of(sample.input_ids)
        return (self._said[name] or LOST) if name in self._said else UNKNOWN

    def of(self, sample: Sample) -> Sample:
        """The sample with its features. CacheError if they cannot be read, or belong to another text."""
        try:
            found = self._reader[self._places[name_of(sample.input_ids)]]
        except DeepSpecError as error:
            raise self._unusable(sample, f"{error.problem}: {error.found}") from error
        if not torch.equal(found.input_ids, sample.input_ids):
            raise self._unusable(sample, "features of other token ids")
        return evolve(sample, features=found.features)

    def _unusable(self, sample: Sample, found: str) -> CacheError:
        return CacheError(
            "Features that were received with an answer cannot be read",
            where=f"sample {sample.id}, {self._folder}",
            found=found,
            fix="Remove that folder and run again: the missing features are then requested from the servers.",
        )


def discard(folder: Path) -> None:
    """Remove what was kept."""
    shutil.rmtree(folder, ignore_errors=True)


def _entries(journal: Path) -> Iterator[tuple[str, str | None]]:
    for line in journal.open("rb") if journal.exists() else ():
        try:
            entry: Any = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        if isinstance(entry, list) and len(entry) == 2:
            yield str(entry[0]), None if entry[1] is None else str(entry[1])
