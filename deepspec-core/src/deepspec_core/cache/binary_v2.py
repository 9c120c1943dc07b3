"""The cache format "deepspec-v2": the published binary layout, which other programs read too.

manifest.json (version 2) and samples.idx describe shards of raw little-endian arrays. A sample's arrays lie back to
back: input_ids [T] int32, attention_mask [T] uint8, loss_mask [T] uint8, hidden [T, C] and last_hidden [T, H] bfloat16.
samples.idx has one record of 56 bytes a sample: its number, the shard, T, and where its arrays begin in the shard.

What the published layout has no place for stands where its readers do not look: header and checksums in
`deepspec.json`, the samples' original lengths behind the last sample of each shard.

Knows this layout; when a shard is begun, sealed or opened is sharded.py's.

Legend: T tokens, C = taps * H, H hidden size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from deepspec_core.cache.chunked_rows import MappedFile
from deepspec_core.cache.manifest import Manifest, Shard
from deepspec_core.cache.sharded import ShardedFormat
from deepspec_core.cache.taps import runs
from deepspec_core.contracts.cache import CacheHeader
from deepspec_core.contracts.draft import Sample
from deepspec_core.contracts.target import TargetFeatures
from deepspec_core.disk import sync
from deepspec_core.errors import CacheError

FORMAT: Final = "deepspec-v2"
OWN_MANIFEST: Final = "deepspec.json"
PUBLISHED_MANIFEST: Final = "manifest.json"
INDEX: Final = "samples.idx"
RECORD: Final = np.dtype([("sample", "<u8"), ("shard", "<u4"), ("length", "<u4"), ("offsets", "<u8", (5,))])
VERSION: Final = 2
_MAKE_AGAIN: Final = "Make the cache again (--force cache), or get it again from where it came."


class BinaryV2Format(ShardedFormat):
    """contracts.cache.CacheFormat."""

    def __init__(self) -> None:
        super().__init__(BinaryV2Layout())

    def _load(self, path: Path) -> Manifest | None:
        if not (path / OWN_MANIFEST).is_file() and is_published(path):
            raise CacheError(
                "This cache was written by another program, and does not record what it was made from",
                where=path,
                found=f"{PUBLISHED_MANIFEST} without {OWN_MANIFEST}",
                fix="Run `deepspec cache adopt DIR RUN.toml`, which checks the cache against a run "
                "and writes that file.",
            )
        return super()._load(path)


def is_published(folder: Path) -> bool:
    """Whether the folder has a manifest of the published layout."""
    return "index_record_size" in _json(folder / PUBLISHED_MANIFEST)


class BinaryV2Layout:
    """shard_layout.ShardLayout."""

    format = FORMAT
    suffix = ".bin"
    manifest = OWN_MANIFEST
    dtypes: tuple[str, ...] = ("bfloat16",)

    def new(self, path: Path, header: CacheHeader) -> _NewShard:
        """An empty file."""
        return _NewShard(path)

    def open(self, path: Path, header: CacheHeader, shard: Shard) -> OpenShard:
        """The file, mapped into memory, its size as the lengths of its samples say."""
        return OpenShard(path, header, shard.lengths)

    def write_index(self, folder: Path, manifest: Manifest) -> None:
        """samples.idx and the published manifest."""
        published = (json.dumps(_published(manifest), indent=2) + "\n").encode()
        for name, content in ((INDEX, _index(manifest)), (PUBLISHED_MANIFEST, published)):
            temporary = folder / f"{name}.tmp"
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, folder / name)
        sync(folder)

    def index_problems(self, folder: Path, manifest: Manifest) -> list[CacheError]:
        """Files beside the shards that are missing, or do not say what the shards hold."""
        index, published = folder / INDEX, folder / PUBLISHED_MANIFEST
        problems = []
        if not index.is_file() or index.read_bytes() != _index(manifest):
            problems.append(_untrue(index, "missing or changed", f"one record a sample, as {OWN_MANIFEST} says"))
        found = _json(published)
        for key, wanted in _facts(manifest).items():
            if found.get(key) != wanted:
                problems.append(_untrue(published, f"{key} = {found.get(key)!r}"[:120], f"{key} = {wanted!r}"[:120]))
        return problems

    def bytes_per_token(self, header: CacheHeader) -> int:
        """Features, token id and two masks."""
        return sum(_widths(header))


class _NewShard:
    """shard_layout.NewShard."""

    def __init__(self, path: Path) -> None:
        # Without a buffer: one write of a large array is a third faster than the buffer's pieces of it.
        self._file = path.open("xb", buffering=0)

    def append(self, sample: Sample, features: TargetFeatures) -> None:
        """The sample's arrays, one behind the other."""
        ids, mask = sample.input_ids.numpy().astype("<i4"), sample.loss_mask.numpy().astype("<u1")
        self._write(ids.tobytes() + b"\x01" * len(ids) + mask.tobytes())
        for values in (features.hidden, features.last_hidden):
            self._write(values.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().reshape(-1).data)

    def finish(self, lengths: Sequence[int], original_lengths: Sequence[int]) -> None:
        """The original lengths, and the end."""
        self._write(np.array(original_lengths, dtype="<i8").tobytes())
        self._file.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, content: Any) -> None:
        left = memoryview(content)
        while left:
            left = left[self._file.write(left) :]


