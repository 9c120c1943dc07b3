"""What is inside a shard of a cache, and beside the shards: the part in which sharded formats differ.

HDF5 datasets (hdf5.py) and raw arrays (binary_v2.py) are such layouts. Knows none of them; when a shard is begun,
sealed or opened is sharded.py's.

Legend: T tokens, C = taps * H, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from deepspec_core.cache.manifest import Manifest, Shard
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.errors import CacheError


class NewShard(Protocol):
    """A shard that is being written."""

    def append(self, sample: Sample, features: TargetFeatures) -> None:
        """Add a sample. OSError where the disk refuses."""
        ...

    def finish(self, lengths: Sequence[int], original_lengths: Sequence[int]) -> None:
        """Write what remains, sync and close the file. OSError where the disk refuses."""
        ...

    def close(self) -> None:
        """Let go of an unfinished shard's file."""
        ...


class OpenShard(Protocol):
    """A sealed shard, opened for reading."""

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
    """What is inside a shard, and beside the shards.

    format: The name in run files and manifests.
    suffix: How shards' names end.
    manifest: The name of the file that has the header and the checksums.
    dtypes: Number formats in which features can be stored.
    """

    format: str
    suffix: str
    manifest: str
    dtypes: tuple[str, ...]

    def new(self, path: Path, header: CacheHeader) -> NewShard:
        """Begin a shard. The file is created: OSError where it is there."""
        ...

    def open(self, path: Path, header: CacheHeader, shard: Shard) -> OpenShard:
        """CacheError where the file is not what header and manifest say. OSError where it cannot be read."""
        ...

    def write_index(self, folder: Path, manifest: Manifest) -> None:
        """Write what the layout has beside its shards, once all of them are sealed."""
        ...

    def index_problems(self, folder: Path, manifest: Manifest) -> list[CacheError]:
        """What of that is not as it was written."""
        ...

    def bytes_per_token(self, header: CacheHeader) -> int:
        """Bytes that one token takes."""
        ...
