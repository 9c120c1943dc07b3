"""One shard of stored tokens: an Arrow file that is mapped into memory, never loaded.

A row is a sample: id, input_ids, loss_mask, original_length. Knows the file's columns; not which shards there are.

Legend: S samples of a shard, N tokens of all of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
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

    def containing(self, token: int) -> int:
        """How many samples contain the token."""
        places = np.flatnonzero(self.input_ids == token)
        return len(np.unique(np.searchsorted(self.starts, places, side="right")))


def write_shard(path: Path, samples: Sequence[Sample]) -> None:
    """Write at least one sample, and have it on the disk."""
    starts = np.zeros(len(samples) + 1, dtype=np.int32)
    np.cumsum([len(sample.input_ids) for sample in samples], out=starts[1:])
    input_ids = torch.cat([sample.input_ids for sample in samples]).numpy().astype(np.int32)
    loss_mask = torch.cat([sample.loss_mask for sample in samples]).numpy().astype(np.uint8)
    columns = [
        pa.array([sample.id for sample in samples], pa.string()),
        pa.ListArray.from_arrays(pa.array(starts), pa.array(input_ids)),
        pa.ListArray.from_arrays(pa.array(starts), pa.array(loss_mask)),
        pa.array([sample.original_length for sample in samples], pa.int64()),
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
