"""The contents of a cache's shards and of the files beside them: the part in which sharded formats differ.

HDF5 datasets (hdf5.py) and raw arrays (binary_v2.py) are such layouts, and a plugin may have another. Together with
sharded.ShardedFormat, a layout is a complete cache format. Knows no particular layout; sharded.py decides when a shard
is begun, sealed or opened.

Legend: T tokens, C = taps * H, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from deepspec_core.cache import quantize
from deepspec_core.cache.manifest import NAME, Manifest, Shard
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.errors import CacheError

__all__ = ["NewShard", "OpenShard", "ShardLayout", "not_as_written"]


class NewShard(Protocol):
    """A shard that is being written. After an OSError it is closed, and its file removed."""

    def append(self, sample: Sample, features: TargetFeatures) -> None:
        """Add a sample. OSError where the disk refuses."""
        ...

    def finish(self, lengths: Sequence[int], original_lengths: Sequence[int]) -> None:
        """Write what remains, and close the file. OSError where the disk refuses. The file is synced afterwards."""
        ...

    def close(self) -> None:
        """Let go of an unfinished shard's file, without an error."""
        ...


class OpenShard(Protocol):
    """A sealed shard, opened for reading.

    What its methods raise, other than CacheError, becomes a CacheError that names the file.

    It may have `features_of(row, layers)`: the features with some of the header's taps alone, which are counted from 0
    and increase. The others are not read. Without it, all are read.
    """

    def tokens(self, row: int) -> tuple[Any, Any, int]:
        """input_ids [T] and loss_mask [T] as arrays, and the original length."""
        ...

    def features(self, row: int) -> TargetFeatures:
        """hidden [T, C] and last_hidden [T, H]."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


class ShardLayout(Protocol):
    """What is inside a shard, and beside the shards. Subclasses give `format`, `suffix`, `new` and `open`.

    format: The name in run files and manifests.
    suffix: How shards' names end.
    manifest: The name of the file that has the header and the checksums.
    dtypes: Number formats in which features can be stored.
    """

    format: str
    suffix: str
    manifest: str = NAME
    dtypes: tuple[str, ...] = tuple(quantize.ARRAY_TYPES)

    def new(self, path: Path, header: CacheHeader) -> NewShard:
        """Begin a shard. The file is created: OSError where it is there."""
        ...

    def open(self, path: Path, header: CacheHeader, shard: Shard) -> OpenShard:
        """CacheError where the file is not what header and manifest say (`not_as_written`).

        Another process may have written the file: what it says of its sizes is checked against theirs before memory is
        taken. What else is raised becomes a CacheError that names the file.
        """
        ...

    def write_index(self, folder: Path, manifest: Manifest) -> None:
        """Write the layout's files beside the shards, once all shards are sealed. By default there are none."""
        return

    def index_problems(self, folder: Path, manifest: Manifest) -> list[CacheError]:
        """What of that is not as it was written."""
        return []

    def bytes_per_token(self, header: CacheHeader) -> int:
        """The bytes that one token takes. By default those of shard_arrays.arrays_of."""
        size = header.hidden_size
        return quantize.bytes_per_token(header.dtype, (len(header.taps) + 1) * size, size) + 4 + 1


def not_as_written(path: Path, found: str, expected: str) -> CacheError:
    """The error of a shard that is not what header and manifest say."""
    return CacheError(
        "A shard of the cache does not match the manifest",
        where=path,
        found=found,
        expected=expected,
        fix="Make the cache again (--force cache), or get it again from where it came.",
    )