class OpenShard:
    """shard_layout.OpenShard. A shard without original lengths, as others write it, has samples that were not cut."""

    def __init__(self, path: Path, header: CacheHeader, lengths: Sequence[int]) -> None:
        self._lengths = lengths
        self._widths = _widths(header)
        self._begins = np.cumsum([0, *lengths], dtype=np.int64) * sum(self._widths)
        end, size = int(self._begins[-1]), path.stat().st_size
        if size not in (end, end + 8 * len(lengths)):
            raise CacheError(
                "A shard of the cache does not match the manifest",
                where=path,
                found=f"{size:,} bytes",
                expected=f"{end:,} bytes of samples, and 8 for the original length of each",
                fix=_MAKE_AGAIN,
            )
        self._file = MappedFile(path) if size else None
        self._bytes = np.zeros(0, dtype=np.uint8) if self._file is None else self._file.bytes
        self._original = self._bytes[end:].view("<i8") if size > end else np.array(lengths)

    def tokens(self, row: int) -> tuple[Any, Any, int]:
        """The first three arrays; KeyError for padding, which has no place in a cache."""
        ids, attention, mask = (self._part(row, array) for array in range(3))
        if not attention.all():
            raise KeyError("a sample with padding (attention_mask 0)")
        return ids.view("<i4"), mask, int(self._original[row])

    def features(self, row: int) -> TargetFeatures:
        """The last two."""
        if self._file is not None:
            begin = self._begin(row, 3)
            self._file.will_be_read(begin, int(self._begins[row + 1]) - begin)
        hidden, last_hidden = (self._bfloat16(self._part(row, array), row) for array in (3, 4))
        return TargetFeatures(hidden=hidden, last_hidden=last_hidden)

    def features_of(self, row: int, layers: Sequence[int]) -> TargetFeatures:
        """The same with some of the layers."""
        width, length = self._widths[4], self._lengths[row]
        hidden_TB = self._mapped(row, 3).reshape(length, self._widths[3])
        parts = [hidden_TB[:, first * width : last * width] for first, last in runs(layers)]
        return TargetFeatures(
            hidden=self._bfloat16(np.concatenate(parts, axis=1).flatten(), row),
            last_hidden=self._bfloat16(self._part(row, 4), row),
        )

    def _bfloat16(self, of_bytes: Any, row: int) -> torch.Tensor:
        # By way of numbers of the same size: torch cannot view no bytes, those of no taps, as larger numbers.
        return torch.from_numpy(of_bytes.view("<u2")).view(torch.bfloat16).reshape(self._lengths[row], -1)

    def _part(self, row: int, array: int) -> Any:
        """One array of a sample as bytes. Copied: it may begin at an odd byte, and must outlive the mapping."""
        return np.array(self._mapped(row, array))

    def _mapped(self, row: int, array: int) -> Any:
        if self._file is not None:
            self._file.check_size()
        begin = self._begin(row, array)
        return self._bytes[begin : begin + self._lengths[row] * self._widths[array]]

    def _begin(self, row: int, array: int) -> int:
        return int(self._begins[row]) + self._lengths[row] * sum(self._widths[:array])

    def close(self) -> None:
        """Let go of the mapping."""
        del self._bytes, self._original, self._file


def _widths(header: CacheHeader) -> tuple[int, ...]:
    """Bytes a token of each array, in the order in which they lie."""
    return 4, 1, 1, 2 * header.hidden_size * len(header.taps), 2 * header.hidden_size


def records(header: CacheHeader, shards: Sequence[Sequence[int]]) -> np.ndarray[Any, Any]:
    """What samples.idx says of samples of these lengths, by shard, laid back to back."""
    rows: list[tuple[Any, ...]] = []
    for shard, lengths in enumerate(shards):
        begin = 0
        for length in lengths:
            ends = np.cumsum([0, *_widths(header)], dtype=np.uint64) * np.uint64(length) + np.uint64(begin)
            rows.append((len(rows), shard, length, ends[:5]))
            begin = int(ends[5])
    return np.array(rows, dtype=RECORD)


def _index(manifest: Manifest) -> bytes:
    """The content of samples.idx."""
    return records(manifest.header, [shard.lengths for shard in manifest.shards]).tobytes()


def _facts(manifest: Manifest) -> dict[str, Any]:
    """The keys of the published manifest that say how the cache is to be read."""
    header = manifest.header
    return {
        "version": VERSION,
        "num_samples": manifest.num_samples,
        "num_shards": len(manifest.shards),
        "index_record_size": RECORD.itemsize,
        "shards": [{"shard_id": number, "file_name": shard.file} for number, shard in enumerate(manifest.shards)],
        "target_layer_ids": list(header.taps),
        "hidden_size": header.hidden_size,
        "hidden_dtype": header.dtype,
        "token_dtype": "int32",
        "mask_dtype": "uint8",
        "max_length": header.max_length,
    }


def _published(manifest: Manifest) -> dict[str, Any]:
    """The published manifest, with the keys that its readers expect beside the facts."""
    return {
        **_facts(manifest),
        "target_model_name_or_path": manifest.header.target,
        "min_loss_tokens": 1,
        "chat_template": None,
        "source_jsonl_paths": [],
        "project_name": None,
        "exp_name": None,
        "git_sha": None,
    }


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _untrue(path: Path, found: str, expected: str) -> CacheError:
    return CacheError(
        "A file of the cache does not match the shards",
        where=path,
        found=found,
        expected=expected,
        fix=_MAKE_AGAIN,
    )
