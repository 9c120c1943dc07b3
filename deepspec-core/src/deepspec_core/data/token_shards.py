"""One shard of stored tokens: an Arrow file that is mapped into memory, never loaded.

A row is a sample: id, input_ids, loss_mask, original_length. Knows the file's columns; not which shards there are.

Legend: S samples of a shard, N tokens of all of them.
"""

from __future__ import annotations

import os
from array import array
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from attrs import frozen

from deepspec_core.contracts.draft import Sample

_SCHEMA: Final = pa.schema(
    [
        ("id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.uint8())),
        ("original_length", pa.int64()),
    ]
)


@frozen(kw_only=True, eq=False)
class TokenShard:
    """The columns of a shard, as they lie in the file.

    ids: [S], an Arrow array of text. starts [S + 1] int32: sample i has the tokens [starts[i], starts[i + 1]).
    input_ids [N] int32. loss_mask [N] uint8, 1 = supervised. original_lengths [S] int64.
    """

    ids: Any
    starts: np.ndarray[Any, Any]
    input_ids: np.ndarray[Any, Any]
    loss_mask: np.ndarray[Any, Any]
    original_lengths: np.ndarray[Any, Any]

    def sample(self, row: int) -> Sample:
        """One row, copied out of the file."""
        begin, end = int(self.starts[row]), int(self.starts[row + 1])
        return Sample(
            id=self.ids[row].as_py(),
            input_ids=torch.from_numpy(self.input_ids[begin:end].astype(np.int64)),
            loss_mask=torch.from_numpy(self.loss_mask[begin:end].astype(np.bool_)),
            original_length=int(self.original_lengths[row]),
        )

    def with_token(self, token: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The rows of the samples that contain the token, rising."""
        places = np.flatnonzero(self.input_ids == token)
        return np.unique(np.searchsorted(self.starts, places, side="right")) - 1


class NewTokenShard:
    """The samples of a shard until it is written, as its columns: a sample of tensors takes many times its tokens."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._lengths, self._original_lengths = array("q"), array("q")
        self._input_ids, self._loss_mask = bytearray(), bytearray()

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def tokens(self) -> int:
        """The number of tokens of all samples."""
        return len(self._loss_mask)

    def append(self, sample: Sample) -> None:
        """Add a sample."""
        self._ids.append(sample.id)
        self._lengths.append(len(sample.input_ids))
        self._original_lengths.append(sample.original_length)
        self._input_ids += sample.input_ids.numpy().astype(np.int32).tobytes()
        self._loss_mask += sample.loss_mask.numpy().astype(np.uint8).tobytes()

    def write(self, path: Path) -> None:
        """Write the samples, of which there is at least one, and sync them to the disk."""
        starts = np.zeros(len(self) + 1, dtype=np.int32)
        np.cumsum(self._lengths, out=starts[1:])
        input_ids = np.frombuffer(self._input_ids, dtype=np.int32)
        loss_mask = np.frombuffer(self._loss_mask, dtype=np.uint8)
        columns = [
            pa.array(self._ids, pa.string()),
            pa.ListArray.from_arrays(pa.array(starts), pa.array(input_ids)),
            pa.ListArray.from_arrays(pa.array(starts), pa.array(loss_mask)),
            pa.array(np.frombuffer(self._original_lengths, dtype=np.int64)),
        ]
        with path.open("wb") as file:
            with pa.ipc.new_file(file, _SCHEMA) as writer:
                writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
            file.flush()
            os.fsync(file.fileno())


def open_shard(path: Path, *, checked: bool = True) -> TokenShard:
    """Map a shard. OSError or ValueError where the file is not one. `checked`: look at every offset and every id."""
    with pa.memory_map(str(path)) as mapped, pa.ipc.open_file(mapped) as reader:
        if reader.schema != _SCHEMA or reader.num_record_batches != 1:
            raise ValueError("it has other columns than a shard of tokens")
        batch = reader.get_batch(0)
    batch.validate(full=checked)
    ids, input_ids, loss_mask, original_lengths = batch.columns
    starts = input_ids.offsets.to_numpy()
    if checked and (
        any(column.null_count for column in batch.columns)
        or not np.array_equal(starts, loss_mask.offsets.to_numpy())
        or (np.diff(starts) < 1).any()
    ):
        raise ValueError("its ids and masks do not fit together")
    return TokenShard(
        ids=ids,
        starts=starts,
        input_ids=input_ids.values.to_numpy(),
        loss_mask=loss_mask.values.to_numpy(),
        original_lengths=original_lengths.to_numpy(),
    )
